"""Where views of a scan may differ from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch.nn import functional as F

from medgen.seeding import derive_seed, stream
from medgen.types import BadInputError

MaskKind = Literal["everywhere", "uncertainty", "attention", "blocks", "hybrid"]
_BLOCKS = 8  # along the longest axis
_SHARE = 0.5  # of the blocks that change
_LEAST = 0.05  # of the largest entropy there can be, from which a voxel is called uncertain
_MARGIN = 2  # voxels around what is uncertain


def check_kind(kind: str) -> None:
    """Refuse what is no kind of mask.

    Args:
        kind: Its name.

    Raises:
        BadInputError: If it is not one of those that exist.
    """
    if kind not in get_args(MaskKind):
        raise BadInputError(f"mask: expected a map or one of {', '.join(get_args(MaskKind))}, got {kind!r}.")


def uncertain_region(entropy: torch.Tensor, classes: int) -> torch.Tensor:
    """Where a segmenter is unsure, and a margin around.

    Args:
        entropy: ``(*spatial)`` of its prediction, in nats.
        classes: K.

    Returns:
        ``(*spatial)`` bool; everywhere if it is sure of all.
    """
    unsure = entropy > _LEAST * math.log(classes)
    if not bool(unsure.any()):
        return torch.ones_like(unsure)
    pool = F.max_pool3d if entropy.ndim == 3 else F.max_pool2d
    return pool(unsure.float()[None, None], 2 * _MARGIN + 1, 1, _MARGIN)[0, 0] > 0


def random_blocks(shape: Sequence[int], *, seed: int, number: int) -> torch.Tensor:
    """Half of the blocks of a grid of about eight along the longest axis, drawn for each view.

    Args:
        shape: ``(H, W[, D])``.
        seed: Root of the draw.
        number: Of the view.

    Returns:
        ``(H, W[, D])`` bool.
    """
    edge = max(1, round(max(shape) / _BLOCKS))
    counts = [-(-length // edge) for length in shape]
    draw = torch.rand(counts, generator=stream(derive_seed(seed, "test time", f"blocks {number}")))
    blocks = draw < _SHARE
    for axis, length in enumerate(shape):
        blocks = blocks.repeat_interleave(edge, dim=axis).narrow(axis, 0, length)
    return blocks
