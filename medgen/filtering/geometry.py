"""Voxel size, field of view and orientation of a scan."""

from __future__ import annotations

import nibabel as nib

from medgen.filtering.tolerance import Kind
from medgen.types import Grid

# A thousandth of an edge lets rounded headers pass.
KINDS = {"spacing": Kind("log", "both", 1e-3), "extent": Kind("log", "both", 1e-3)}
_AXES = {2: ("rows", "columns"), 3: ("left-right", "back-front", "down-up")}


def field_of_view(grid: Grid) -> dict[str, float]:
    """Spacing and extent along each axis.

    Args:
        grid: Of the scan, in RAS order where its orientation is known.

    Returns:
        ``spacing`` in mm where it is known, and ``extent`` in mm, else in voxels.
    """
    names = _AXES[grid.spatial_dims]
    edges = grid.spacing if grid.known else (1.0,) * grid.spatial_dims
    extents = {f"extent:{name}": count * edge for name, count, edge in zip(names, grid.shape, edges, strict=True)}
    spacings = {f"spacing:{name}": edge for name, edge in zip(names, edges, strict=True)} if grid.known else {}
    return {**spacings, **extents}


def orientation(grid: Grid) -> str:
    """How a file stores its axes.

    Args:
        grid: Of the file.

    Returns:
        Axis codes such as ``RAS``; ``unknown`` where the file states none.
    """
    if not grid.known:
        return "unknown"
    return "".join(str(code) for code in nib.aff2axcodes(grid.affine))
