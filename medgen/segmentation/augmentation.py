"""Classical augmentation of a pair for a small segmenter, after the recipe of nnU-Net (Isensee et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

Pair = tuple[torch.Tensor, torch.Tensor]  # image (C, *spatial) float16 in [0, 1], label (*spatial) uint8


@dataclass(frozen=True)
class Augmentation:
    """How much a pair is changed at most; nothing is mirrored, since many labels tell left from right.

    Attributes:
        rotation: Turn about each axis, in degrees.
        scaling: Logarithm of the scale.
        shift: Move, in halves of the scan.
        elastic: Displacement of a smooth random field, in halves of the crop.
        gamma: Logarithm of the exponent of the intensities.
        brightness: Intensity that is added.
        contrast: Logarithm of the factor on the distance to the mean intensity.
        noise: Standard deviation of the noise.
        blur: Standard deviation of the Gaussian, in voxels.
        low_resolution: Logarithm of the factor by which the resolution is lowered and raised again.
        erasing: Chance that a class is painted out of the image and taken off the label. A segmenter that has seen this
            tells what is there by its look; others infer it from the place.
        chance: That brightness, contrast, blur, lower resolution or the elastic field is applied, each on its own.
    """

    rotation: float = 15.0
    scaling: float = 0.15
    shift: float = 0.1
    elastic: float = 0.0
    gamma: float = 0.3
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.05
    blur: float = 0.0
    low_resolution: float = 0.0
    erasing: float = 0.0
    chance: float = 0.3


# What nnU-Net does, by spatial dimensions. Slices are turned and scaled in every crop, since few are learned from;
# volumes, whose orientation and spacing are known, by half as much: with more a short training learns less.
_INTENSITIES = Augmentation(brightness=0.15, contrast=0.3, blur=1.0, low_resolution=math.log(2), elastic=0.06)
CLASSICAL = {2: replace(_INTENSITIES, rotation=30.0, scaling=0.25), 3: _INTENSITIES}
UNCHANGED = Augmentation(rotation=0.0, scaling=0.0, shift=0.0, gamma=0.0, noise=0.0, chance=0.0)


def augment(pair: Pair, augmentation: Augmentation, patch: tuple[int, ...], generator: torch.Generator) -> Pair:
    """A random crop, in 3D around a labelled voxel every other time, changed in shape and in intensities.

    Args:
        pair: Image and label.
        augmentation: How much to change.
        patch: Voxels of the crop along each axis.
        generator: Of all draws.

    Returns:
        Image ``(C, *patch)`` float32, about in [0, 1], and label ``(1, *patch)`` int64.
    """
    image, label = pair[0].float(), pair[1]
    grid = _crop(label, augmentation, patch, generator)
    image = F.grid_sample(image[None], grid, align_corners=False)[0]  # 0, the darkest value, outside
    label = F.grid_sample(label[None, None].float(), grid, mode="nearest", align_corners=False)[0].long()
    if augmentation.erasing and float(torch.rand((), generator=generator)) < augmentation.erasing:
        image, label = _erase(image, label, generator)
    return _change_intensities(image, augmentation, generator), label


def _uniform(bound: float, generator: torch.Generator, count: int = 1) -> torch.Tensor:
    return (torch.rand(count, generator=generator) * 2 - 1) * bound


def _crop(
    label: torch.Tensor, augmentation: Augmentation, patch: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    """Where each voxel of the crop is taken from, as grid_sample wants it."""
    dims, size, crop = label.ndim, torch.tensor(label.shape), torch.tensor(patch)
    skew = torch.zeros(dims, dims)
    angles = _uniform(math.radians(augmentation.rotation), generator, 3 if dims == 3 else 1)
    for angle, (i, j) in zip(angles, [(0, 1), (0, 2), (1, 2)], strict=False):
        skew[i, j], skew[j, i] = -angle, angle
    matrix = torch.linalg.matrix_exp(skew) * torch.exp(_uniform(augmentation.scaling, generator))
    center = _uniform(1.0, generator, dims) * (1 - crop / size).clamp(min=0)
    center += _uniform(augmentation.shift, generator, dims)
    on_label, which, elastic = torch.rand(3, generator=generator).tolist()
    if dims == 3 and on_label < 0.5 and len(inside := label.nonzero()):
        center = (2 * inside[int(which * len(inside))] + 1) / size - 1
    # From voxels to the units and the order of axes of grid_sample.
    affine = torch.cat([(matrix * crop / size[:, None]).flip(0, 1), center.flip(0)[:, None]], dim=1)[None]
    grid = F.affine_grid(affine, [1, 1, *patch], align_corners=False)
    if augmentation.elastic and elastic < augmentation.chance:
        knots = torch.randn((1, dims, *[4] * dims), generator=generator) * augmentation.elastic / 2
        mode = "bicubic" if dims == 2 else "trilinear"
        field = F.interpolate(knots, patch, mode=mode, align_corners=True)
        grid = grid + field.movedim(1, -1) * (crop / size).flip(0)
    return grid


def _erase(image: torch.Tensor, label: torch.Tensor, generator: torch.Generator) -> Pair:
    """One class painted over with what surrounds it and with the grain of another place, and taken off the label."""
    shown = [value for value in label.unique().tolist() if value]
    if not shown:
        return image, label
    which, wide, *places = torch.rand(2 + label.ndim - 1, generator=generator).tolist()
    inside = label == shown[int(which * len(shown))]
    pool = F.max_pool2d if label.ndim == 3 else F.max_pool3d
    # Its rim is half of it; that of the other classes is theirs.
    rim = pool(inside.float(), 3, 1, 1) > 0 if wide < 0.5 else inside
    painted = rim & ((label == 0) | inside)
    surroundings = _fill_in(image, ~painted)
    grain = (image - _smooth(image, 1.0)).roll(
        [int(place * n) for place, n in zip(places, label.shape[1:], strict=True)], list(range(1, label.ndim))
    )
    return torch.where(painted, surroundings + grain, image), torch.where(inside, 0, label)


def _fill_in(image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """What is not known, by means of ever larger blocks of what is."""
    if min(image.shape[1:]) < 2 or known.all() or not known.any():
        return torch.where(known, image, (image * known).sum() / known.sum().clamp(min=1))
    pool, mode = (F.avg_pool2d, "bilinear") if image.ndim == 3 else (F.avg_pool3d, "trilinear")
    share = pool(known.float(), 2, ceil_mode=True)
    coarse = pool(torch.where(known, image, 0.0), 2, ceil_mode=True) / share.clamp(min=1e-6)
    filled = _fill_in(coarse, share > 0)
    return torch.where(known, image, F.interpolate(filled[None], image.shape[1:], mode=mode)[0])


def _change_intensities(image: torch.Tensor, augmentation: Augmentation, generator: torch.Generator) -> torch.Tensor:
    blurred, coarse, brighter, contrasted = (torch.rand(4, generator=generator) < augmentation.chance).tolist()
    if augmentation.blur and blurred:
        sigma = float(torch.rand((), generator=generator)) * augmentation.blur
        image = _smooth(image, max(sigma, 1e-3))
    if augmentation.low_resolution and coarse:
        factor = math.exp(-float(torch.rand((), generator=generator)) * augmentation.low_resolution)
        shape = image.shape[1:]
        small = F.interpolate(image[None], [max(2, round(n * factor)) for n in shape], mode="nearest-exact")
        image = F.interpolate(small, shape, mode="bilinear" if len(shape) == 2 else "trilinear")[0]
    if augmentation.contrast and contrasted:
        mean = image.mean()
        image = mean + (image - mean) * torch.exp(_uniform(augmentation.contrast, generator))
    if augmentation.brightness and brighter:
        image = image + _uniform(augmentation.brightness, generator)
    image = image.clamp(0, 1) ** torch.exp(_uniform(augmentation.gamma, generator))
    return image + torch.randn(image.shape, generator=generator) * _uniform(augmentation.noise, generator)


def _smooth(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian along every axis, the border repeated."""
    dims = image.ndim - 1
    reach = max(1, math.ceil(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights = weights / weights.sum()
    convolve, channels = (F.conv2d if dims == 2 else F.conv3d), len(image)
    for axis in range(dims):
        shape = [1] * dims
        shape[axis] = len(weights)
        padding = [0] * (2 * dims)
        padding[2 * (dims - 1 - axis) : 2 * (dims - axis)] = [reach, reach]
        padded = F.pad(image[None], padding, mode="replicate")
        image = convolve(padded, weights.reshape(1, 1, *shape).expand(channels, 1, *shape), groups=channels)[0]
    return image
