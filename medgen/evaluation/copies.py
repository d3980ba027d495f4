"""Copies of training scans among the synthetic ones, and pictures of the closest pairs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from PIL import Image

from medgen.data.standard import normalize, read_scan
from medgen.evaluation.scans import Scans
from medgen.evaluation.split import Split
from medgen.metrics.authenticity import auth_pct, c_t
from medgen.metrics.copies import CopySearch, find_copies
from medgen.metrics.matching import closest
from medgen.metrics.pose import apply_pose, summarize_pose
from medgen.pictures import strip
from medgen.seeding import derive_seed

_SHOWN = 8  # closest pairs
_GAIN = 3  # differences are faint
FALSE_ALARMS = 0.005  # share of scans that copy nothing and are still taken for copies, at most
_FEWEST_HELD_OUT = 20  # scans, below which C_T says nothing
_QUANTILES = (0.05, 0.5, 0.95)


def find(real: Scans, synthetic: Scans, split: Split, seed: int) -> tuple[dict[str, Any], CopySearch]:
    """Search the training scans for each synthetic scan, and the held-out ones apart, by the same threshold.

    Args:
        real: The measured real scans.
        synthetic: The measured synthetic scans.
        split: Of the real scans; without one, all of them are searched as training scans.
        seed: Of the cells of C_T.

    Returns:
        Section of the report, and what was found.
    """
    groups = torch.tensor([derive_seed("group", real.groups[row]) for row in split.train])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search = find_copies(
            real.descriptors[split.train].float(),
            synthetic.descriptors.float(),
            groups=groups,
            false_alarm_rate=FALSE_ALARMS,
        )
    features = [part.double().mean(dim=1) for part in (real.features[split.train], synthetic.features)]
    copied = None
    if split.apart and len(split.val) >= _FEWEST_HELD_OUT:
        held_out = real.features[split.val].double().mean(dim=1)
        copied = float(c_t(features[0], held_out, features[1], seed=seed))
    quantiles = torch.quantile(search.ratio, search.ratio.new_tensor(_QUANTILES))
    order = torch.argsort(search.closest.similarity, descending=True)[:_SHOWN].tolist()
    section = {
        "copies": int(search.is_copy.sum()),
        "share": float(search.is_copy.double().mean()),
        "cases": [synthetic.cases[row].case for row in torch.nonzero(search.is_copy).flatten().tolist()],
        "threshold": search.threshold,
        "expected_false_alarms": FALSE_ALARMS * len(synthetic.cases),
        "searched": len(split.train),
        "held_out": _held_out(real, synthetic, split, search.threshold),
        "auth_pct": float(auth_pct(features[0], features[1])),
        "c_t": copied,
        "nearest_ratio": quantiles.tolist(),
        "pairs": [
            {
                "synthetic": synthetic.cases[row].case,
                "real": real.cases[split.train[int(search.closest.index[row])]].case,
                "similarity": float(search.closest.similarity[row]),
                "ratio": float(search.ratio[row]),
                "is_copy": bool(search.is_copy[row]),
                "pose": _in_words(search, row, synthetic, real, split),
            }
            for row in order
        ],
        "warnings": [str(item.message) for item in caught],
    }
    return section, search


def _held_out(real: Scans, synthetic: Scans, split: Split, threshold: float) -> dict[str, Any] | None:
    """Synthetic scans that look like copies of scans that are in no training part; None where there are none."""
    trained = set(split.train)
    rows = [row for row in range(len(real.cases)) if row not in trained]
    if not rows:
        return None
    matches = closest(synthetic.descriptors.float(), real.descriptors[rows].float())
    found = torch.nonzero(matches.similarity > threshold).flatten().tolist()
    # The closest of more scans exceeds the threshold more often by chance.
    alarms = FALSE_ALARMS * len(synthetic.cases) * len(rows) / len(split.train)
    return {
        "searched": len(rows),
        "copies": len(found),
        "expected_false_alarms": alarms,
        "pairs": [
            {
                "synthetic": synthetic.cases[row].case,
                "real": real.cases[rows[int(matches.index[row])]].case,
                "similarity": float(matches.similarity[row]),
            }
            for row in sorted(found, key=lambda row: -float(matches.similarity[row]))
        ],
    }


def gallery(
    section: dict[str, Any], search: CopySearch, real: Scans, synthetic: Scans, split: Split
) -> list[Image.Image]:
    """Each of the closest pairs: the synthetic scan, the real one moved onto it, and their difference.

    Args:
        section: The section of the report.
        search: What was found.
        real: The measured real scans.
        synthetic: The measured synthetic scans.
        split: Of the real scans.

    Returns:
        One picture a pair, in the order of the section.
    """
    rows = {case.case: row for row, case in enumerate(synthetic.cases)}
    pictures = []
    for pair in section["pairs"]:
        row = rows[pair["synthetic"]]
        made_case, real_case = synthetic.cases[row], real.cases[split.train[int(search.closest.index[row])]]
        made, _, grid = read_scan(made_case, synthetic.dataset)
        made = normalize(made, made_case, synthetic.dataset).clamp(0, 1)
        original = normalize(read_scan(real_case, real.dataset)[0], real_case, real.dataset).clamp(0, 1)
        pose = search.closest.pose[row : row + 1]
        moved = apply_pose(original[None], pose, made.shape[1:])[0]
        difference = (_GAIN * (made - moved).abs()).clamp(max=1)
        scans = [("synthetic", made), ("closest real, aligned", moved), (f"difference x {_GAIN}", difference)]
        pictures.append(strip(scans, grid))
    return pictures


def _in_words(search: CopySearch, row: int, synthetic: Scans, real: Scans, split: Split) -> str:
    shape = synthetic.shapes[row]
    other = real.shapes[split.train[int(search.closest.index[row])]]
    pose = summarize_pose(search.closest.pose[row], shape, other)
    dims = len(shape)
    axes = ("up-down", "left-right") if dims == 2 else ("left-right", "front-back", "up-down")
    parts = [f"mirrored {' and '.join(axes[axis] for axis in pose.flipped)}"] if pose.flipped else []
    if pose.rotation >= 1:
        parts.append(f"turned by {pose.rotation:.0f}°")
    if abs(pose.scale - 1) >= 0.03:
        parts.append(f"scaled by {pose.scale:.2f}")
    return ", ".join(parts) or "in place"
