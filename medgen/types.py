"""Value objects shared by every room of the package."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

Shape = tuple[int, ...]
Spacing = tuple[float, ...]


class BadInputError(ValueError):
    """A user's file or folder that cannot be used; the message says which, what was expected and what to do."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a scan lie.

    Attributes:
        shape: ``(H, W)`` or ``(H, W, D)`` voxels, in array order.
        affine: ``(4, 4)`` float64, voxel index to RAS mm; 2D grids use the first two columns.
        known: False where the file carries no spacing or orientation (PNG): the affine is then a convention only.
    """

    shape: Shape
    affine: np.ndarray
    known: bool = True

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return len(self.shape)

    @property
    def spacing(self) -> Spacing:
        """Voxel edge lengths in mm, in array order."""
        columns = np.asarray(self.affine, dtype=np.float64)[:3, : self.spatial_dims]
        return tuple(float(value) for value in np.linalg.norm(columns, axis=0))


@dataclass(frozen=True, eq=False)
class Sample:
    """One scan as it was read from disk, in its own units and orientation.

    Attributes:
        case: Identifier, unique within its data set.
        grid: Voxel grid that image and label share.
        image: ``(C, H, W[, D])`` float32 in source units, or None.
        label: ``(H, W[, D])`` int16 class indices, or None.
        text: Free text that describes the scan, or None.
        meta: Further columns of the data set, as strings.
    """

    case: str
    grid: Grid
    image: torch.Tensor | None = None
    label: torch.Tensor | None = None
    text: str | None = None
    meta: dict[str, str] = field(default_factory=dict)
