"""How alike the scans of a set are to each other: mean structural similarity of random pairs."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from tqdm import tqdm

from medgen.data.standard import normalize, read_scan
from medgen.evaluation.scans import Scans
from medgen.metrics import ms_ssim, num_scales
from medgen.seeding import draw
from medgen.threads import side_by_side


def diversity(real: Scans, synthetic: Scans, num_pairs: int, seed: int) -> dict[str, Any]:
    """Mean MS-SSIM of random pairs: among real scans, among synthetic ones, and among those of one label map.

    Args:
        real: The measured real scans.
        synthetic: The measured synthetic scans.
        num_pairs: Pairs for each mean.
        seed: Chooses them.

    Returns:
        Number of scales, and mean, standard deviation and number of pairs for each.
    """
    shape = [min(axis) for axis in zip(*real.shapes, *synthetic.shapes, strict=True)]
    scales = num_scales(shape)
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(synthetic.labels):
        if label is not None:
            groups.setdefault(label, []).append(index)
    shared = [rows for rows in groups.values() if len(rows) > 1]
    result: dict[str, Any] = {
        "scales": scales,
        "method": "central box that both scans of a pair have, intensities in [0, 1]; higher is less diverse",
        "real": _similarity(real, [list(range(len(real.cases)))], scales, num_pairs, seed, "real"),
        "synthetic": _similarity(synthetic, [list(range(len(synthetic.cases)))], scales, num_pairs, seed, "synthetic"),
        "synthetic_one_label": None,
    }
    if shared:
        one_label = _similarity(synthetic, shared, scales, num_pairs, seed, "one label")
        result["synthetic_one_label"] = {**one_label, "labels": len(shared)}
    for name in ("synthetic", "synthetic_one_label"):
        if result[name]:
            result[name]["minus_real"] = result[name]["mean"] - result["real"]["mean"]
    return result


def _similarity(
    scans: Scans, groups: list[list[int]], scales: int, num_pairs: int, seed: int, name: str
) -> dict[str, Any]:
    """MS-SSIM of random pairs, both scans from one group, the groups in turn."""
    pairs: dict[tuple[int, int], None] = {}
    most = sum(len(rows) * (len(rows) - 1) // 2 for rows in groups)
    turn = 0
    while len(pairs) < min(num_pairs, most):
        first, second = sorted(draw(groups[turn % len(groups)], 2, seed, name, turn))
        pairs[first, second] = None
        turn += 1

    def similarity(pair: tuple[int, int]) -> float:
        cases = [scans.cases[index] for index in pair]
        x, y = (normalize(read_scan(case, scans.dataset)[0], case, scans.dataset) for case in cases)
        box = [min(sizes) for sizes in zip(x.shape[1:], y.shape[1:], strict=True)]
        return ms_ssim(_center(x, box)[None], _center(y, box)[None], scales=scales).item()

    with side_by_side() as pool:
        values = list(tqdm(pool.map(similarity, pairs), desc=f"MS-SSIM, {name}", total=len(pairs), unit="pair"))
    return {"mean": statistics.fmean(values), "std": statistics.pstdev(values), "pairs": len(values)}


def _center(image: torch.Tensor, box: list[int]) -> torch.Tensor:
    for axis, size in enumerate(box, start=1):
        image = image.narrow(axis, (image.shape[axis] - size) // 2, size)
    return image
