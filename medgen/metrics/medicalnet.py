"""Features of volumes from MedicalNet's 3D ResNets; the weights are the user's own file."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from medgen.metrics.extractor import FixedFeatures
from medgen.metrics.weights import load_strictly, read_weights
from medgen.types import BadInputError

# Blocks of the four layers, and whether they are bottlenecks, tell the depth.
_DEPTHS = {
    ((1, 1, 1, 1), False): 10,
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
    ((3, 24, 36, 3), True): 200,
}
_DILATIONS = {"layer3": 2, "layer4": 4}


def _resnet(tensors: dict[str, torch.Tensor], source: str) -> tuple[nn.Module, int]:
    """The network that the names of the weights tell of, and its depth: MONAI's, dilated as MedicalNet's is."""
    from monai.networks.nets import ResNet

    blocks = [0, 0, 0, 0]
    for name in tensors:
        if match := re.match(r"layer([1-4])\.(\d+)\.", name):
            index = int(match[1]) - 1
            blocks[index] = max(blocks[index], int(match[2]) + 1)
    bottleneck = "layer1.0.conv3.weight" in tensors
    depth = _DEPTHS.get(((blocks[0], blocks[1], blocks[2], blocks[3]), bottleneck))
    if depth is None:
        raise BadInputError(
            f"{source}: expected a MedicalNet ResNet of depth {', '.join(map(str, _DEPTHS.values()))}, got layers of "
            f"{blocks} {'bottleneck' if bottleneck else 'basic'} blocks. Use the backbone alone."
        )
    projects = any(".downsample." in name for name in tensors)
    network: nn.Module = ResNet(
        "bottleneck" if bottleneck else "basic",
        blocks,
        [64, 128, 256, 512],
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_stride=2,
        shortcut_type="B" if projects else "A",
        bias_downsample=False,
        feed_forward=False,
    )
    for layer, dilation in _DILATIONS.items():  # MedicalNet widens the view of these layers where MONAI strides
        for block in getattr(network, layer):
            for module in block.modules():
                if isinstance(module, nn.Conv3d):
                    module.stride = (1, 1, 1)
                    if module.kernel_size[0] == 3:
                        module.dilation = module.padding = (dilation,) * 3
            if isinstance(block.downsample, partial):
                block.downsample = partial(block.downsample, stride=1)
    return network, depth


class MedicalNetFeatures(FixedFeatures):
    """Extractor ``medicalnet``: one vector per volume and channel from a 3D ResNet trained on 23 segmentation sets.

    The depth (10, 18, 34, 50, 101, 152 or 200) is read from the file. As in MedicalNet, the last two layers are dilated
    and do not stride. Each channel of a volume is scaled to mean 0 and standard deviation 1, and is a view of its own.
    Volumes are taken at their own size, and voxel size is not used: bring all sets to one spacing first.
    The features of a volume do not depend on its batch.

    Args:
        weights: Local file such as ``resnet_50_23dataset.pth``, or the same as ``.safetensors``.
        spatial_dims: 3.
        in_channels: Channels of the volumes.

    Attributes:
        name: Name of the extractor, for the record of a result.

    References:
        Chen, Ma and Zheng 2019, Med3D, arXiv:1904.00625.
    """

    name = "medicalnet"

    def __init__(self, weights: str | Path, *, spatial_dims: Literal[2, 3] = 3, in_channels: int = 1) -> None:
        super().__init__(spatial_dims=spatial_dims, in_channels=in_channels)
        if spatial_dims != 3:
            raise ValueError(f"spatial_dims: expected 3, for MedicalNet sees volumes only, got {spatial_dims}.")
        tensors, self.weights_hash = read_weights(weights)
        self.network, self.depth = _resnet(tensors, str(weights))
        load_strictly(self.network, tensors, f"{weights} (MedicalNet ResNet{self.depth})")
        self.network.eval().requires_grad_(False)
        self.num_features = 512 if self.depth < 50 else 2048

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views, in the order of the output."""
        if self.in_channels == 1:
            return ("volume",)
        return tuple(f"channel {channel}" for channel in range(self.in_channels))

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to a volume, for the record of a result."""
        return {
            "depth": self.depth,
            "intensity": "each channel of a volume to mean 0 and standard deviation 1",
            "resize": "none",
            "channels": "each channel a view",
            "pooling": "global mean of the last layer",
        }

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Extract features.

        Args:
            image: ``(B, C, H, W, D)``, in any unit.

        Returns:
            ``(B, C, num_features)`` float32, at least 0.

        Raises:
            ValueError: If dimension or channels are not what the extractor was made for, or intensities not finite.
        """
        self._check_scans(image)
        image = image.float()
        spread, mean = torch.std_mean(image, dim=(2, 3, 4), keepdim=True)
        # A constant volume has nothing to scale.
        scaled = (image - mean) / torch.where(spread > 0, spread, 1)
        volumes = [self.network(volume[None, None]) for scan in scaled for volume in scan]
        return torch.cat(volumes).unflatten(0, (len(image), self.in_channels))
