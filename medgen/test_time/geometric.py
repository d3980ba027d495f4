"""Geometric and intensity views, whose predictions are brought back to the scan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from medgen.seeding import derive_seed, stream

_THICK = 3.0  # so many times as long as on the finest axis are voxels of thick slices


@dataclass(frozen=True)
class Flip:
    """A mirror image; its own inverse.

    Attributes:
        axes: Spatial axes that are turned over, from 0.
    """

    axes: tuple[int, ...] = ()

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Turn over.

        Args:
            values: ``(C, H, W[, D])``, a scan or the probabilities of one.

        Returns:
            As ``values``.
        """
        return values.flip([axis + 1 for axis in self.axes]) if self.axes else values


def flips(spatial_dims: int, axes: tuple[int, ...] | None = None) -> tuple[Flip, ...]:
    """All mirror images, the scan itself first.

    Args:
        spatial_dims: 2 or 3.
        axes: Spatial axes that may be turned over; None is all.

    Returns:
        Two to the power of the number of axes.
    """
    used = tuple(range(spatial_dims)) if axes is None else tuple(dict.fromkeys(axes))
    return tuple(Flip(chosen) for count in range(len(used) + 1) for chosen in itertools.combinations(used, count))


@dataclass(frozen=True, eq=False)
class Pose:
    """How a view is mirrored, turned and scaled, and the way back.

    Attributes:
        flip: The mirror image; exact.
        matrix: ``(dims, dims)`` float32 about the center, from voxels of the view to those of the mirror image; None
            leaves it as it is. Values between voxels are linear, and those beyond the edge are those of the edge.
    """

    flip: Flip
    matrix: torch.Tensor | None = None

    def there(self, image: torch.Tensor) -> torch.Tensor:
        """The view of a scan.

        Args:
            image: ``(C, H, W[, D])`` float.

        Returns:
            As ``image``.
        """
        mirrored = self.flip(image)
        return mirrored if self.matrix is None else _warp(mirrored, self.matrix)

    def back(self, probability: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
        """Where the prediction for the view lies in the scan.

        Args:
            probability: ``(K, H, W[, D])``, sums of 1.
            beyond: As ``probability``, of the scan: what holds for its voxels that the view does not show.

        Returns:
            As ``probability``.
        """
        if self.matrix is None:
            return self.flip(probability)
        way = torch.linalg.inv(self.matrix)
        found = _warp(probability, way)
        shown = _warp(torch.ones_like(probability[:1]), way, padding="zeros") > 1 - 1e-3
        return torch.where(self.flip(shown), self.flip(found / found.sum(dim=0, keepdim=True)), beyond)


def random_pose(
    flip: Flip, spacing: Sequence[float], *, rotation: float, scaling: float, seed: int, number: int
) -> Pose:
    """A mirror image, turned about all axes and scaled by random amounts.

    Args:
        flip: The mirror image.
        spacing: Voxel size of each axis, in any unit: turns are rigid in space. Along axes whose voxels are more than
            three times as long as the shortest nothing moves, since it would mix slices far apart.
        rotation: Largest turn about each axis, in degrees.
        scaling: Largest logarithm of the scale.
        seed: Root of the draw.
        number: Of the view.

    Returns:
        The pose.
    """
    if not rotation and not scaling:
        return Pose(flip)
    random = stream(derive_seed(seed, "test time", f"pose {number}"))
    size = torch.tensor(spacing, dtype=torch.float64)
    moves = size <= _THICK * size.min()
    skew = torch.zeros(len(size), len(size), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(size)), 2):
        angle = math.radians(rotation) * (2 * float(torch.rand((), generator=random)) - 1)
        if moves[i] and moves[j]:
            skew[i, j], skew[j, i] = -angle, angle
    scale = math.exp(scaling * (2 * float(torch.rand((), generator=random)) - 1))
    in_space = torch.linalg.matrix_exp(skew) * torch.where(moves, scale, 1.0)
    return Pose(flip, (in_space * size[None] / size[:, None]).float())


def _warp(values: torch.Tensor, matrix: torch.Tensor, *, padding: str = "border") -> torch.Tensor:
    edges = torch.tensor(values.shape[1:][::-1], dtype=torch.float32)  # grids name the last axis first
    turned = matrix.flip(0, 1) * edges[None] / edges[:, None]
    theta = torch.cat([turned, torch.zeros(len(edges), 1)], dim=1)[None].to(values)
    grid = F.affine_grid(theta, [1, *values.shape], align_corners=False)
    return F.grid_sample(values[None], grid, padding_mode=padding, align_corners=False)[0]


def change_intensities(image: torch.Tensor, *, seed: int, number: int) -> torch.Tensor:
    """Another gamma, contrast and brightness, and some noise, within the range of each channel.

    Args:
        image: ``(C, H, W[, D])`` float.
        seed: Root of the draw.
        number: Of the view; 0 leaves the scan as it is.

    Returns:
        As ``image``.
    """
    if number == 0:
        return image
    random = stream(derive_seed(seed, "test time", f"intensities {number}"))
    axes = tuple(range(1, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    unit = (image - low) / (high - low).clamp(min=1e-12)
    gamma, contrast, brightness, noise = (2 * torch.rand(4, generator=random) - 1).tolist()
    unit = unit ** math.exp(0.3 * gamma)
    mean = unit.mean(axes, keepdim=True)
    unit = mean + (unit - mean) * math.exp(0.2 * contrast) + 0.1 * brightness
    unit = unit + 0.03 * abs(noise) * torch.randn(unit.shape, generator=random)
    return low + unit.clamp(0, 1) * (high - low)
