"""Edges as a condition: extracted from any scan, or the user's own; in 3D along all three axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from scipy import ndimage

from medgen.types import BadInputError, Shape, Spacing

EdgeMethod = Literal["canny", "sobel", "laplacian"]
# Ratio of one scale of the soft methods to the next: two a doubling.
_SCALE_STEP = math.sqrt(2)
# Intensity differences below this share of the intensities are rounding; gradients are on a range of 1.
_ROUNDING = 1e-5
# Where gray begins in a map of outlines, how far around it counts as an area, and how much of that is too much.
_GRAY, _REACH, _MOST_GRAY = 0.05, 2, 0.25


@dataclass(frozen=True)
class EdgeSettings:
    """How edges are extracted.

    ``canny`` gives outlines one voxel thick, 0 or 1 (Canny 1986). ``sobel`` gives smooth, thick edges: the gradient
    magnitude of Sobel's kernel, averaged over scales. ``laplacian`` gives thin edges of the same strength: only
    where the Laplacian of a Gaussian (Marr and Hildreth 1980), averaged over the same scales, changes sign.

    `low` and `high` are shares of all the edge strength in a scan: at ``low=0.2`` the voxels below the threshold hold
    20 % of the sum of strengths. Such a threshold knows no intensity units, and neither flat background nor a few very
    strong edges (a marker, a collimator) move it much, as they would a quantile of voxels or a share of the maximum.

    Attributes:
        method: `canny`, `sobel` or `laplacian`.
        smoothing: Sigma of the Gaussian in voxels, positive; of the finest scale for the soft methods. Larger keeps
            coarser outlines and less noise.
        low: In (0, high). `canny`: weaker voxels are no edge. Soft methods: strength that becomes 0.
        high: In (low, 1). `canny`: an edge needs at least one voxel this strong. Soft methods: strength that becomes 1.
        scales: Number of scales of the soft methods, each 1.41 times as coarse as the one before; unused by `canny`.
    """

    method: EdgeMethod = "canny"
    smoothing: float = 1.5
    low: float = 0.2
    high: float = 0.6
    scales: int = 3

    def __post_init__(self) -> None:
        """Refuse settings that no scan can satisfy.

        Raises:
            BadInputError: If the method is unknown or a number lies outside its range.
        """
        if self.method not in get_args(EdgeMethod):
            raise BadInputError(f"edge method: expected canny, sobel or laplacian, got {self.method!r}.")
        if not (math.isfinite(self.smoothing) and self.smoothing > 0):
            raise BadInputError(
                f"edge smoothing: expected a positive sigma in voxels, got {self.smoothing}. Pass for example 1.5."
            )
        if not 0 < self.low < self.high < 1:
            raise BadInputError(
                f"edge thresholds: expected 0 < low < high < 1, got low {self.low}, high {self.high}. "
                "Pass for example low 0.2, high 0.6."
            )
        if self.scales < 1:
            raise BadInputError(f"edge scales: expected at least 1, got {self.scales}. Pass for example 3.")


def extract_edges(
    image: torch.Tensor, settings: EdgeSettings, *, valid: torch.Tensor | None = None, spacing: Spacing | None = None
) -> torch.Tensor:
    """Edges of one scan; the same for any affine change of its intensities.

    Of several channels the strongest counts at each voxel. What lies outside the field of view makes no edge: it is
    filled from the nearest voxel inside. An image without any contrast has no edges.

    Args:
        image: ``(C, H, W[, D])``, finite inside `valid`, any intensities.
        settings: Method, smoothing and thresholds.
        valid: ``(H, W[, D])`` bool, True inside the field of view; None means everywhere.
        spacing: Voxel edge lengths in mm, in array order. Smoothing is then in finest voxels and gradients are per mm,
            so that thick slices are neither blurred into each other nor outlined. None takes cubic voxels.

    Returns:
        ``(1, H, W[, D])`` float32 in [0, 1], 0 outside `valid`, on the CPU.

    Raises:
        BadInputError: If image, valid or spacing differ in shape, or an intensity inside `valid` is not finite.
    """
    if image.ndim not in (3, 4) or image.numel() == 0 or image.is_complex():
        raise BadInputError(
            f"image: expected one scan of shape (C, H, W[, D]), got {tuple(image.shape)}, {image.dtype}. "
            "Pass the scans of a batch one by one."
        )
    shape = tuple(image.shape[1:])
    if valid is not None and tuple(valid.shape) != shape:
        raise BadInputError(
            f"valid: expected the image's shape {shape}, got {tuple(valid.shape)}. Pass one field of view per scan."
        )
    inside = np.ones(shape, dtype=bool) if valid is None else valid.detach().cpu().bool().numpy()
    steps = _relative_steps(spacing, len(shape))
    channels = _unit_range(image.detach().cpu().double().numpy(), inside)
    if channels is None:
        return torch.zeros(1, *shape)
    if settings.method == "canny":
        edge = _canny(channels, inside, steps, settings)
    else:
        sigmas = [settings.smoothing * _SCALE_STEP**index for index in range(settings.scales)]
        response = np.zeros(shape)
        for channel in channels:
            strength = _gradient_strength(channel, sigmas, steps) * inside
            if settings.method == "laplacian":
                strength *= _crossing_share(channel, sigmas, steps, inside)
            np.maximum(response, strength, out=response)
        low, high = _thresholds(response, settings)
        edge = np.clip((response - low) / (high - low), 0, 1)
    return torch.from_numpy(edge.astype(np.float32))[None]


def from_whole_numbers(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Edge strength of a map that is stored as whole numbers.

    Args:
        values: Of any shape, from 0 to the largest number of so many bits, which stands for 1.
        bits: Of each number, such as 8.

    Returns:
        The same shape, in [0, 1].

    Raises:
        BadInputError: If some are not 0, but all so small that nothing would show, as where 1 was meant to be an edge.
    """
    whole, largest = 2**bits - 1, float(values.max())
    if 0 < largest <= _GRAY * whole:
        raise BadInputError(
            f"edge map: expected values from 0 to {whole} in a file of {bits} bits, got none above {largest:g}, which "
            f"would show no edges. Multiply the map by {int(whole // largest)}."
        )
    return values / whole


def check_edges(edge: torch.Tensor, shape: Shape) -> None:
    """Refuse an edge map that does not fit.

    Args:
        edge: ``(1, H, W[, D])`` in [0, 1].
        shape: ``(H, W[, D])`` of the scan that it is to steer.

    Raises:
        BadInputError: If the size differs, or a value is NaN or outside [0, 1].
    """
    if tuple(edge.shape) != (1, *shape):
        raise BadInputError(
            f"edge map: expected shape {(1, *shape)}, got {tuple(edge.shape)}. "
            "Resample the edge map to the size of the scan, with one channel."
        )
    if torch.isnan(edge).any():
        raise BadInputError("edge map: expected values from 0 to 1, got NaN. Put 0 where there is no edge.")
    low, high = torch.stack(edge.aminmax()).tolist()
    if low < 0 or high > 1:
        raise BadInputError(
            f"edge map: expected values from 0 to 1, got {low:g} to {high:g}. Divide an 8-bit map by 255; "
            "if this is a scan, let medgen extract its edges."
        )


def check_outlines(edge: torch.Tensor) -> None:
    """Refuse a map that is none of outlines, 0 or 1, as `canny` gives them: such as a scan that was given by mistake.

    Gray values alone do not tell, because resizing, smoothing and lossy files leave them along every outline; gray
    areas do. A voxel lies in one if it and all voxels up to 2 around have values between 0.05 and 0.95. A map is
    refused if more than a quarter of its voxels above 0.05 lie in gray areas. Measured on MR, X-rays and micrographs:
    of scans more than half of them do, in a wide black surround a quarter; of outlines that were resized by 1/4 to 4 or
    stored as JPEG less than a quarter, of outlines as they are none. A scan that is nearly black may pass.

    Args:
        edge: ``(1, H, W[, D])`` in [0, 1].

    Raises:
        BadInputError: If it has gray areas.
    """
    values = edge.detach().cpu().float().numpy()[0]
    shown = values > _GRAY
    areas = ndimage.minimum_filter(shown & (values < 1 - _GRAY), size=2 * _REACH + 1, mode="nearest")
    share = areas.sum() / max(shown.sum(), 1)
    if share > _MOST_GRAY:
        raise BadInputError(
            "edge map: expected outlines of 0 and 1, as the model was trained on, got gray areas "
            f"({share:.0%} of what is not black). If this is a scan, give it as one, with --edges in place of "
            "--edge_maps, and medgen extracts its edges; else set the map to 0 and 1 by a threshold."
        )


def edge_channels(edge: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """What a network reads: strength and presence, so that "no edges here" differs from "no edge map".

    Args:
        edge: ``(B, 1, H, W[, D])`` in [0, 1]; rows of absent samples may hold anything.
        present: ``(B,)`` bool, True where the sample has an edge map; None means every one.

    Returns:
        ``(B, 2, H, W[, D])`` of the type and device of `edge`: strength, and 1 everywhere; both 0 where absent.

    Raises:
        BadInputError: If the edges have another number of channels, or `present` another length.
    """
    if edge.ndim not in (4, 5) or edge.shape[1] != 1:
        raise BadInputError(f"edge: expected shape (B, 1, H, W[, D]), got {tuple(edge.shape)}. Stack the maps.")
    channels = torch.cat([edge, torch.ones_like(edge)], dim=1)
    if present is None:
        return channels
    if present.shape != edge.shape[:1]:
        raise BadInputError(
            f"present: expected shape ({edge.shape[0]},), got {tuple(present.shape)}. Pass one bool per sample."
        )
    rows = present.to(device=edge.device, dtype=torch.bool).view(-1, *[1] * (edge.ndim - 1))
    return torch.where(rows, channels, torch.zeros_like(channels))


def boundary_f_score(predicted: torch.Tensor, target: torch.Tensor, tolerance: float = 2.0) -> float:
    """Agreement of two edge maps: harmonic mean of boundary precision and recall.

    After Martin, Fowlkes and Malik 2004 (doi:10.1109/TPAMI.2004.1273918, section 3), with distance transforms in place
    of their one-to-one matching: precision is the share of predicted edge voxels within `tolerance` of a target one,
    recall the share of target edge voxels within `tolerance` of a predicted one.

    Args:
        predicted: ``(H, W[, D])`` bool, or 0 and 1.
        target: ``(H, W[, D])`` bool, or 0 and 1.
        tolerance: Largest distance between voxel centres that counts as a match, in voxels.

    Returns:
        In [0, 1]; 1 where both maps are empty, 0 where one is.

    Raises:
        BadInputError: If the shapes differ, a map is not binary, or the tolerance is negative.
    """
    if predicted.shape != target.shape or predicted.ndim not in (2, 3):
        raise BadInputError(
            f"edge maps: expected one shape (H, W[, D]), got {tuple(predicted.shape)} and {tuple(target.shape)}. "
            "Drop the channel axis."
        )
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise BadInputError(f"tolerance: expected voxels from 0 on, got {tolerance}. Pass for example 2.0.")
    first, second = _binary(predicted, "predicted"), _binary(target, "target")
    if not first.any() or not second.any():
        return float(first.any() == second.any())
    precision = float((ndimage.distance_transform_edt(~second)[first] <= tolerance).mean())
    recall = float((ndimage.distance_transform_edt(~first)[second] <= tolerance).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _binary(edge: torch.Tensor, name: str) -> np.ndarray:
    found = edge.detach().cpu() > 0
    if not torch.equal(found.to(edge.dtype), edge.detach().cpu()):
        raise BadInputError(f"{name} edges: expected only 0 and 1, got other values. Threshold the map first.")
    return np.asarray(found.numpy())


def _relative_steps(spacing: Spacing | None, dims: int) -> np.ndarray:
    """Finest voxel edge over each voxel edge: 1 for cubic voxels, small along thick slices."""
    edges = np.ones(dims) if spacing is None else np.asarray(spacing, dtype=np.float64)
    if edges.shape != (dims,) or not (np.isfinite(edges) & (edges > 0)).all():
        raise BadInputError(
            f"spacing: expected {dims} positive lengths in mm, got {spacing}. Pass one length per image axis."
        )
    return edges.min() / edges


def _unit_range(image: np.ndarray, inside: np.ndarray) -> np.ndarray | None:
    """Channels that start at 0, the widest of them reaching 1, filled outside; None where all are constant."""
    values = image[:, inside]
    if not np.isfinite(values).all():
        raise BadInputError("image: expected finite intensities, got NaN or infinity. Repair the scan.")
    if not values.size:
        return None
    extent = float(np.ptp(values, axis=1).max())
    if extent <= _ROUNDING * float(np.abs(values).max()):
        return None
    if not inside.all():
        nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
        image = image[(slice(None), *nearest)]
    lowest = values.min(axis=1).reshape(-1, *[1] * inside.ndim)
    return np.asarray((image - lowest) / extent)


def _smooth(channel: np.ndarray, sigma: float, steps: np.ndarray) -> np.ndarray:
    """Gaussian smoothing, with one voxel more on each side for the derivatives that follow."""
    return np.asarray(ndimage.gaussian_filter(np.pad(channel, 1, mode="edge"), sigma * steps, mode="nearest"))


def _gradient(channel: np.ndarray, sigma: float, steps: np.ndarray) -> np.ndarray:
    """Sobel gradient ``(axes, *spatial)`` per finest voxel edge, after Gaussian smoothing."""
    smooth, parts = _smooth(channel, sigma, steps), []
    for axis, step in enumerate(steps):
        part = ndimage.correlate1d(smooth, np.array([-0.5, 0, 0.5]) * step, axis=axis)
        for other, width in enumerate(steps):
            if other != axis:
                # Sobel's (1, 2, 1) / 4, narrowed so that it has the same variance per length along thick slices.
                side = width**2 / 4
                part = ndimage.correlate1d(part, np.array([side, 1 - 2 * side, side]), axis=other)
        parts.append(part[(slice(1, -1),) * channel.ndim])
    return np.stack(parts)


def _gradient_strength(channel: np.ndarray, sigmas: list[float], steps: np.ndarray) -> np.ndarray:
    """Mean over scales of sigma |grad|, which is the same for a step edge at every scale (Lindeberg 1998)."""
    return np.mean([sigma * np.linalg.norm(_gradient(channel, sigma, steps), axis=0) for sigma in sigmas], axis=0)


def _crossing_share(channel: np.ndarray, sigmas: list[float], steps: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Each voxel's share, 0 to 1, of a sign change of the mean over scales of sigma^2 Laplacian.

    Between values -a and b the crossing lies a / (a + b) from the first, whose share is therefore b / (a + b).
    """
    laplacian = np.zeros(channel.shape)
    for sigma in sigmas:
        smooth = _smooth(channel, sigma, steps)
        for axis, step in enumerate(steps):
            part = ndimage.correlate1d(smooth, np.array([1, -2, 1]) * (sigma * step) ** 2, axis=axis)
            laplacian += part[(slice(1, -1),) * channel.ndim]
    share = np.zeros_like(laplacian)
    for axis in range(channel.ndim):
        # Views with this axis first: what is written to the second is written to the shares.
        value, result, within = (np.moveaxis(array, axis, 0) for array in (laplacian, share, inside))
        before, after = value[:-1], value[1:]
        jump = np.abs(after - before)
        crossing = ((before >= 0) != (after >= 0)) & (jump > _ROUNDING) & within[:-1] & within[1:]
        jump[~crossing] = 1
        np.maximum(result[:-1], crossing * np.abs(after) / jump, out=result[:-1])
        np.maximum(result[1:], crossing * np.abs(before) / jump, out=result[1:])
    return share


def _thresholds(strength: np.ndarray, settings: EdgeSettings) -> tuple[float, float]:
    """Strengths below which the shares `low` and `high` of all strength lie."""
    ordered = np.sort(strength, axis=None)
    total = np.cumsum(ordered, dtype=np.float64)
    at = np.searchsorted(total, np.array([settings.low, settings.high]) * total[-1])
    low, high = ordered[at].tolist()
    high = max(high, _ROUNDING)
    # Where all edges are equally strong, all of them are full.
    return min(low, high * (1 - _ROUNDING)), high


def _canny(channels: np.ndarray, inside: np.ndarray, steps: np.ndarray, settings: EdgeSettings) -> np.ndarray:
    """Ridges of the gradient magnitude that are strong somewhere, as bool."""
    gradient, magnitude = np.zeros((inside.ndim, *inside.shape)), np.zeros(inside.shape)
    for channel in channels:
        found = _gradient(channel, settings.smoothing, steps)
        length = np.linalg.norm(found, axis=0) * inside
        gradient, magnitude = np.where(length > magnitude, found, gradient), np.maximum(length, magnitude)
    low, high = _thresholds(magnitude, settings)
    candidates = magnitude >= max(low, _ROUNDING)
    own, places = magnitude[candidates], np.argwhere(candidates).T
    # One voxel along the gradient, which points to the brighter side.
    offset = gradient[:, candidates] * steps[:, None]
    offset /= np.linalg.norm(offset, axis=0)
    brighter = ndimage.map_coordinates(magnitude, places + offset, order=1, mode="grid-constant")
    darker = ndimage.map_coordinates(magnitude, places - offset, order=1, mode="grid-constant")
    # Of two equal neighbors the brighter one is the edge: one voxel, whatever the rounding.
    ridge = np.zeros(magnitude.shape, dtype=bool)
    ridge[candidates] = (own > brighter * (1 + _ROUNDING)) & (own >= darker * (1 - _ROUNDING))
    pieces, count = ndimage.label(ridge, ndimage.generate_binary_structure(ridge.ndim, ridge.ndim))
    kept = np.zeros(count + 1, dtype=bool)
    kept[pieces[ridge & (magnitude >= high)]] = True
    return kept[pieces]
