"""Features of scans from a network for pictures: 2D images directly, volumes by slices in three planes."""

from __future__ import annotations

from typing import Any, Literal

import torch

from medgen.metrics.extractor import FixedFeatures

PLANES = ("sagittal", "coronal", "axial")
_CHUNK = 16  # pictures in one forward pass: bounds memory, and is the fastest on a CPU


class PlaneFeatures(FixedFeatures):
    """Base of the extractors that see pictures: one vector per scan and view.

    A view is one plane of one channel. A 2D scan is one picture per view. A volume gives each of its three planes
    `slices_per_plane` slices, the centers of equal parts of the axis; the vector of the plane is the mean over its
    slices. A gray picture is repeated to three channels. The features of a scan do not depend on its batch.
    A subclass resizes, scales and embeds pictures in ``embed``, and declares what the attributes say.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the scans.
        rgb: Whether three channels are the colors of one picture, and so one view; otherwise each channel is a gray
            view of its own. None: in 2D three channels are colors.
        slices_per_plane: Slices per plane of a volume; all of them where the axis has fewer.

    Attributes:
        name: Name of the extractor, for the record of a result.
        weights_hash: SHA-256 of the weight file.
        num_features: Length of one feature vector.
        steps: What ``embed`` does to a picture, for the record of a result.
    """

    name: str
    weights_hash: str
    num_features: int
    steps: dict[str, Any]

    def __init__(
        self,
        *,
        spatial_dims: Literal[2, 3] = 2,
        in_channels: int = 1,
        rgb: bool | None = None,
        slices_per_plane: int = 8,
    ) -> None:
        super().__init__(spatial_dims=spatial_dims, in_channels=in_channels)
        if rgb and in_channels != 3:
            raise ValueError(f"rgb: expected in_channels=3 for colors, got {in_channels}.")
        if slices_per_plane < 1:
            raise ValueError(f"slices_per_plane: expected at least 1, got {slices_per_plane}.")
        self.rgb = (spatial_dims == 2 and in_channels == 3) if rgb is None else rgb
        self.slices_per_plane = slices_per_plane

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views, in the order of the output; planes are so named for volumes in RAS order."""
        planes = ("image",) if self.spatial_dims == 2 else PLANES
        if self.rgb or self.in_channels == 1:
            return planes
        return tuple(f"channel {channel} {plane}" for channel in range(self.in_channels) for plane in planes)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to a scan, for the record of a result."""
        settings = {
            **self.steps,
            "channels": "RGB" if self.rgb else "each channel a gray view, repeated three times",
        }
        if self.spatial_dims == 3:
            settings["slices_per_plane"] = self.slices_per_plane
            settings["planes"] = list(PLANES)
            settings["volume"] = "features averaged over the evenly spaced slices of each plane"
        return settings

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of pictures.

        Args:
            pictures: ``(N, 1 or 3, H, W)`` in [0, 1]; a gray one is to be repeated to three channels.

        Returns:
            ``(N, num_features)``.
        """
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Extract features.

        Args:
            image: ``(B, C, H, W[, D])`` in [0, 1].

        Returns:
            ``(B, len(views), num_features)``.

        Raises:
            ValueError: If dimension, channels or range are not what the extractor was made for, or intensities are not
                finite.
        """
        self._check_scans(image)
        low, high = (float(value) for value in image.aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(f"image: expected intensities in [0, 1], got {low:g} to {high:g}. Rescale them.")
        image = image.float()
        units = [image] if self.rgb else [channel[:, None] for channel in image.unbind(dim=1)]
        axes: list[int | None] = [None] if self.spatial_dims == 2 else [0, 1, 2]
        return torch.stack([self._view(unit, axis) for unit in units for axis in axes], dim=1)

    def _view(self, image: torch.Tensor, axis: int | None) -> torch.Tensor:
        """``(B, 1 or 3, *spatial)`` to ``(B, num_features)``; slices are taken across `axis`."""
        if axis is None:
            return self._embed_all(image)
        size = image.shape[2 + axis]
        count = min(self.slices_per_plane, size)
        index = torch.tensor([(2 * i + 1) * size // (2 * count) for i in range(count)], device=image.device)
        slices = image.index_select(2 + axis, index).movedim(2 + axis, 1)
        return self._embed_all(slices.flatten(0, 1)).unflatten(0, (len(image), count)).mean(dim=1)

    def _embed_all(self, pictures: torch.Tensor) -> torch.Tensor:
        """``(N, 1 or 3, H, W)`` to ``(N, num_features)``, a few at a time."""
        return torch.cat([self.embed(chunk) for chunk in pictures.split(_CHUNK)])
