"""New label maps from old ones: random plausible deformations, checked and replayable from their record.

A deformation is an affine part (rotation, scaling, translation about the centre of the foreground) and a smooth elastic
part, a cubic B-spline with control points every few mm (Rueckert et al., IEEE TMI 1999, eq. 2). All lengths are mm.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from medgen.conditions import spline
from medgen.conditions.mask import signed_distance
from medgen.conditions.topology import topology, topology_change
from medgen.types import BadInputError, Shape, Spacing

# Local volume may change at most by this factor either way: a fold has a negative ratio, and tissue that shrinks or
# grows five-fold within one organ is not a variant of the same anatomy.
_MAX_LOCAL_VOLUME_CHANGE = 5.0
# Distances are only compared near surfaces; four voxels let argmax see past the rounding of any draw.
_TRUNCATION_VOXELS = 4.0
# Voxels that are warped at once: bounds the memory of the coordinates on large volumes.
_CHUNK_VOXELS = 2_000_000


@dataclass(frozen=True)
class Deformation:
    """Record of one deformation: with the label map that it was drawn for, it gives the same voxels again.

    Attributes:
        shape: Voxels of the label map, in array order.
        spacing: Voxel edge lengths in mm.
        center: Point about which the affine part turns and scales, in mm from the first voxel centre.
        rotation: Degrees; one angle in 2D, angles about array axes 0, 1, 2 (applied in this order) in 3D.
        scaling: Factor per array axis, applied before the rotation.
        translation: Shift per array axis in mm.
        elastic: Standard deviation of the elastic displacement per axis, in mm; 0 switches it off.
        control_spacing: Distance of the B-spline control points in mm.
        elastic_seed: Seed of the control point displacements.
        attempts: Number of draws until this one passed the checks.
    """

    shape: Shape
    spacing: Spacing
    center: tuple[float, ...]
    rotation: tuple[float, ...]
    scaling: tuple[float, ...]
    translation: tuple[float, ...]
    elastic: float
    control_spacing: float
    elastic_seed: int
    attempts: int = 1


def deform_label(
    label: torch.Tensor,
    *,
    generator: torch.Generator,
    spacing: Spacing,
    rotation: float = 10.0,
    scaling: float = 0.1,
    translation: float | None = None,
    elastic: float | None = None,
    control_spacing: float | None = None,
    keep_components: bool = True,
    max_attempts: int = 50,
) -> tuple[torch.Tensor, Deformation]:
    """Draw deformations of a label map until one keeps its topology.

    A draw passes if it folds nowhere and stretches no tissue five-fold, every class is kept with its number of
    connected components and of holes or cavities, no class reaches a border of the field of view that it did not touch
    before, and a voxel changed. Beyond a border that cuts a structure the map goes on mirrored, elsewhere as ground.

    Args:
        label: ``(H, W[, D])`` integer class indices, 0 is background.
        generator: CPU source of every draw; the same seed gives the same result.
        spacing: Voxel edge lengths in mm, in array order; ones where they are unknown.
        rotation: Largest angle in degrees, either way, about each axis.
        scaling: Largest relative change of length per axis; 0.1 draws factors in [1/1.1, 1.1].
        translation: Largest shift per axis in mm; None takes 5 % of the size of the foreground.
        elastic: Standard deviation of the smooth displacement per axis in mm; None takes 9 % of ``control_spacing``,
            which changes lengths locally by about 10 %.
        control_spacing: Distance of the control points in mm, the finest detail of the elastic part; None takes half
            the size of the foreground (the geometric mean of the edges of its bounding box).
        keep_components: False lets components and holes change in number, as for crowds of cell nuclei.
        max_attempts: Draws before giving up.

    Returns:
        The deformed label, of the shape and type of ``label`` on the CPU, and the record that replays it.

    Raises:
        BadInputError: If an argument is out of range, the label has no foreground, all strengths are zero, or no draw
            passed; the message then counts the reasons.
    """
    array, steps = _checked_label(label, spacing)
    size, center = _foreground(array, steps)
    control = size / 2 if control_spacing is None else float(control_spacing)
    strengths = {
        "rotation": float(rotation),
        "scaling": float(scaling),
        "translation": 0.05 * size if translation is None else float(translation),
        "elastic": 0.09 * control if elastic is None else float(elastic),
    }
    _check_strengths(strengths, control, max_attempts)
    distances, values = _class_distances(array, steps)
    before = topology(array)
    reasons: Counter[str] = Counter()
    for attempt in range(1, max_attempts + 1):
        deformation = _draw(array.shape, steps, center, strengths, control, generator, attempt)
        if _local_volume_change(deformation) > _MAX_LOCAL_VOLUME_CHANGE:
            reasons["folded or implausibly stretched"] += 1
            continue
        deformed = _warp(distances, values, deformation)
        if np.array_equal(array, deformed):
            reason: str | None = "too weak to move a voxel"
        else:
            reason = topology_change(before, deformed, keep_components=keep_components)
        if reason is None:
            return torch.from_numpy(deformed).to(label.dtype), deformation
        reasons[reason] += 1
    counts = ", ".join(f"{number}x {reason}" for reason, number in reasons.most_common())
    used = ", ".join(f"{name} {value:.3g}" for name, value in strengths.items())
    raise BadInputError(
        f"label: expected a deformation ({used}, control_spacing {control:.3g}) that keeps its topology, "
        f"got none in {max_attempts} draws ({counts}). Lower the strengths, raise max_attempts, "
        "allow keep_components=False or leave this label out."
    )


def displacement(deformation: Deformation, points: Sequence[np.ndarray]) -> np.ndarray:
    """Elastic displacement on a rectilinear grid of points.

    Args:
        deformation: Record that holds seed, strength and control points.
        points: One increasing array of positions per axis, in mm from the first voxel centre.

    Returns:
        ``(*lengths of points, spatial_dims)`` float64, in mm, along array axes.
    """
    control = deformation.control_spacing
    return spline.evaluate(_control_points(deformation), [spline.basis(axis, control) for axis in points])


def jacobian(deformation: Deformation, points: Sequence[np.ndarray]) -> np.ndarray:
    """Jacobian matrix of the map from a deformed point to its source, from the analytic spline derivative.

    Args:
        deformation: Record of the deformation.
        points: One increasing array of positions per axis, in mm from the first voxel centre.

    Returns:
        ``(*lengths of points, spatial_dims, spatial_dims)`` float64: entry ``[..., i, j]`` is the derivative of source
        coordinate i with respect to coordinate j. Its determinant is source volume over deformed volume.
    """
    control = deformation.control_spacing
    displacements = _control_points(deformation)
    values = [spline.basis(axis, control) for axis in points]
    slopes = [spline.basis(axis, control, derivative=True) for axis in points]
    columns = [
        spline.evaluate(displacements, [slopes[axis] if axis == along else values[axis] for axis in range(len(values))])
        for along in range(len(values))
    ]
    return np.linalg.inv(_affine(deformation)) + np.stack(columns, axis=-1)


def _draw(
    shape: Shape,
    spacing: Spacing,
    center: tuple[float, ...],
    strengths: dict[str, float],
    control_spacing: float,
    generator: torch.Generator,
    attempt: int,
) -> Deformation:
    """Draw one set of parameters; how many numbers are drawn never depends on the strengths."""
    dims = len(shape)

    def uniform(number: int, limit: float) -> tuple[float, ...]:
        draw = torch.rand(number, generator=generator, dtype=torch.float64)
        return tuple(((2 * draw - 1) * limit).tolist())

    return Deformation(
        shape=tuple(shape),
        spacing=spacing,
        center=center,
        rotation=uniform(1 if dims == 2 else 3, strengths["rotation"]),
        scaling=tuple(math.exp(value) for value in uniform(dims, math.log1p(strengths["scaling"]))),
        translation=uniform(dims, strengths["translation"]),
        elastic=strengths["elastic"],
        control_spacing=control_spacing,
        # 53 bits: JSON readers that hold numbers as doubles keep the seed exact.
        elastic_seed=int(torch.randint(2**53, (1,), generator=generator)),
        attempts=attempt,
    )


def _affine(deformation: Deformation) -> np.ndarray:
    """Rotation times scaling, ``(d, d)``: from source to deformed mm about the centre."""
    dims = len(deformation.shape)
    planes = [(0, 1)] if dims == 2 else [(1, 2), (2, 0), (0, 1)]
    matrix = np.diag(np.asarray(deformation.scaling, dtype=np.float64))
    for (first, second), degrees in zip(planes, deformation.rotation, strict=True):
        turn = np.eye(dims)
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn[first, first], turn[first, second] = cosine, -sine
        turn[second, first], turn[second, second] = sine, cosine
        matrix = turn @ matrix
    return matrix


def _control_points(deformation: Deformation) -> np.ndarray:
    """Displacements of all control points, ``(n_0, ..., d)`` mm, scaled to give the field the recorded deviation."""
    extents = [(number - 1) * step for number, step in zip(deformation.shape, deformation.spacing, strict=True)]
    counts = [spline.count_control_points(extent, deformation.control_spacing) for extent in extents]
    source = torch.Generator().manual_seed(deformation.elastic_seed)
    normal = torch.randn(*counts, len(counts), generator=source, dtype=torch.float64).numpy()
    return normal * (deformation.elastic / spline.VARIANCE ** (len(counts) / 2))


def _local_volume_change(deformation: Deformation) -> float:
    """Largest factor by which a small volume grows or shrinks; infinite where the map folds."""
    points = []
    for number, step in zip(deformation.shape, deformation.spacing, strict=True):
        extent = (number - 1) * step
        # Eight points per control interval see every extremum of a cubic, whatever the number of voxels.
        points.append(np.linspace(0, extent, min(number, math.ceil(8 * extent / deformation.control_spacing) + 1)))
    ratio = np.linalg.det(jacobian(deformation, points))
    smallest = float(ratio.min())
    return math.inf if smallest <= 0 else max(float(ratio.max()), 1 / smallest)


def _class_distances(array: np.ndarray, spacing: Spacing) -> tuple[torch.Tensor, np.ndarray]:
    """Signed distances of background and each class that is present, ``(1 + present, ...)``, and their class indices.

    Interpolating distances instead of indices keeps surfaces smooth, and the class with the largest one wins: where
    nothing moves, that is the class of the voxel itself.
    """
    truncation = _TRUNCATION_VOXELS * max(spacing)
    values = np.concatenate([[0], np.unique(array[array > 0])])
    maps = [
        signed_distance(torch.from_numpy((array == value).astype(np.int16)), 2, truncation=truncation, spacing=spacing)
        for value in values[1:]
    ]
    foreground = torch.from_numpy((array > 0).astype(np.int16))
    return torch.cat([-signed_distance(foreground, 2, truncation=truncation, spacing=spacing), *maps]), values


def _warp(distances: torch.Tensor, values: np.ndarray, deformation: Deformation) -> np.ndarray:
    """Pull the class of every voxel from its source.

    Beyond a border that a structure touches the map is mirrored, or the structure would be drawn out into a bar; beyond
    any other border lies ground, or a mirror image of what is whole would come into view.
    """
    shape = deformation.shape
    spacing, center = np.asarray(deformation.spacing), np.asarray(deformation.center)
    inverse = np.linalg.inv(_affine(deformation))
    axes = [np.arange(number) * step for number, step in zip(shape, spacing, strict=True)]
    half = np.maximum(np.asarray(shape) - 1, 1) / 2
    inside = distances[0].numpy() < 0
    cut = [[bool(inside.take(side, axis).any()) for side in (0, -1)] for axis in range(len(shape))]
    lowest = [-math.inf if low else 0.0 for low, _ in cut]
    highest = [math.inf if high else float(number - 1) for (_, high), number in zip(cut, shape, strict=True)]
    rows = max(1, _CHUNK_VOXELS // math.prod(shape[1:]))
    parts = []
    for start in range(0, shape[0], rows):
        points = [axes[0][start : start + rows], *axes[1:]]
        target = np.stack(np.meshgrid(*points, indexing="ij"), axis=-1)
        source = (target - center - np.asarray(deformation.translation)) @ inverse.T + center
        source += displacement(deformation, points)
        source = np.clip(source / spacing, lowest, highest)
        # grid_sample wants [-1, 1] between the outer voxel centres and the last array axis first.
        grid = torch.from_numpy(np.ascontiguousarray((source / half - 1)[..., ::-1])).to(torch.float32)
        sampled = torch.nn.functional.grid_sample(
            distances[None], grid[None], mode="bilinear", padding_mode="reflection", align_corners=True
        )
        parts.append(sampled[0].argmax(dim=0).numpy())
    return values[np.concatenate(parts)]


def _foreground(array: np.ndarray, spacing: Spacing) -> tuple[float, tuple[float, ...]]:
    """Size (geometric mean of the box edges) and box centre of all classes together, in mm."""
    boxes = ndimage.find_objects((array > 0).astype(np.int8))
    if not boxes:
        raise BadInputError("label: expected at least one foreground voxel to deform, got an empty map. Leave it out.")
    edges = [(part.stop - part.start) * step for part, step in zip(boxes[0], spacing, strict=True)]
    center = [(part.start + part.stop - 1) / 2 * step for part, step in zip(boxes[0], spacing, strict=True)]
    return math.prod(edges) ** (1 / len(edges)), tuple(center)


def _checked_label(label: torch.Tensor, spacing: Spacing) -> tuple[np.ndarray, Spacing]:
    """Label as an array and spacing as floats, both validated."""
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise BadInputError(
            f"label: expected integer class indices, got {label.dtype}. Convert with label.to(torch.int16)."
        )
    if label.ndim not in (2, 3) or label.numel() == 0 or int(label.min()) < 0:
        raise BadInputError(
            f"label: expected (H, W) or (H, W, D) of class indices from 0, got shape {tuple(label.shape)}"
            f"{f' with values from {int(label.min())}' if label.numel() else ''}. Pass one map without batch axis."
        )
    steps = tuple(float(value) for value in spacing)
    if len(steps) != label.ndim or not all(math.isfinite(value) and value > 0 for value in steps):
        raise BadInputError(
            f"spacing: expected {label.ndim} positive lengths in mm, got {tuple(spacing)}. "
            "Pass one per label axis; ones where they are unknown."
        )
    return label.detach().cpu().to(torch.int32).numpy(), steps


def _check_strengths(strengths: dict[str, float], control_spacing: float, max_attempts: int) -> None:
    """Refuse strengths that mean nothing or would change nothing."""
    for name, value in strengths.items():
        if not (math.isfinite(value) and value >= 0):
            raise BadInputError(f"{name}: expected a finite strength from 0, got {value}. Pass 0 to switch it off.")
    if not any(strengths.values()):
        raise BadInputError(
            "deformation: expected a strength above 0, got rotation, scaling, translation and elastic all 0. "
            "Use the label map itself where no change is wanted."
        )
    if not (math.isfinite(control_spacing) and control_spacing > 0):
        raise BadInputError(f"control_spacing: expected a positive length in mm, got {control_spacing}.")
    if max_attempts < 1:
        raise BadInputError(f"max_attempts: expected at least 1, got {max_attempts}.")
