"""How large each class is, alone and beside the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from medgen.filtering.tolerance import Kind
from medgen.types import Grid

KINDS = {"volume": Kind("log", "both"), "share": Kind("logit", "both")}


def class_sizes(label: torch.Tensor, grid: Grid, class_names: Mapping[int, str]) -> dict[str, float]:
    """Volume, or area in 2D, of each class, and its share of all classes.

    Args:
        label: ``(*spatial)`` class indices.
        grid: Their grid.
        class_names: Names by label value.

    Returns:
        ``volume`` in mm³ or mm², in voxels where the scan states no spacing, and ``share`` in (0, 1] of each class that
        the label shows; shares only where there are several classes.
    """
    voxel = 1.0
    for edge in grid.spacing if grid.known else ():
        voxel *= edge
    counts = {value: int((label == value).sum()) for value in class_names if value}
    total = sum(counts.values())
    found = {f"volume:{class_names[value]}": count * voxel for value, count in counts.items() if count}
    if len(counts) > 1:
        found |= {f"share:{class_names[value]}": count / total for value, count in counts.items() if count}
    return found
