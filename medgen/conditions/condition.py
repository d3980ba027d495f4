"""What steers a sample: a value object whose every part may be absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from medgen.types import BadInputError

# In which guidance adds the parts, attributes in between: where things are before what they are called.
_ORDER = {"mask": 0, "edge": 1, "text": 3}


@dataclass(frozen=True, eq=False)
class Condition:
    """Conditions of a batch, by name.

    A row of zeros means that this sample has no such condition, a missing name that no sample has it. Both are the same
    to a network: whatever reads a condition has no bias, or is told of its presence.

    Attributes:
        parts: ``mask (B, K, *spatial)`` one-hot label map, ``edge (B, 2, *spatial)`` strength and presence,
            ``text (B, L, E)`` embedded words, and each attribute ``(B, F)``; floating point.
    """

    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        """Names of the parts, in the order in which guidance adds them."""
        return iter(sorted(self.parts, key=lambda name: (_ORDER.get(name, 2), name)))

    def only(self, names: Sequence[str]) -> Condition:
        """The same with every other part absent.

        Args:
            names: Parts to keep.

        Returns:
            The condition.
        """
        return Condition({name: self.parts[name] for name in self if name in names})

    def to(self, device: torch.device) -> Condition:
        """The same on a device.

        Args:
            device: Where the tensors go.

        Returns:
            The condition.
        """
        return Condition({name: self.parts[name].to(device) for name in self})

    def drop(
        self, probability: float | Mapping[str, float], *, generator: torch.Generator, all_of_them: float = 0.0
    ) -> Condition:
        """Make each part absent, sample by sample and part by part.

        Args:
            probability: Chance in [0, 1] that a part of one sample is dropped, for all parts or by name.
            generator: Source of the draws.
            all_of_them: Chance that a sample loses all of its parts together, which the unconditional pass of several
                conditions is trained by.

        Returns:
            A condition whose dropped rows are all zeros.
        """
        count = max((len(part) for part in self.parts.values()), default=0)
        bare = torch.rand(count, generator=generator) < all_of_them if all_of_them else torch.zeros(count).bool()
        dropped = {}
        for name in self:
            value = self.parts[name]
            chance = probability.get(name, 0.0) if isinstance(probability, Mapping) else probability
            keep = (torch.rand(count, generator=generator) >= chance) & ~bare
            dropped[name] = value * keep.to(value).view(-1, *[1] * (value.ndim - 1))
        return Condition(dropped)

    def chain(self, scales: float | Mapping[str, float], default: float = 1.0) -> tuple[list[Condition], list[float]]:
        """What composed guidance is made of; neighbors of one scale are added together.

        Args:
            scales: Scale of all parts, or by name.
            default: Scale of a part that is not named.

        Returns:
            No condition, then one part more at a time up to all, and the scale of each addition.

        Raises:
            BadInputError: If a name is not that of a part.
        """
        names = list(self)
        if isinstance(scales, Mapping):
            unknown = sorted(set(scales) - set(names))
            if unknown:
                raise BadInputError(
                    f"guidance_scale: expected conditions among {', '.join(names) or 'none'}, got {', '.join(unknown)}."
                )
        each = [scales.get(name, default) if isinstance(scales, Mapping) else scales for name in names]
        steps, weights, so_far = [Condition()], [], []
        for weight, run in groupby(zip(each, names, strict=True), key=lambda pair: pair[0]):
            so_far += [name for _, name in run]
            steps.append(self.only(so_far))
            weights.append(weight)
        return steps, weights


def join(conditions: Sequence[Condition]) -> Condition:
    """One batch of several; what some of them lack is zeros there.

    Args:
        conditions: Of one or more samples each.

    Returns:
        The batch.
    """
    shapes = {name: part.shape[1:] for condition in conditions for name, part in condition.parts.items()}
    counts = [max((len(part) for part in condition.parts.values()), default=1) for condition in conditions]
    return Condition(
        {
            name: torch.cat(
                [
                    condition.parts[name] if name in condition.parts else torch.zeros(count, *shape)
                    for condition, count in zip(conditions, counts, strict=True)
                ]
            )
            for name, shape in shapes.items()
        }
    )
