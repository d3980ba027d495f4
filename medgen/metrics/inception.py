"""Inception-v3 as the FID of Heusel et al. uses it, and its features of scans; the weights are the user's own file.

The network is not that of the usual libraries: it is a port of the TensorFlow graph of 2015, whose resizing, average
pools and last block differ, and FID values hang on all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from medgen.metrics.planes import PlaneFeatures
from medgen.metrics.weights import load_strictly, read_weights

NUM_FEATURES = 2048
_SIZE = 299  # edge of the picture that the network was trained on, in pixels
_EPSILON = 1e-3  # of the batch normalizations in the TensorFlow graph

# A convolution is (name, output channels, kernel, stride, padding) under the names of the weight file; a chain may end
# in several that see the same input; a block puts the outputs of its chains, and then of its pool, side by side.
_Convolution = tuple[str, int, int | tuple[int, int], int, int | tuple[int, int]]
_Chain = Sequence[_Convolution | Sequence[_Convolution]]
_POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")  # these are followed by a max pool
_ROW, _COLUMN = ((1, 7), (0, 3)), ((7, 1), (3, 0))


def _point(name: str, width: int) -> _Convolution:
    return (name, width, 1, 1, 0)


def _block_a(pool_width: int) -> list[_Chain]:
    return [
        [_point("branch1x1", 64)],
        [_point("branch5x5_1", 48), ("branch5x5_2", 64, 5, 1, 2)],
        [_point("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 1, 1)],
        [_point("branch_pool", pool_width)],
    ]


def _block_b() -> list[_Chain]:
    return [
        [("branch3x3", 384, 3, 2, 0)],
        [_point("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 2, 0)],
    ]


def _block_c(width: int) -> list[_Chain]:
    def along(name: str, out: int, axis: tuple[tuple[int, int], tuple[int, int]]) -> _Convolution:
        return (name, out, axis[0], 1, axis[1])

    return [
        [_point("branch1x1", 192)],
        [_point("branch7x7_1", width), along("branch7x7_2", width, _ROW), along("branch7x7_3", 192, _COLUMN)],
        [
            _point("branch7x7dbl_1", width),
            along("branch7x7dbl_2", width, _COLUMN),
            along("branch7x7dbl_3", width, _ROW),
            along("branch7x7dbl_4", width, _COLUMN),
            along("branch7x7dbl_5", 192, _ROW),
        ],
        [_point("branch_pool", 192)],
    ]


def _block_d() -> list[_Chain]:
    return [
        [_point("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2, 0)],
        [
            _point("branch7x7x3_1", 192),
            ("branch7x7x3_2", 192, _ROW[0], 1, _ROW[1]),
            ("branch7x7x3_3", 192, _COLUMN[0], 1, _COLUMN[1]),
            ("branch7x7x3_4", 192, 3, 2, 0),
        ],
    ]


def _block_e() -> list[_Chain]:
    def fork(name: str, ends: str) -> list[_Convolution]:
        return [(f"{name}{ends[0]}", 384, (1, 3), 1, (0, 1)), (f"{name}{ends[1]}", 384, (3, 1), 1, (1, 0))]

    return [
        [_point("branch1x1", 320)],
        [_point("branch3x3_1", 384), fork("branch3x3_2", "ab")],
        [_point("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3, 1, 1), fork("branch3x3dbl_3", "ab")],
        [_point("branch_pool", 192)],
    ]


class _ConvNormReLU(nn.Module):
    """Convolution, batch normalization and ReLU."""

    def __init__(self, in_channels: int, spec: _Convolution) -> None:
        super().__init__()
        _, out, kernel, stride, padding = spec
        self.conv = nn.Conv2d(in_channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=_EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Chains of convolutions beside a pool.

    Args:
        in_channels: Input channels.
        chains: The chains; with the pools ``average`` and ``max`` the last one follows the pool.
        pool: ``average`` leaves the padding out of the mean, as TensorFlow does; ``max`` stands in the last block of
            the graph only; ``halve`` is a max pool of stride 2.
    """

    def __init__(self, in_channels: int, chains: Sequence[_Chain], pool: Literal["average", "max", "halve"]) -> None:
        super().__init__()
        self.pool = pool
        self.steps: list[list[list[str]]] = []
        self.out_channels = in_channels if pool == "halve" else 0
        for chain in chains:
            steps, width = [], in_channels
            for step in chain:
                forks: list[_Convolution] = [step] if isinstance(step[0], str) else list(step)  # type: ignore[list-item, arg-type]
                for fork in forks:
                    self.add_module(fork[0], _ConvNormReLU(width, fork))
                steps.append([fork[0] for fork in forks])
                width = sum(fork[1] for fork in forks)
            self.steps.append(steps)
            self.out_channels += width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, stride=2) if self.pool == "halve" else F.max_pool2d(x, 3, stride=1, padding=1)
        inputs = [x] * len(self.steps) if self.pool == "halve" else [x] * (len(self.steps) - 1) + [pooled]
        outputs = []
        for y, steps in zip(inputs, self.steps, strict=True):
            for names in steps:
                y = torch.cat([getattr(self, name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, pooled] if self.pool == "halve" else outputs, dim=1)


class InceptionV3(nn.Module):
    """The network of FID, under the state-dict names of ``pt_inception-2015-12-05-6726825d.pth``.

    References:
        Szegedy et al. 2016, arXiv:1512.00567; Heusel et al. 2017, arXiv:1706.08500.
    """

    def __init__(self) -> None:
        super().__init__()
        stem: list[_Convolution] = [
            ("Conv2d_1a_3x3", 32, 3, 2, 0),
            ("Conv2d_2a_3x3", 32, 3, 1, 0),
            ("Conv2d_2b_3x3", 64, 3, 1, 1),
            ("Conv2d_3b_1x1", 80, 1, 1, 0),
            ("Conv2d_4a_3x3", 192, 3, 1, 0),
        ]
        width = 3
        for spec in stem:
            self.add_module(spec[0], _ConvNormReLU(width, spec))
            width = spec[1]
        self.stem = [spec[0] for spec in stem]
        mixed: list[tuple[str, list[_Chain], Literal["average", "max", "halve"]]] = [
            ("Mixed_5b", _block_a(32), "average"),
            ("Mixed_5c", _block_a(64), "average"),
            ("Mixed_5d", _block_a(64), "average"),
            ("Mixed_6a", _block_b(), "halve"),
            ("Mixed_6b", _block_c(128), "average"),
            ("Mixed_6c", _block_c(160), "average"),
            ("Mixed_6d", _block_c(160), "average"),
            ("Mixed_6e", _block_c(192), "average"),
            ("Mixed_7a", _block_d(), "halve"),
            ("Mixed_7b", _block_e(), "average"),
            ("Mixed_7c", _block_e(), "max"),
        ]
        for name, chains, pool in mixed:
            block = _Mixed(width, chains, pool)
            self.add_module(name, block)
            width = block.out_channels
        self.mixed = [name for name, _, _ in mixed]
        self.fc = nn.Linear(width, 1008)  # never used, but a part of the file

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Globally pooled output of the last block, the ``pool_3`` of the TensorFlow graph.

        Args:
            image: ``(B, 3, 299, 299)``, ``(x - 128) / 128`` for ``x`` in [0, 255].

        Returns:
            ``(B, 2048)`` features, at least 0.
        """
        x = image
        for name in [*self.stem, *self.mixed]:
            x = getattr(self, name)(x)
            if name in _POOLED:
                x = F.max_pool2d(x, 3, stride=2)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def resize_as_tensorflow1(image: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resizing as TensorFlow 1 had it: pixel centers at whole numbers, without antialiasing.

    Args:
        image: ``(B, C, H, W)``.
        size: Edge of the square output, in pixels.

    Returns:
        ``(B, C, size, size)``; output pixel i lies at ``i * H / size`` of the input.
    """
    for axis in (3, 2):
        count = image.shape[axis]
        # The step is float32 in TensorFlow, whatever the type of the image.
        step = torch.tensor(count / size, dtype=torch.float32)
        position = torch.arange(size, dtype=image.dtype, device=image.device) * step
        low = position.long()
        high = (low + 1).clamp(max=count - 1)
        weight = (position - low).view(-1, *[1] * (3 - axis))
        first = image.index_select(axis, low)
        image = first + (image.index_select(axis, high) - first) * weight
    return image


class InceptionFeatures(PlaneFeatures):
    """Extractor ``inception``: the 2048 features of FID, see :class:`medgen.metrics.planes.PlaneFeatures`.

    With 2D scans of one gray or three color channels, and only then, a Fréchet distance of these features is the FID
    that torch-fidelity and pytorch-fid compute from 8-bit pictures. Intensities are rounded to 8 bits first, since that
    is what FID is defined on. A gray picture is repeated to three channels.

    Args:
        weights: Local file ``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid, torch-fidelity's copy of it, or the
            same as ``.safetensors``. medgen downloads nothing.
        **settings: ``spatial_dims``, ``in_channels``, ``rgb`` and ``slices_per_plane`` of the base class.

    Attributes:
        name: Name of the extractor, for the record of a result.
        num_features: Length of one feature vector.
    """

    name = "inception"
    num_features = NUM_FEATURES

    def __init__(self, weights: str | Path, **settings: Any) -> None:
        super().__init__(**settings)
        tensors, self.weights_hash = read_weights(weights)
        self.network = InceptionV3()
        load_strictly(self.network, tensors, f"{weights} (Inception-v3 of FID)")
        del self.network.fc
        self.network.eval().requires_grad_(False)
        self.steps: dict[str, Any] = {
            "image_size": _SIZE,
            "resize": "stretched to a square, bilinear as in TensorFlow 1",
            "intensity": "(x - 128) / 128 for x rounded to 0..255",
            "pooling": "global mean of the last block (pool_3)",
        }

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of pictures.

        Args:
            pictures: ``(N, 1 or 3, H, W)`` in [0, 1].

        Returns:
            ``(N, 2048)`` float32, at least 0.
        """
        levels = (255 * pictures).round().clamp(0, 255).expand(-1, 3, -1, -1)
        features: torch.Tensor = self.network((resize_as_tensorflow1(levels, _SIZE) - 128) / 128)
        return features
