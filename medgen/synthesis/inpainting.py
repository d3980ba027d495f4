"""The machinery of edits: what a scan is made from, where it may change, and how the result joins on to the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from medgen.data.geometry import Placement, from_model, to_model
from medgen.data.intensity import IntensityMap
from medgen.generator import GeneratorConfig
from medgen.types import BadInputError, Shape

# Voxels: of the blending band around a region, and by which a region exceeds the difference of two labels.
BAND, MARGIN = 3, 2


@dataclass(frozen=True, eq=False)
class Inpainting:
    """A scan of which a part, or all, is to be made anew.

    Attributes:
        image: ``(C, H, W[, D])`` in source units, of the type of its file.
        region: ``(H, W[, D])`` bool, where it may change.
        intensity: Between its units and the model's, by its own normalization.
        strength: Share in (0, 1] of the noise process that is run.
        band: Width of the blending band around the region, in voxels.
    """

    image: torch.Tensor
    region: torch.Tensor
    intensity: IntensityMap
    strength: float
    band: int

    @classmethod
    def fit(
        cls,
        image: torch.Tensor,
        region: torch.Tensor,
        config: GeneratorConfig,
        *,
        strength: float,
        band: int = BAND,
        name: str = "image",
    ) -> Inpainting:
        """Hold a scan to the model and normalize it as the model's training scans were.

        Args:
            image: As above.
            region: As above.
            config: Of the model.
            strength: As above.
            band: As above.
            name: Of the scan, for messages.

        Returns:
            The scan with its normalization.

        Raises:
            BadInputError: If channels or shapes differ, the scan has no contrast, the region is empty, or a number is
                out of range.
        """
        shape, channels = tuple(image.shape[1:]), len(config.channel_names)
        if image.shape[0] != channels:
            raise BadInputError(
                f"{name}: expected the {channels} channel(s) of the model '{config.name}' "
                f"({', '.join(config.channel_names.values())}), got {image.shape[0]}. Choose another model or scan."
            )
        check_strength(strength)
        if band < 0:
            raise BadInputError(f"band: expected a width of 0 voxels or more, got {band}.")
        check_region(region, shape)
        return cls(image, region, config.normalization.fit(image.float(), source=name), float(strength), band)

    def to_model(self, placement: Placement, compression: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring the scan onto the model's grid, and the region onto that of its latents.

        Args:
            placement: How the grid of the scan lies on the model's.
            compression: Voxels of the model grid along the edge of a latent.

        Returns:
            Scan ``(1, C, *placement.shape)`` in [-1, 1], and where its latents may change ``(1, 1, *latent)`` bool.
        """
        scan = to_model(self.intensity.forward(self.image.float()), placement, mode="linear", padding="reflect")
        # As the scan, so that no mirrored copy of what goes stays known in the padding.
        share = to_model(self.region.float(), placement, mode="linear", padding="reflect")
        pool = F.max_pool3d if share.ndim == 3 else F.max_pool2d
        return scan[None], pool((share > 0).float()[None, None], compression) > 0

    def blend(self, made: torch.Tensor, placement: Placement) -> torch.Tensor:
        """What was made inside the region, the scan beyond the band, and between them a mix by distance.

        Args:
            made: ``(C, *placement.shape)`` in [-1, 1] on the model's grid.
            placement: As above.

        Returns:
            As ``image``, of its type.
        """
        before = self.image.numpy()
        new = self.intensity.inverse(from_model(made, placement, mode="linear")).numpy()
        distance = ndimage.distance_transform_edt(~self.region.numpy())
        weight = np.where(distance <= self.band, 1 - distance / (self.band + 1), 0)
        mixed = before.astype(np.float64) * (1 - weight) + new * weight
        if before.dtype.kind in "iu":
            limits = np.iinfo(before.dtype)
            mixed = np.clip(np.round(mixed), limits.min, limits.max)
        return torch.from_numpy(np.where(weight > 0, mixed.astype(before.dtype), before))


def check_strength(strength: float) -> None:
    """Refuse a share that is none.

    Args:
        strength: Share of the noise process.

    Raises:
        BadInputError: If it is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise BadInputError(
            f"strength: expected a share in (0, 1], got {strength}. Little keeps the scan, 1 makes it from noise."
        )


def check_region(region: torch.Tensor, shape: Shape) -> None:
    """Refuse a region that does not lie on the scan, or is empty.

    Args:
        region: Where the scan may change.
        shape: Voxels of the scan.

    Raises:
        BadInputError: If shape or type differ, or no voxel may change.
    """
    if tuple(region.shape) != shape or region.dtype != torch.bool:
        raise BadInputError(
            f"region: expected bool of the shape of the scan {shape}, got {region.dtype} {tuple(region.shape)}."
        )
    if not region.any():
        raise BadInputError("region: expected voxels that may change, got none. Mark some.")


def check_labels(before: torch.Tensor, after: torch.Tensor, region: torch.Tensor, *, name: str = "new_label") -> None:
    """Refuse a label that differs where the scan stays.

    Args:
        before: ``(H, W[, D])`` label of the scan as it is.
        after: Label that the result is to have.
        region: Where the scan may change.
        name: Of the latter, for messages.

    Raises:
        BadInputError: If they differ outside of the region.
    """
    outside = int(((before.long() != after.long()) & ~region).sum())
    if outside:
        raise BadInputError(
            f"{name}: expected the label outside of the region, where the scan stays, got {outside} other voxels. "
            "Widen the region, or leave it out."
        )


def changed_region(
    before: torch.Tensor,
    after: torch.Tensor,
    *,
    margin: int = MARGIN,
    before_name: str = "label",
    after_name: str = "new_label",
) -> torch.Tensor:
    """Where two labels differ, and some voxels around.

    Args:
        before: ``(H, W[, D])`` label of the scan as it is.
        after: Label that the result is to have.
        margin: Width of what lies around, in voxels.
        before_name: Of the former, for messages.
        after_name: Of the latter.

    Returns:
        ``(H, W[, D])`` bool.

    Raises:
        BadInputError: If they are the same.
    """
    changed = (before.long() != after.long()).numpy()
    if not changed.any():
        raise BadInputError(
            f"{after_name}: expected a label that differs from {before_name}, got the same. Change it, or give a "
            "region."
        )
    return torch.from_numpy(ndimage.distance_transform_edt(~changed) <= margin)
