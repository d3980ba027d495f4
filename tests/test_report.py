"""The picture of an evaluation, read back from its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from medgen.report import draw_report
from medgen.types import Grid, Sample


def scores() -> dict[str, Any]:
    distance = {"median": 1.0, "range": [0.5, 1.5]}
    similarity = {"mean": 0.5, "std": 0.1, "pairs": 4}
    return {
        "frechet_distance": {
            **dict.fromkeys(("floor", "synthetic_to_val", "synthetic_to_train"), distance),
            "ratio_to_floor": 1.0,
            "n": 4,
            "d": 1280,
            "subsets": 2,
        },
        "ms_ssim": {"real": similarity, "synthetic": similarity, "synthetic_one_label": None, "scales": 1},
        "extractor": {"name": "e", "weights_sha256": "0" * 64, "views": ["axial"]},
        "real": {"split": "as given"},
        "seed": 0,
    }


def panels(path: Path) -> list[np.ndarray]:
    """Dark panels of the picture, from top to bottom."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    dark, _ = ndimage.label(picture.max(axis=-1) < 60)
    boxes = [box for box in ndimage.find_objects(dark) if min(part.stop - part.start for part in box) > 60]
    return [picture[box] for box in sorted(boxes, key=lambda box: box[0].start)]


def test_volumes_are_in_radiological_display_with_letters_and_true_proportions(tmp_path: Path) -> None:
    image = torch.zeros(1, 24, 24, 12)
    for low in ((14, 14, 6), (14, 12, 7), (12, 14, 7)):  # right, anterior, superior, and in every middle plane
        image[(0, *(slice(start, stop) for start, stop in zip(low, (23, 23, 11), strict=True)))] = 1.0
    # Axes are right, anterior, superior; voxels are twice as high as wide.
    known = Sample("a", Grid((24, 24, 12), np.diag([1.0, 1.0, 2.0, 1.0])), image)
    draw_report(scores(), [known], [known], tmp_path / "known.png")
    shown = panels(tmp_path / "known.png")
    assert len(shown) == 6
    for panel in shown:
        height, width = panel.shape[:2]
        assert abs(height / width - 1) < 0.05
        bright = panel.min(axis=-1) > 230
        bright[:, : width // 8], bright[: height // 8] = False, False  # the letters
        rows, columns = np.nonzero(bright)
        assert rows.mean() < height / 2  # anterior or superior is up
        assert columns.mean() < width / 2  # right, in sagittal planes anterior, is at the left
        assert (panel[height * 2 // 5 : height * 3 // 5, : width // 10].min(axis=-1) > 200).any()  # a letter
    unknown = Sample("a", Grid((24, 24, 12), np.eye(4), known=False), torch.zeros(1, 24, 24, 12))
    draw_report(scores(), [unknown], [unknown], tmp_path / "unknown.png")
    assert all((panel[:, : panel.shape[1] // 8] < 60).all() for panel in panels(tmp_path / "unknown.png"))
