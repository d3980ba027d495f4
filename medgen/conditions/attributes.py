"""Facts about a scan, such as view, age or voxel size, as vectors that a network can read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from medgen.types import BadInputError, Spacing

SPACING = "spacing"
_MOST_CATEGORIES = 64
_SAME_SIZE = 0.01  # relative difference of voxel sizes below which they are rounding
_OCTAVES = 4  # of sines and cosines that tell near numbers apart
_FAR = 4  # standard deviations from the mean within which nearly all of a column lies, whatever its distribution


@dataclass(frozen=True)
class Attribute:
    """One fact and how it is written as a vector; an absent one is all zeros.

    Attributes:
        kind: ``category`` (one of `values`), ``number`` (by `mean` and `std`), ``spacing`` (voxel edges in mm, by the
            logarithm of each over `mean`) or ``vector`` (any `width` numbers, such as an embedding of another network).
        values: Categories.
        mean: Of a number over the training scans; of a spacing, the typical edge in mm.
        std: Of a number over the training scans.
        width: Length of a vector, or number of axes of a spacing.
    """

    kind: Literal["category", "number", "spacing", "vector"]
    values: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    width: int = 1

    @property
    def features(self) -> int:
        """Length of the vector."""
        return {
            "category": len(self.values),
            "number": 2 + 2 * _OCTAVES,
            "spacing": 1 + self.width,
            "vector": self.width,
        }[self.kind]

    def encode(self, value: str | float | Sequence[float], *, name: str) -> torch.Tensor:
        """Vector of one value.

        Args:
            value: A category, a number or numbers; text is read as such.
            name: Of the attribute, for messages.

        Returns:
            ``(features,)`` float32, nowhere near all zeros.

        Raises:
            BadInputError: If the value is no such category or number.
        """
        if self.kind == "category":
            if str(value) not in self.values:
                raise BadInputError(
                    f"{name}: expected one of {', '.join(self.values)}, as the model was trained on, got {value!r}."
                )
            return torch.nn.functional.one_hot(torch.tensor(self.values.index(str(value))), len(self.values)).float()
        numbers = _numbers(value, name)
        length = 1 if self.kind == "number" else self.width
        if len(numbers) != length:
            raise BadInputError(f"{name}: expected {length} number(s), got {len(numbers)}.")
        if self.kind == "vector":
            if not any(numbers):
                raise BadInputError(f"{name}: expected a vector that is not all zeros, which stands for none.")
            return torch.tensor(numbers)
        if self.kind == "spacing":
            if min(numbers) <= 0:
                raise BadInputError(f"{name}: expected positive lengths in mm, got {list(numbers)}.")
            return torch.tensor([1.0, *(math.log2(number / self.mean) for number in numbers)])
        z = (numbers[0] - self.mean) / self.std
        waves = [wave(z * math.pi / 4 * 2**octave) for octave in range(_OCTAVES) for wave in (math.sin, math.cos)]
        return torch.tensor([1.0, z, *waves])


def far_from_training(attribute: Attribute, value: str) -> str:
    """Whether a number is one that the model can know nothing of: more than 4 standard deviations from the mean.

    Args:
        attribute: The fact.
        value: As :meth:`Attribute.encode` takes it.

    Returns:
        What the training scans had, in words; empty where the value is near them, or no number.
    """
    if attribute.kind != "number":
        return ""
    (number,) = _numbers(value, "attribute")
    mean, std = attribute.mean, attribute.std
    return f"mean {mean:.4g}, standard deviation {std:.4g}" if abs(number - mean) > _FAR * std else ""


def fit_attribute(name: str, values: Sequence[str]) -> Attribute:
    """Describe a column of a data set: numbers if all are and they are many, else categories.

    Args:
        name: Of the column, for messages.
        values: Of the training scans, without the empty ones.

    Returns:
        The attribute.

    Raises:
        BadInputError: If there is nothing to tell scans apart by: fewer than two values, or too many categories.
    """
    distinct = sorted(set(values))
    try:
        parsed = [_numbers(value, name) for value in values]
    except BadInputError:
        parsed = []
    if len(set(parsed or distinct)) < 2:
        raise BadInputError(
            f"attribute {name!r}: expected a column with at least two values, got {distinct}, which tells no scan from "
            "another. Leave it out."
        )
    if parsed and len(widths := {len(numbers) for numbers in parsed}) == 1 and (width := widths.pop()) > 1:
        return Attribute("vector", width=width)
    if parsed and len(distinct) > 8:
        numbers = torch.tensor([numbers[0] for numbers in parsed], dtype=torch.float64)
        return Attribute("number", mean=float(numbers.mean()), std=float(numbers.std(correction=0)))
    if len(distinct) > _MOST_CATEGORIES:
        raise BadInputError(
            f"attribute {name!r}: expected numbers or at most {_MOST_CATEGORIES} categories, got {len(distinct)}, such "
            f"as {distinct[0]!r}. Use it as text instead."
        )
    return Attribute("category", values=tuple(distinct))


def fit_spacing(spacings: Sequence[Spacing]) -> Attribute:
    """Describe the voxel sizes of the training scans.

    Args:
        spacings: Edges in mm of each scan.

    Returns:
        The attribute, around the geometric mean.

    Raises:
        BadInputError: If all scans have the same voxel size, so that there is nothing to learn of it.
    """
    logs = torch.tensor(spacings, dtype=torch.float64).log()
    if (logs.amax(dim=0) - logs.amin(dim=0)).max() <= math.log1p(_SAME_SIZE):
        size = " x ".join(f"{edge:.3g}" for edge in spacings[0])
        raise BadInputError(
            f"attribute '{SPACING}': expected scans of different voxel sizes, got {size} mm everywhere. Leave it out, "
            "or add scans of other voxel sizes."
        )
    return Attribute("spacing", mean=float(logs.mean().exp()), width=len(spacings[0]))


def encode_attributes(attributes: Mapping[str, Attribute], values: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Vectors of all attributes of one scan.

    Args:
        attributes: What the model knows, by name.
        values: What is known of the scan; empty text is absent.

    Returns:
        ``(features,)`` each, zeros where absent.
    """
    return {
        name: attribute.encode(values[name], name=name) if values.get(name) else torch.zeros(attribute.features)
        for name, attribute in attributes.items()
    }


def _numbers(value: str | float | Sequence[float], name: str) -> tuple[float, ...]:
    try:
        plain: Any = json.loads(value) if isinstance(value, str) else value
        numbers = tuple(float(number) for number in (plain if isinstance(plain, list | tuple) else [plain]))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise BadInputError(f"{name}: expected a finite number, or several as [1, 2], got {value!r}.")
    return numbers
