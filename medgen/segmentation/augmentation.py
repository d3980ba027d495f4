"""Classical augmentation of a pair for a small segmenter, after the recipe of nnU-Net (Isensee et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    chance: float = 0.3


# What nnU-Net does, with turns and scales in every crop, since few scans are learned from.
CLASSICAL = Augmentation(
    rotation=30.0,
    scaling=0.25,
    brightness=0.15,
    contrast=0.3,
    blur=1.0,
    low_resolution=math.log(2),
    elastic=0.06,
)
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
