"""Scans of any unit as signals from 0 (none) to 1 (bright), and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import convert_to_dst_type, convert_to_tensor

from medgen.transforms.carriers import unwrap
from medgen.types import BadInputError, Spacing

# Brightest voxels above this percentile (vessels, implants, hot pixels) do not set the scale.
_BRIGHT = 99.5

Image = Any
"""A numpy array, a tensor, a MetaTensor or an image of TorchIO, ``(C, H, W[, D])``."""


def on_signal(
    image: Image, change: Callable[[torch.Tensor, Spacing], torch.Tensor], *, together: bool = False
) -> Image:
    """Change a scan as a signal, and bring it back to its own units.

    Zero signal is the intensity 0, or the lowest intensity where some are negative (CT: air); signal 1 is the
    99.5th percentile of the scan.

    Args:
        image: ``(C, H, W[, D])`` of any unit, finite.
        change: Takes and gives a signal ``(C, H, W[, D])`` float32; it also gets the edge lengths of a voxel, in units
            of the shortest: from the affine of a MetaTensor, else all 1.
        together: Scale all channels alike, as colors need it; else each by itself.

    Returns:
        What came in, changed: the same type, with affine and metadata; integers become float32.

    Raises:
        BadInputError: If the image has another number of axes, is not finite, has a channel without any signal, or is a
            file that was not loaded.
    """
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        carried = unwrap(image, "image")
        changed = on_signal(MetaTensor(carried.array, affine=carried.affine), change, together=together)
        return type(image)(tensor=changed.as_tensor(), affine=carried.affine)
    values = convert_to_tensor(image, track_meta=False)
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise BadInputError(
            f"image: expected (C, H, W) or (C, H, W, D), got {tuple(values.shape)}. Put the channels first."
        )
    dtype = values.dtype if values.is_floating_point() else torch.float32
    zero, scale = _range(values, together)
    changed = change((values.float() - zero) / scale, _relative_spacing(image, values.ndim - 1))
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


def _relative_spacing(image: Image, spatial_dims: int) -> Spacing:
    if not isinstance(image, MetaTensor):
        return (1.0,) * spatial_dims
    edges = np.linalg.norm(np.asarray(image.affine, dtype=np.float64)[:3, :spatial_dims], axis=0)
    return tuple(float(edge) for edge in edges / edges.min())
