"""FRD of real sets against golden values that frd-score 1.0.1 computed, within the bounds that their README states."""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medgen.metrics.frd import features
from medgen.metrics.protocols import PROTOCOLS
from medgen.metrics.radiomic_distance import frd_v0, frd_v1

DATA = Path(os.environ.get("MEDGEN_DATA", Path(__file__).parents[3] / "shared" / "data"))
ORACLE = DATA.parent / "oracles" / "frd.json"
GOLDEN: dict[str, Any] = json.loads(ORACLE.read_text()) if ORACLE.exists() else {"pairs": []}
RUNS = [
    pytest.param(pair, run, id=f"{pair['name']}-{run['frd_version']}-{'masks' if run['masks'] else 'whole'}")
    for pair in GOLDEN["pairs"]
    for run in pair["runs"]
]


def _scan(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        pixels = np.asarray(Image.open(path))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.asarray(nibabel.load(path).dataobj)[None]


def _transformed(images: list[np.ndarray], transform: dict[str, str] | None) -> list[np.ndarray]:
    """The recipes of the golden values, as they are written there."""
    if transform is None:
        return images
    if transform["name"] == "gaussian blur":
        made = [ndimage.gaussian_filter(image[0].astype(float), sigma=1.5, mode="nearest") for image in images]
    else:
        source = np.random.default_rng(0)
        made = [image[0] + source.normal(0.0, 15.0, size=image[0].shape) for image in images]
    return [np.clip(np.rint(image), 0, 255).astype(np.uint8)[None] for image in made]


@functools.cache
def _rows(pair: str, side: str, protocol: str, masks: bool) -> np.ndarray:
    entry = next(item for item in GOLDEN["pairs"] if item["name"] == pair)
    group, rule = entry[side], entry["mask_rule"].split()
    images = _transformed([_scan(DATA / path) for path in group["images"]], group["transform"])
    rows = []
    for index, image in enumerate(images):
        path = DATA / group["images"][index]
        spacing = None if path.suffix == ".png" else nibabel.load(path).header.get_zooms()[:3]
        mask = None
        if masks:
            label = _scan(DATA / group["labels"][index])[0]
            mask = (label == int(rule[2]) if rule[1] == "==" else label > int(rule[2])).astype(np.uint8)
        rows.append(features(image, mask, protocol=PROTOCOLS[protocol], spacing=spacing))
    return np.stack(rows)


@pytest.mark.skipif(not RUNS, reason="needs the shared golden values, oracles/frd.json beside MEDGEN_DATA")
@pytest.mark.parametrize(("pair", "run"), RUNS)
def test_equals_the_golden_values(pair: dict[str, Any], run: dict[str, Any]) -> None:
    protocol = f"frd-{run['frd_version']}"
    x, y = (_rows(pair["name"], side, protocol, run["masks"]) for side in ("D1", "D2"))
    dims = 3 if pair["D1"]["set"] == "hippocampus3d" else 2
    names = PROTOCOLS[protocol].columns(dims)
    assert len(names) == run["n_columns"]
    found = PROTOCOLS[protocol].distance(x, y, names)
    assert found.columns == run["n_columns_used"]
    assert set(found.dropped_columns) == {name.removeprefix("original_") for name in run["columns_dropped"]}
    if protocol == "frd-v0":
        bound = 1e-3
    elif run["masks"]:
        bound = 1e-4
    else:
        bound = 0.1 if pair["name"] == "cxr_radiopaedia_vs_eurorad_labelled" else 0.01
    assert found.value == pytest.approx(run["frd"], abs=bound, rel=0)
    noise = run.get("noise_columns") or []
    assert bool(noise) == any("rounding noise" in note for note in found.warnings)
    assert all(name in " ".join(found.warnings) for name in noise)


# The golden values are written out here, so that this runs without the shared folder: frd-score 1.0.1 on matrices.
CASES = {
    "full_rank": (0, 60, 50, 8, 3.7932873899020656, 0.8903776101313546),
    "rank_deficient": (1, 10, 12, 30, 167.48984882357553, 4.745658267955423),
    "constant_column_in_D1": (2, 60, 50, 8, 10.510339278693252, 0.9233459986810694),
}


@pytest.mark.parametrize("case", CASES)
def test_distances_of_matrices_equal_frd_score(case: str) -> None:
    seed, n, m, d, v0, v1 = CASES[case]
    source = np.random.default_rng(seed)
    x = source.normal(size=(n, d))
    y = 1.3 * source.normal(size=(m, d)) + 0.4
    if case.startswith("constant"):
        x[:, 3] = 2.0
    names = [f"firstorder_{index}" for index in range(d)]
    assert frd_v0(x, y, names).value == pytest.approx(v0, rel=1e-6)
    found = frd_v1(x, y, names)
    assert found.value == pytest.approx(v1, rel=1e-6)
    assert found.squared == pytest.approx(math.exp(v1), rel=1e-6)
    assert list(found.dropped_columns) == (["firstorder_3"] if case.startswith("constant") else [])
