"""How one scan lies in the box of another: an affine map, its flips and rotation, and the scan drawn through it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Where the search begins. Around each start the fit finds what lies within about 5 degrees, or a tenth of the axis.
_ANGLES = {2: (-10.0, -5.0, 5.0, 10.0), 3: (-7.0, 7.0)}  # degrees about each axis
_SHIFT = 0.2  # tenth of the axis, as the box reaches from -1 to 1
_SCALES = (0.85, 1.18)  # the other scan is cropped, or cropped the other
_CORNER = 0.15


@dataclass(frozen=True)
class PoseSummary:
    """A pose in words: flip first, then turn.

    Attributes:
        flipped: Axes of the closest scan that are mirrored, counted from 0.
        rotation: Degrees, 0 to 180.
        scale: How much larger the structures of the closest scan appear in the other scan, the mean over the axes.
    """

    flipped: tuple[int, ...]
    rotation: float
    scale: float


def starting_poses(dims: int) -> torch.Tensor:
    """Poses from which the search starts: every flip, with a rotation, a shift or another scale.

    Args:
        dims: 2 or 3.

    Returns:
        ``(P, dims, dims + 1)`` float64.
    """
    identity, still = torch.eye(dims, dtype=torch.float64), torch.zeros(dims, dtype=torch.float64)
    planes = list(itertools.combinations(range(dims), 2))
    parts = [(identity, still)]
    parts += [(_turn(dims, plane, math.radians(angle)), still) for plane in planes for angle in _ANGLES[dims]]
    for shift in itertools.product((-1, 0, 1), repeat=dims):
        steps = sum(map(abs, shift))
        if steps == 1 or (steps and dims == 2):  # in 3D along one axis, for there are 26 of them
            parts.append((identity, _SHIFT * torch.tensor(shift, dtype=torch.float64)))
    parts += [(scale * identity, still) for scale in _SCALES]
    for corner in itertools.product((-1.0, 1.0), repeat=dims):
        parts.append((_SCALES[0] * identity, _CORNER * torch.tensor(corner, dtype=torch.float64)))
    flips = [
        torch.diag(torch.tensor(signs, dtype=torch.float64)) for signs in itertools.product((1.0, -1.0), repeat=dims)
    ]
    return torch.stack([torch.cat([matrix @ flip, shift[:, None]], dim=1) for flip in flips for matrix, shift in parts])


def apply_pose(image: torch.Tensor, pose: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """Draw scans through poses: in the box, and at the place, of the scan that they were compared with.

    Args:
        image: ``(B, C, H, W[, D])``.
        pose: ``(B, dims, dims + 1)``; where the box of the result reaches from -1 to 1 on each axis (in array order),
            the point ``x`` shows the image at ``pose @ (x, 1)`` of its own box.
        shape: Spatial shape of the result. None: that of the image.

    Returns:
        ``(B, C, *shape)``, linearly interpolated, 0 outside of the image.
    """
    dims = image.ndim - 2
    matrix, shift = pose[..., :dims], pose[..., dims:]
    # grid_sample counts axes from the last to the first.
    theta = torch.cat([matrix.flip(1, 2), shift.flip(1)], dim=2).to(image)
    size = [*image.shape[:2], *(image.shape[2:] if shape is None else shape)]
    return F.grid_sample(image, F.affine_grid(theta, size, align_corners=False), align_corners=False)


def summarize_pose(
    pose: torch.Tensor, shape: Sequence[int] | None = None, closest_shape: Sequence[int] | None = None
) -> PoseSummary:
    """Flips, rotation and scale of one pose, from the orthogonal factor of its matrix.

    Args:
        pose: ``(dims, dims + 1)``, of :func:`medgen.metrics.matching.closest`.
        shape: Spatial shape of the scan in voxels; with `closest_shape`, angles are those between voxels. None: angles
            are those between boxes stretched to cubes.
        closest_shape: Spatial shape of the closest real scan in voxels.

    Returns:
        The summary. A flip of two axes and a half turn are one and the same; flips are named, rotations below 90
        degrees.
    """
    dims = pose.shape[0]
    matrix = pose[:, :dims].double().cpu()
    if shape is not None and closest_shape is not None:
        source, target = (torch.tensor(list(sizes), dtype=torch.float64) for sizes in (closest_shape, shape))
        matrix = source[:, None] * matrix / target
    left, values, right = torch.linalg.svd(matrix)
    orthogonal = left @ right
    signs = torch.where(orthogonal.diagonal() < 0, -1.0, 1.0).double()
    turn = orthogonal * signs
    cosine = float((turn.trace() - (dims - 2)) / 2)
    return PoseSummary(
        flipped=tuple(torch.nonzero(signs < 0).flatten().tolist()),
        rotation=math.degrees(math.acos(min(1.0, max(-1.0, cosine)))),
        scale=float(1 / values.prod() ** (1 / dims)),
    )


def _turn(dims: int, plane: tuple[int, int], angle: float) -> torch.Tensor:
    """Rotation matrix in the plane of two axes."""
    i, j = plane
    matrix = torch.eye(dims, dtype=torch.float64)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix
