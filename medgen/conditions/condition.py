"""What steers a sample: a value object whose every part may be absent."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, eq=False)
class Condition:
    """Conditions of a batch.

    Attributes:
        mask: ``(B, K, *spatial)`` one-hot float label map; all zeros in a row means that this sample has none. None
            means that no sample has one.
    """

    mask: torch.Tensor | None = None

    def null(self) -> Condition:
        """The unconditional counterpart: every part absent."""
        return Condition(**{part.name: None for part in fields(self)})

    def drop(self, probability: float, *, generator: torch.Generator) -> Condition:
        """Make each part absent, sample by sample and part by part.

        Args:
            probability: Chance in [0, 1] that a part of one sample is dropped.
            generator: Source of the draws.

        Returns:
            A condition whose dropped rows are all zeros.
        """
        dropped = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if value is not None:
                keep = torch.rand(value.shape[0], generator=generator) >= probability
                dropped[part.name] = value * keep.to(value).view(-1, *[1] * (value.ndim - 1))
        return replace(self, **dropped)
