"""What dyes and picture files do: stain of histology, and lossy compression."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from skimage.color import hed_from_rgb, rgb_from_hed

# Light that is taken for none: its optical density ends here.
_DARKEST = 1 / 255


def stain(signal: torch.Tensor, strength: float, rng: np.random.RandomState) -> torch.Tensor:
    """Another laboratory's stain (Tellez et al., IEEE TMI 2018): each dye's density d becomes (1 + a) d + b.

    Densities of hematoxylin, eosin and DAB by color deconvolution (Ruifrok & Johnston 2001, scikit-image's matrix).

    Args:
        signal: ``(3, H, W[, D])`` red, green, blue of transmitted light; 1 is white.
        strength: Largest absolute value of the a; that of the b is a tenth of it.
        rng: Source of the draws.

    Returns:
        ``(3, H, W[, D])``.
    """
    factors, shifts = (rng.uniform(-1, 1, 3) for _ in range(2))
    factors, shifts = (1 + strength * factors / np.abs(factors).max()), 0.1 * strength * shifts
    light = signal.clamp(min=_DARKEST)
    density = -light.log().flatten(1).T.double()
    dyes = density @ torch.from_numpy(hed_from_rgb).to(density)
    dyes = dyes * torch.from_numpy(factors).to(dyes) + torch.from_numpy(shifts).to(dyes)
    changed = (-(dyes @ torch.from_numpy(rgb_from_hed).to(dyes))).exp().clamp(max=1)
    return changed.T.view(signal.shape).to(signal)


def compression(signal: torch.Tensor, quality: int, *, color: bool, axis: int = -1) -> torch.Tensor:
    """JPEG in 8 bits and back, each slice for itself (Pillow).

    Args:
        signal: ``(C, H, W[, D])``; 0 to 1 becomes 0 to 255, and what is brighter stays as far above 1.
        quality: 1 to 95, that of the Independent JPEG Group.
        color: Whether the three channels are red, green and blue; else each is a gray picture.
        axis: Array axis that the slices of a volume lie across, counted without the channels (-1: the last).

    Returns:
        ``(C, H, W[, D])``.
    """
    shown = signal.clamp(0, 1)
    levels = (shown * 255).round().byte().cpu().numpy()
    volume = levels[..., None] if levels.ndim == 3 else np.moveaxis(levels, axis % 3 + 1, -1)
    pictures = [volume.transpose(1, 2, 0, 3)] if color else list(volume)
    done = [
        np.stack([_jpeg(picture[..., index], quality) for index in range(picture.shape[-1])], axis=-1)
        for picture in pictures
    ]
    result = done[0].transpose(2, 0, 1, 3) if color else np.stack(done)
    result = result[..., 0] if levels.ndim == 3 else np.moveaxis(result, -1, axis % 3 + 1)
    return torch.from_numpy(result).to(signal) / 255 + (signal - shown)


def _jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file))
