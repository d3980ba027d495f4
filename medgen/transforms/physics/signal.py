"""Scans of any unit as signals from 0 (none) to 1 (bright), and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import convert_to_dst_type, convert_to_tensor

from medgen.data.geometry import SPACING_TOLERANCE
from medgen.transforms.carriers import read_shape
from medgen.transforms.subjects import close_sample, open_sample
from medgen.types import BadInputError, Spacing

# Brightest voxels above this percentile (vessels, implants, hot pixels) do not set the scale.
_BRIGHT = 99.5

Image = Any
"""A numpy array, a tensor, a MetaTensor or an image of TorchIO, ``(C, H, W[, D])``."""


@dataclass(frozen=True)
class Frame:
    """How the axes of an array lie in the body, as far as an affine tells; axes are counted without the channels.

    Attributes:
        spacing: Edge lengths of a voxel, in units of the shortest; all 1 where nothing is known.
        upright: Axis closest to superior-inferior, along the bore of a scanner; the last where nothing is known.
        thick: Axis of the largest spacing, where one is larger than all others: that of the slices; else `upright`.
    """

    spacing: Spacing
    upright: int
    thick: int


def on_signal(image: Image, change: Callable[[torch.Tensor, Frame], torch.Tensor], *, together: bool = False) -> Image:
    """Change a scan as a signal, and bring it back to its own units.

    Zero signal is the intensity 0, or the lowest intensity where some are negative (CT: air); signal 1 is the
    99.5th percentile of the scan.

    Args:
        image: ``(C, H, W[, D])`` of any unit, finite.
        change: Takes and gives a signal ``(C, H, W[, D])`` float32; it also gets what the affine of a MetaTensor or an
            image of TorchIO tells about its axes.
        together: Scale all channels alike, as colors need it; else each by itself.

    Returns:
        What came in, changed: the same type, with affine and metadata; integers become float32.

    Raises:
        BadInputError: If the image has another number of axes, is not finite, has a channel without any signal, or is a
            file that was not loaded.
    """
    read_shape(image, "image")
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        opened = open_sample({"image": image}, ["image"])
        return close_sample({"image": on_signal(opened["image"], change, together=together)}, {"image": image})["image"]
    values = convert_to_tensor(image, track_meta=False)
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise BadInputError(
            f"image: expected (C, H, W) or (C, H, W, D), got {tuple(values.shape)}. Put the channels first."
        )
    dtype = values.dtype if values.is_floating_point() else torch.float32
    zero, scale = _range(values, together)
    changed = change((values.float() - zero) / scale, _frame(image, values.ndim - 1))
    # MONAI's transforms may have made a MetaTensor of it, with a place of its own.
    changed = convert_to_tensor(changed, track_meta=False)
    result = (changed * scale + zero).to(dtype)
    return convert_to_dst_type(result, dst=image, dtype=dtype)[0]


def _range(image: torch.Tensor, together: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Intensity of zero signal, and intensity per signal, each ``(C, 1, 1[, 1])`` float32."""
    rows = image.detach().cpu().reshape(1 if together else image.shape[0], -1).float().numpy()
    if not np.isfinite(rows).all():
        raise BadInputError("image: expected finite intensities, got NaN or infinity. Repair the scan.")
    zero = np.minimum(rows.min(axis=1), 0)
    scale = np.percentile(rows, _BRIGHT, axis=1) - zero
    if not (scale > 0).all():
        channel = int(np.argmin(scale > 0))
        raise BadInputError(
            f"image: expected intensities above zero signal, got channel {channel} with "
            f"{rows[channel].min():g} to {rows[channel].max():g} and none at the {_BRIGHT} % percentile. Corrupt whole "
            "scans, before they are cropped into patches, and leave empty channels out."
        )
    shape = (image.shape[0],) + (1,) * (image.ndim - 1)
    low, width = (torch.as_tensor(value, dtype=torch.float32, device=image.device) for value in (zero, scale))
    return low.expand(shape[0]).view(shape), width.expand(shape[0]).view(shape)


def _frame(image: Image, spatial_dims: int) -> Frame:
    if not isinstance(image, MetaTensor):
        return Frame((1.0,) * spatial_dims, spatial_dims - 1, spatial_dims - 1)
    columns = np.asarray(image.affine.cpu(), dtype=np.float64)[:3, :spatial_dims]
    edges = np.linalg.norm(columns, axis=0)
    # The third row leads up, in RAS as in LPS. Rounded, so that the later of two axes that lie alike is taken.
    rise = (np.abs(columns[2]) / edges).round(3)
    upright = max(range(spatial_dims), key=lambda axis: (rise[axis], axis))
    *_, second, most = np.sort(edges)
    thick = int(np.argmax(edges)) if second < most * (1 - SPACING_TOLERANCE) else upright
    return Frame(tuple(float(edge) for edge in edges / edges.min()), upright, thick)
