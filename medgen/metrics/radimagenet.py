"""Features of scans from a ResNet50 that was trained on RadImageNet; the weights are the user's own file.

Two conversions of the published weights are about, which differ in layout and in what they want as input. Both load.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medgen.metrics.planes import PlaneFeatures
from medgen.metrics.weights import load_strictly, read_weights

NUM_FEATURES = 2048
# The authors' PyTorch file numbers the children of the network that it was cut from.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_KERAS_EPSILON = 1.001e-5
_IMAGENET_MEANS = (0.406, 0.456, 0.485)  # blue, green, red


def _resnet50(*, keras: bool) -> nn.Module:
    """ResNet50 without its classifier, by MONAI; `keras` moves each stride from the second to the first convolution of
    its block and gives biases to the convolutions, as Keras has it.
    """
    from monai.networks.nets import resnet50

    network: nn.Module = resnet50(
        spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, feed_forward=False
    )
    if not keras:
        return network
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eps = _KERAS_EPSILON
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        if re.fullmatch(r"layer\d\.0", name):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride  # type: ignore[union-attr, assignment]
    return network


class RadImageNetFeatures(PlaneFeatures):
    """Extractor ``radimagenet``: 2048 features per scan and view, see :class:`medgen.metrics.planes.PlaneFeatures`.

    The authors' file (``ResNet50.pt``, names ``backbone.0.weight`` ...) wants intensities ``2 x - 1``. The conversion
    from Keras (``RadImageNet-ResNet50_notop.pth``, names ``conv1.weight`` ... with biases), which MAISI's and MONAI's
    2.5D FID use, wants blue, green, red less the means of ImageNet. The layout of the file decides. Published 2.5D FIDs
    take every slice at its own size, so theirs do not compare with the value here.

    Args:
        weights: Local file of either kind, or the same as ``.safetensors``.
        image_size: Edge in pixels of the square that pictures are stretched to, bilinear with antialiasing.
        **settings: ``spatial_dims``, ``in_channels``, ``rgb`` and ``slices_per_plane`` of the base class.

    Attributes:
        name: Name of the extractor, for the record of a result.
        num_features: Length of one feature vector.

    References:
        Mei et al. 2022, RadImageNet, Radiology: Artificial Intelligence 4 (5).
    """

    name = "radimagenet"
    num_features = NUM_FEATURES

    def __init__(self, weights: str | Path, *, image_size: int = 224, **settings: Any) -> None:
        super().__init__(**settings)
        if image_size < 1:
            raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}.")
        tensors, self.weights_hash = read_weights(weights)
        tensors = {_rename(name): value for name, value in tensors.items() if not name.startswith("fc.")}
        self.keras = "conv1.bias" in tensors
        self.image_size = image_size
        self.network = _resnet50(keras=self.keras)
        load_strictly(self.network, tensors, f"{weights} (ResNet50 of RadImageNet)")
        self.network.eval().requires_grad_(False)
        self.steps: dict[str, Any] = {
            "image_size": image_size,
            "resize": "stretched to a square, bilinear, antialiased",
            "intensity": "blue, green, red less 0.406, 0.456, 0.485 for x in [0, 1]" if self.keras else "2 x - 1",
            "layout": "converted from Keras" if self.keras else "PyTorch, by the authors",
            "pooling": "global mean of the last block",
        }

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of pictures.

        Args:
            pictures: ``(N, 1 or 3, H, W)`` in [0, 1].

        Returns:
            ``(N, 2048)`` float32, at least 0.
        """
        size = (self.image_size, self.image_size)
        square = F.interpolate(pictures, size=size, mode="bilinear", align_corners=False, antialias=True)
        square = square.expand(-1, 3, -1, -1).flip(1)  # both were trained on blue, green, red
        if self.keras:
            scaled = square - square.new_tensor(_IMAGENET_MEANS).view(3, 1, 1)
        else:
            scaled = 2 * square - 1
        features: torch.Tensor = self.network(scaled)
        return features


def _rename(name: str) -> str:
    """``backbone.4.0.conv1.weight`` to ``layer1.0.conv1.weight``; other names stay."""
    match = re.fullmatch(r"backbone\.(\d+)\.(.+)", name)
    return f"{_CHILDREN.get(match[1], match[1])}.{match[2]}" if match else name
