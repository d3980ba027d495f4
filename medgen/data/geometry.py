"""The way of a scan onto the model's voxel grid and back: reorient, resample, pad; then the same in reverse.

Every step moves voxels along the array axes only, so all of it is separable, and the affine of the model grid follows
from the affine of the file. Nothing is ever cropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from nibabel import orientations

from medgen.types import Grid, Shape, Spacing

Interpolation = Literal["linear", "nearest"]
Padding = Literal["reflect", "constant"]

# A header that says 0.9999 mm for 1 mm means 1 mm; resampling by it would only blur.
SPACING_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Placement:
    """How one scan lies on the model's voxel grid; build it with :func:`place`.

    Attributes:
        source: Grid of the file.
        orientation: Axis codes of the model grid, such as ``"RAS"``, or None where the axes stay as in the file.
        spacing: Voxel edge lengths of the model grid in mm, in model axis order, or None where nothing is resampled.
        resampled_shape: Voxels after reorientation and resampling, before padding.
        padding: Voxels added before and after, per model axis.
    """

    source: Grid
    orientation: str | None
    spacing: Spacing | None
    resampled_shape: Shape
    padding: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> Shape:
        """Voxels of the model grid, per axis."""
        return tuple(n + before + after for n, (before, after) in zip(self.resampled_shape, self.padding, strict=True))

    @cached_property
    def axes(self) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """For each model axis the file axis that it comes from, and whether that is flipped."""
        if self.orientation is None:
            return tuple(range(self.source.spatial_dims)), (False,) * self.source.spatial_dims
        moves = orientations.ornt_transform(
            orientations.io_orientation(self.source.affine), orientations.axcodes2ornt(self.orientation)
        )
        order = tuple(int(axis) for axis in np.argsort(moves[:, 0]))
        return order, tuple(bool(moves[axis, 1] < 0) for axis in order)

    @property
    def reoriented_shape(self) -> Shape:
        """Voxels of the file, in model axis order."""
        return tuple(self.source.shape[axis] for axis in self.axes[0])

    @property
    def steps(self) -> tuple[float, ...]:
        """Edge length of a model voxel in file voxels, per model axis."""
        if self.spacing is None:
            return (1.0,) * self.source.spatial_dims
        source = self.source.spacing
        return tuple(new / source[axis] for new, axis in zip(self.spacing, self.axes[0], strict=True))

    @cached_property
    def affine(self) -> np.ndarray:
        """``(4, 4)`` float64, voxel index of the model grid to RAS mm."""
        order, flips = self.axes
        to_source = np.eye(4)  # model voxel index -> file voxel index
        to_source[: len(order), : len(order)] = 0.0
        for model_axis, (axis, flip) in enumerate(zip(order, flips, strict=True)):
            step = self.steps[model_axis]
            first = (
                _first_centre(self.source.shape[axis], self.resampled_shape[model_axis], step)
                - step * self.padding[model_axis][0]
            )
            to_source[axis, model_axis] = -step if flip else step
            to_source[axis, 3] = self.source.shape[axis] - 1 - first if flip else first
        return np.asarray(self.source.affine, dtype=np.float64) @ to_source

    @property
    def grid(self) -> Grid:
        """The model grid, for writing what lies on it."""
        return Grid(shape=self.shape, affine=self.affine, known=self.source.known)


def place(
    grid: Grid,
    *,
    spacing: Sequence[float] | None = None,
    orientation: str | None = "RAS",
    min_size: int | Sequence[int] | None = None,
    divisor: int = 1,
) -> Placement:
    """Plan how a scan comes onto the model grid: reorient, then resample, then pad. Nothing is cropped.

    A 2D scan keeps its axes. A scan whose file states no geometry (``grid.known`` is False) keeps its axes and is not
    resampled. The center of the field of view stays where it is.

    Args:
        grid: Grid of the file.
        spacing: Voxel edge lengths of the model in mm, in the order of `orientation`; None keeps those of the file.
        orientation: Axis codes that the model wants, such as ``"RAS"``; None keeps the axes of the file.
        min_size: Least number of voxels per axis after padding, in the order of `orientation`.
        divisor: Every axis is padded up to a multiple of this.

    Returns:
        The placement.

    Raises:
        ValueError: If an argument does not fit the grid.
    """
    dims = grid.spatial_dims
    _check_orientation(orientation)
    if divisor < 1:
        raise ValueError(f"divisor: expected an integer of at least 1, got {divisor}.")
    least_sizes = 1 if min_size is None else min_size
    smallest = tuple(least_sizes) if isinstance(least_sizes, Sequence) else (int(least_sizes),) * dims
    wanted = None if spacing is None else tuple(float(value) for value in spacing)
    if len(smallest) != dims:
        raise ValueError(f"min_size: expected {dims} values for a {dims}D scan, got {smallest}.")
    if wanted is not None and (len(wanted) != dims or not all(np.isfinite(wanted)) or min(wanted) <= 0):
        raise ValueError(f"spacing: expected {dims} positive lengths in mm for a {dims}D scan, got {wanted}.")
    codes = orientation.upper() if orientation is not None and dims == 3 and grid.known else None
    bare = Placement(grid, codes, None, (1,) * dims, ((0, 0),) * dims)
    old = tuple(grid.spacing[axis] for axis in bare.axes[0])
    shape = bare.reoriented_shape
    if wanted is None or not grid.known:
        resampled, target = shape, None
    else:
        target = tuple(o if abs(w / o - 1) <= SPACING_TOLERANCE else w for o, w in zip(old, wanted, strict=True))
        # Half up, not half to even: the size must grow monotonically with the field of view.
        resampled = tuple(max(1, int(n * o / t + 0.5)) for n, o, t in zip(shape, old, target, strict=True))
        target = None if target == old else target
    padding = []
    for n, least in zip(resampled, smallest, strict=True):
        total = -(-max(n, least) // divisor) * divisor - n
        padding.append((total // 2, total - total // 2))
    return Placement(grid, codes, target, resampled, tuple(padding))


def to_model(
    array: torch.Tensor | np.ndarray,
    placement: Placement,
    *,
    mode: Interpolation,
    padding: Padding,
    value: float = 0,
) -> torch.Tensor:
    """Bring a scan or label map onto the model grid.

    Linear mode widens its kernel where the model grid is coarser than the file, so that down-sampling does not alias.

    Args:
        array: ``(..., *source.shape)``, any unit; file axis order.
        placement: From :func:`place`.
        mode: ``"linear"`` for images, ``"nearest"`` for labels.
        padding: ``"reflect"`` mirrors about the border voxels, as often as needed; ``"constant"`` fills with `value`.
        value: Fill of constant padding, in the unit of `array`.

    Returns:
        ``(..., *placement.shape)`` on the device of `array`; nearest keeps the dtype, linear gives float32 or float64.

    Raises:
        ValueError: If the array does not have the shape of the placement's source, or an option is unknown.
    """
    tensor = _tensor(array, placement.source.shape, mode)
    if padding not in ("reflect", "constant"):
        raise ValueError(f"padding: expected 'reflect' or 'constant', got {padding!r}.")
    lead = tensor.ndim - placement.source.spatial_dims
    order, flips = placement.axes
    tensor = tensor.permute(*range(lead), *(lead + axis for axis in order))
    tensor = tensor.flip([lead + axis for axis, flip in enumerate(flips) if flip])
    for axis, (n_in, n_out, step) in enumerate(
        zip(placement.reoriented_shape, placement.resampled_shape, placement.steps, strict=True)
    ):
        centres = _first_centre(n_in, n_out, step) + step * np.arange(n_out)
        tensor = _resample(tensor, lead + axis, centres, step, mode)
    if not any(sum(pair) for pair in placement.padding):
        return tensor.contiguous()
    if padding == "constant":
        flat = [count for pair in reversed(placement.padding) for count in pair]
        return torch.nn.functional.pad(tensor, flat, value=value).contiguous()
    for axis, pair in enumerate(placement.padding):
        if sum(pair):
            mirrored = np.pad(np.arange(placement.resampled_shape[axis]), pair, mode="reflect")
            tensor = tensor.index_select(lead + axis, torch.from_numpy(mirrored).to(tensor.device))
    return tensor.contiguous()


def from_model(array: torch.Tensor | np.ndarray, placement: Placement, *, mode: Interpolation) -> torch.Tensor:
    """Bring what lies on the model grid back onto the grid of the file.

    Padding and orientation are undone exactly; resampling goes back to exactly the voxels of the file.

    Args:
        array: ``(..., *placement.shape)``, any unit.
        placement: The placement that :func:`to_model` used.
        mode: ``"linear"`` for images, ``"nearest"`` for labels.

    Returns:
        ``(..., *source.shape)`` in file axis order.

    Raises:
        ValueError: If the array does not have the shape of the placement, or the mode is unknown.
    """
    tensor = _tensor(array, placement.shape, mode)
    lead = tensor.ndim - placement.source.spatial_dims
    for axis, ((before, _), n) in enumerate(zip(placement.padding, placement.resampled_shape, strict=True)):
        tensor = tensor.narrow(lead + axis, before, n)
    for axis, (n_in, n_out, step) in enumerate(
        zip(placement.reoriented_shape, placement.resampled_shape, placement.steps, strict=True)
    ):
        centres = (np.arange(n_in) - _first_centre(n_in, n_out, step)) / step
        tensor = _resample(tensor, lead + axis, centres, 1 / step, mode)
    order, flips = placement.axes
    tensor = tensor.flip([lead + axis for axis, flip in enumerate(flips) if flip])
    return tensor.permute(*range(lead), *(lead + int(axis) for axis in np.argsort(order))).contiguous()


def valid_mask(placement: Placement) -> torch.Tensor:
    """Where the model grid shows the scan, and not padding.

    Args:
        placement: From :func:`place`.

    Returns:
        ``(*placement.shape)`` bool, True inside the scan's field of view.
    """
    mask = torch.zeros(placement.shape, dtype=torch.bool)
    mask[tuple(slice(b, b + n) for (b, _), n in zip(placement.padding, placement.resampled_shape, strict=True))] = True
    return mask


def _first_centre(n_in: int, n_out: int, step: float) -> float:
    """Position of the first new voxel center in old voxels, when both fields of view share their center."""
    return (n_in - 1) / 2 - step * (n_out - 1) / 2


def _resample(tensor: torch.Tensor, axis: int, centres: np.ndarray, step: float, mode: Interpolation) -> torch.Tensor:
    n_in = tensor.shape[axis]
    if len(centres) == n_in and np.allclose(centres, np.arange(n_in), rtol=0, atol=1e-6):
        return tensor
    if mode == "nearest":
        index = torch.from_numpy(_nearest(centres, n_in)).to(tensor.device)
        return tensor.index_select(axis, index)
    weights = torch.from_numpy(_triangle(centres, n_in, max(1.0, step))).to(tensor.device, tensor.dtype)
    return (tensor.movedim(axis, -1) @ weights.T).movedim(-1, axis)


def _nearest(centres: np.ndarray, n_in: int) -> np.ndarray:
    # Ties go to the center of the field of view: a fixed side would shift every label by half a voxel, and a mirrored
    # scan would not give the mirrored label.
    centres = np.round(centres, 6)
    nearest = np.where(centres < (n_in - 1) / 2, np.floor(centres + 0.5), np.ceil(centres - 0.5))
    return np.clip(nearest, 0, n_in - 1).astype(np.int64)


def _triangle(centres: np.ndarray, n_in: int, width: float) -> np.ndarray:
    """``(len(centres), n_in)`` rows that sum to 1: linear interpolation, widened to `width` old voxels."""
    # Beyond the outermost voxel centers the border value goes on.
    inside = centres if width > 1 else np.clip(centres, 0, n_in - 1)
    weights = np.clip(1 - np.abs(inside[:, None] - np.arange(n_in)[None]) / width, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def _tensor(array: torch.Tensor | np.ndarray, shape: Shape, mode: Interpolation) -> torch.Tensor:
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode: expected 'linear' or 'nearest', got {mode!r}.")
    tensor = torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array
    if tuple(tensor.shape[tensor.ndim - len(shape) :]) != tuple(shape):
        raise ValueError(f"array: expected the last axes to be {tuple(shape)}, got shape {tuple(tensor.shape)}.")
    # Half precision would round the weights and so move the image.
    return tensor if mode == "nearest" or tensor.dtype == torch.float64 else tensor.float()


def _check_orientation(orientation: str | None) -> None:
    pairs = ("LR", "PA", "IS")
    if orientation is not None and (
        len(orientation) != 3 or any(sum(code in pair for code in orientation.upper()) != 1 for pair in pairs)
    ):
        raise ValueError(
            f"orientation: expected one of each of L/R, P/A and I/S, such as 'RAS', or None, got {orientation!r}."
        )
