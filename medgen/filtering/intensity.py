"""Intensities of each class: where they lie and how much they vary, after normalization and in the scan's own units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.ndimage import binary_dilation

from medgen.filtering.tolerance import Kind

KINDS = {
    "intensity_level": Kind("linear", "both"),
    "intensity_spread": Kind("log", "both"),
    "intensity_contrast": Kind("logit", "both"),
    "intensity_source": Kind("linear", "both"),
}
_FEWEST_VOXELS = 8  # below which a spread says nothing
_RING = 3  # voxels around a class that it is compared with
_MOST_RANKED = 50_000  # voxels of a class, and around it, that are compared
_LEAST_SPREAD = 1e-3  # of the range of a scan
_RANGE = (0.5, 99.5)  # percentiles between which a scan's intensities lie


def class_intensities(
    image: torch.Tensor,
    unit: torch.Tensor,
    label: torch.Tensor,
    class_names: Mapping[int, str],
    channel_names: Mapping[int, str],
) -> dict[str, float]:
    """Median and spread of each class and channel, and how it stands out from what is around it.

    Args:
        image: ``(C, *spatial)`` in source units.
        unit: ``(C, *spatial)`` in [0, 1], normalized by the percentiles of the scan.
        label: ``(*spatial)`` class indices.
        class_names: Names by label value.
        channel_names: Names by channel.

    Returns:
        ``intensity_level`` (median in [0, 1]), ``intensity_spread`` (half the distance of percentiles 16 and 84, a
        standard deviation where intensities are normal), ``intensity_contrast`` (chance that a voxel of the class is
        brighter than one of the three voxels around it: 0.5 where it cannot be told from them, whatever the window and
        gamma of the scan) and ``intensity_source`` (median in source units) of each class that the label shows.
    """
    found = {}
    for value, name in class_names.items():
        inside = label == value
        if not value or not bool(inside.any()):
            continue
        box, ring = _around(inside)
        for channel in range(len(image)):
            what = name if len(image) == 1 else f"{name}, {channel_names[channel]}"
            low, middle, high = np.percentile(unit[channel][inside].numpy(), [16, 50, 84])
            found[f"intensity_level:{what}"] = float(middle)
            if ring.any():
                around = unit[channel][box].numpy()[ring]
                found[f"intensity_contrast:{what}"] = chance_of_more(unit[channel][inside].numpy(), around)
            if int(inside.sum()) >= _FEWEST_VOXELS:
                found[f"intensity_spread:{what}"] = max(float(high - low) / 2, _LEAST_SPREAD)
            found[f"intensity_source:{what}"] = float(np.median(image[channel][inside].numpy()))
    return found


def chance_of_more(values: np.ndarray, others: np.ndarray) -> float:
    """Chance that one of the values is larger than one of the others; ties count half.

    Args:
        values: ``(N,)``; of more than 50,000 evenly spaced ones are taken.
        others: ``(M,)``, likewise.

    Returns:
        Mann and Whitney's U over N M, which is the area under the ROC curve.
    """
    values, others = (rows[:: 1 + len(rows) // _MOST_RANKED] for rows in (values, others))
    order = np.sort(others)
    less, no_more = (np.searchsorted(order, values, side=side) for side in ("left", "right"))
    return float((less + no_more).mean() / (2 * len(order)))


def _around(inside: torch.Tensor) -> tuple[tuple[slice, ...], np.ndarray]:
    """The part of the scan that holds a class, and in it the voxels around the class."""
    places = inside.nonzero()
    first, last = places.amin(dim=0) - _RING, places.amax(dim=0) + _RING + 1
    box = tuple(slice(max(int(low), 0), int(high)) for low, high in zip(first, last, strict=True))
    part = inside[box].numpy()
    return box, binary_dilation(part, iterations=_RING) & ~part


def intensity_range(image: torch.Tensor) -> float:
    """What a scan's intensities span.

    Args:
        image: ``(C, *spatial)`` in source units.

    Returns:
        Distance of percentiles 0.5 and 99.5, the mean over the channels.
    """
    ends = np.percentile(image.flatten(1).numpy(), _RANGE, axis=1)
    return float(np.mean(ends[1] - ends[0]))


def units_compare(scores: Sequence[Mapping[str, float]], ranges: Sequence[float]) -> bool:
    """Whether scans store the same thing as about the same number, as CT does and MR with a free gain does not.

    Args:
        scores: Of each real scan, with ``intensity_source``.
        ranges: What the intensities of each span.

    Returns:
        True if for each class the medians of 90 of 100 scans lie closer together than a usual scan spans.
    """
    names = {name for row in scores for name in row if name.startswith("intensity_source")}
    typical = float(np.median(ranges))
    columns = [[row[name] for row in scores if name in row] for name in names]
    return all(float(np.ptp(np.percentile(column, [5, 95]))) <= typical for column in columns)
