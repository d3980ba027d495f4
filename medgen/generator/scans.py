"""Scans in memory as a generator takes them, and back: geometry, labels, units and number types."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import orientation_ras_lps, to_affine_nd
from monai.utils import convert_to_dst_type, convert_to_tensor
from nibabel import orientations

from medgen.generator.config import GeneratorConfig
from medgen.types import BadInputError, Grid, Shape

# Share of the model's window below which a scan cannot be in the units of the window: [0, 1] is 0.4 % of 0 to 255,
# a z-score about 2 % of 400 HU; the darkest fluorescence pictures fill 8 %.
_LEAST_OF_WINDOW = 0.05
_SAME_PLACE_MM = 0.01


def affine_of(scan: Any) -> np.ndarray | None:
    """What a scan says about where its voxels lie.

    Args:
        scan: ``(C, H, W[, D])`` tensor, MetaTensor or array.

    Returns:
        ``(4, 4)`` float64, voxel index to RAS mm; None where it says nothing: no MetaTensor, or one with the identity
        that MONAI gives where a file has no affine.
    """
    if not isinstance(scan, MetaTensor):
        return None
    affine = to_affine_nd(3, np.asarray(scan.affine.cpu(), dtype=np.float64))
    if scan.meta.get("space") == "LPS":
        affine = orientation_ras_lps(affine)
    return affine if "original_affine" in scan.meta or not np.array_equal(affine, np.eye(4)) else None


def check_place(scan: Any, other: Any, name: str) -> None:
    """Refuse what does not lie where its scan lies.

    Args:
        scan: The scan.
        other: Its label map or partner, on as many voxels.
        name: What that is, for messages.

    Raises:
        BadInputError: If both say where they lie and differ.
    """
    affine, second = affine_of(scan), affine_of(other)
    if affine is not None and second is not None and not np.allclose(affine, second, rtol=0, atol=_SAME_PLACE_MM):
        raise BadInputError(
            f"{name}: expected the affine of the scan, got another, so that its voxels lie elsewhere. Give both keys "
            "to the same spatial transforms."
        )


def grid_of(image: Any, config: GeneratorConfig) -> Grid:
    """Where the voxels of a scan lie.

    What does not say (:func:`affine_of`) is taken to lie on the model's own grid: its axes in the model's orientation,
    its voxels of the model's size.

    Args:
        image: ``(C, H, W[, D])`` tensor, MetaTensor or array.
        config: Of the model.

    Returns:
        The grid.

    Raises:
        BadInputError: If it is no scan of the model's dimension.
    """
    shape = tuple(image.shape[1:])
    if len(shape) != config.spatial_dims:
        axes = "(C, H, W)" if config.spatial_dims == 2 else "(C, H, W, D)"
        raise BadInputError(
            f"image: expected {axes} for the {config.spatial_dims}D model '{config.name}', got shape "
            f"{tuple(image.shape)}. Choose another model, or put the channels first (EnsureChannelFirst)."
        )
    own = affine_of(image)
    if own is not None:
        return Grid(shape, own)
    affine = np.eye(4)
    if config.orientation is not None and len(shape) == 3:
        affine = np.linalg.inv(orientations.inv_ornt_aff(orientations.axcodes2ornt(config.orientation), shape))
    if config.spacing is None:
        return Grid(shape, affine, known=False)
    affine[:3, : len(shape)] *= np.asarray(config.spacing)
    return Grid(shape, affine)


def read_label(label: Any, shape: Shape, *, name: str = "label") -> torch.Tensor:
    """Values of a label map.

    Args:
        label: ``(1, H, W[, D])`` tensor or array of any number type.
        shape: ``(H, W[, D])`` of its scan.
        name: Of it, for messages.

    Returns:
        ``(H, W[, D])`` int64 on the CPU.

    Raises:
        BadInputError: If it has another shape, or a value that is not a whole number.
    """
    tensor = convert_to_tensor(label, track_meta=False).detach().cpu()
    if tuple(tensor.shape) != (1, *shape):
        raise BadInputError(
            f"{name}: expected one channel of class values, {(1, *shape)}, got {tuple(tensor.shape)}. Give the label "
            "map before it is one-hot, on the voxels of the scan."
        )
    whole = tensor[0].long()
    if tensor.is_floating_point() and not torch.equal(whole.to(tensor.dtype), tensor[0]):
        raise BadInputError(
            f"{name}: expected whole numbers, got others. Resample label maps by nearest neighbor (mode='nearest')."
        )
    return whole


def read_image(image: Any, config: GeneratorConfig, scaled_window: tuple[float, float] | None = None) -> torch.Tensor:
    """Intensities as the generator's own normalization takes them.

    Args:
        image: ``(C, H, W[, D])`` tensor or array of any number type.
        config: Of the model.
        scaled_window: What stands for the ends of the model's window, where intensities have been scaled; None is the
            window itself.

    Returns:
        The same on the CPU, in the units of the window where the model has one; integers or float32 or float64.

    Raises:
        BadInputError: If it cannot be in those units.
    """
    tensor = convert_to_tensor(image, track_meta=False).detach().cpu()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    window = config.normalization
    if window.method != "window":
        if scaled_window is not None:
            raise BadInputError(
                f"scaled_window: expected none, because the model '{config.name}' normalizes each scan by itself, in "
                f"whatever units, got {scaled_window}. Leave it out."
            )
        return tensor
    if scaled_window is not None:
        low, high = scaled_window
        return (tensor.double() - low) / (high - low) * (window.high - window.low) + window.low
    extent = float(tensor.max()) - float(tensor.min())
    if 0 < extent < _LEAST_OF_WINDOW * (window.high - window.low):
        raise BadInputError(
            f"image: expected the units of the model's window {window.low:g} to {window.high:g}, got a scan that "
            f"covers {extent:g} of it. If its intensities have been scaled, say what the ends of the window have "
            "become, such as scaled_window=(0, 1); or put this transform before the scaling."
        )
    return tensor


def give_back(made: torch.Tensor, like: Any, config: GeneratorConfig, scaled_window: tuple[float, float] | None) -> Any:
    """What was made, as the scan that it was made from.

    Args:
        made: ``(C, H, W[, D])`` in the units of :func:`read_image`.
        like: The scan.
        config: Of the model.
        scaled_window: As for :func:`read_image`.

    Returns:
        ``made`` in the units of the scan, of its kind and number type, with its affine and on its device.
    """
    if scaled_window is not None:
        low, high = scaled_window
        window = config.normalization
        made = (made.double() - window.low) / (window.high - window.low) * (high - low) + low
    return cast_like(made, like)


def cast_like(values: torch.Tensor, like: Any) -> Any:
    """Intensities in the kind of a scan, to the nearest that it can hold.

    Args:
        values: ``(C, H, W[, D])`` in the units of the scan.
        like: The scan: tensor, MetaTensor or array.

    Returns:
        The values in its kind and number type, with its affine and on its device.
    """
    kind = like.dtype if isinstance(like, torch.Tensor) else np.asarray(like).dtype
    inexact = kind.is_floating_point if isinstance(kind, torch.dtype) else np.issubdtype(kind, np.inexact)
    if not inexact and values.is_floating_point():
        limits = torch.iinfo(kind) if isinstance(kind, torch.dtype) else np.iinfo(kind)
        values = values.round().clamp(limits.min, limits.max)
    return convert_to_dst_type(values, like)[0]
