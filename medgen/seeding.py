"""One random stream per sample: noise depends on the seed alone, never on batch, order, worker or process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch

_Row = TypeVar("_Row")


def derive_seed(*parts: int | str) -> int:
    """Seed in ``[0, 2**63)`` that depends on every part and on nothing else.

    Args:
        *parts: Root seed, then what tells this stream from its neighbors (stage, step, case, ...).

    Returns:
        First 63 bits of the SHA-256 digest of the parts.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(*parts: int | str) -> torch.Generator:
    """CPU generator seeded by :func:`derive_seed`.

    Args:
        *parts: As for :func:`derive_seed`.

    Returns:
        A fresh generator on the CPU, so that draws are the same for every device.
    """
    return torch.Generator().manual_seed(derive_seed(*parts))


def seeded_noise(shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """Standard normal noise with one stream per sample.

    Args:
        shape: Shape of one sample, without the batch axis.
        seeds: One seed per sample.

    Returns:
        ``(len(seeds), *shape)`` float32 on the CPU; row ``i`` depends on ``seeds[i]`` only.
    """
    return torch.stack([torch.randn(tuple(shape), generator=stream(seed, "noise")) for seed in seeds])


def spread(rows: Sequence[_Row], count: int) -> list[_Row]:
    """Some of the rows, evenly spaced: the first ones of a folder often come from one patient, site or modality.

    Args:
        rows: What to take from.
        count: How many, at most.

    Returns:
        The rows, in their order.
    """
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def draw(rows: Sequence[_Row], count: int, *key: int | str) -> list[_Row]:
    """Some of the rows, without replacement, in an order of their own.

    Args:
        rows: What to draw from.
        count: How many, at most.
        *key: Names the draw; equal keys give equal draws.

    Returns:
        The drawn rows.
    """
    return [rows[index] for index in torch.randperm(len(rows), generator=stream(*key, "draw")).tolist()[:count]]
