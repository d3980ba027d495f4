"""Which real scans a generator has learned from, and which stand for what it has not seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from medgen.data.case import VAL_SPLITS
from medgen.data.dataset import split_cases
from medgen.evaluation.scans import Scans
from medgen.types import BadInputError

HALVES = "no validation split: all real scans together, floors from random halves, patient by patient"
FEW = 20  # scans below which even the floor says little


@dataclass(frozen=True)
class Split:
    """Rows of the real scans.

    Attributes:
        words: How the split came about.
        train: Scans that the generator may have learned from.
        val: Scans that synthetic ones are compared with; the same as `train` where there is no split.
    """

    words: str
    train: list[int]
    val: list[int]

    @property
    def apart(self) -> bool:
        """Whether there is a split."""
        return self.train != self.val


def split_real(real: Scans) -> Split:
    """The split that the folder names, else that of ``medgen train`` if it holds out enough scans.

    Args:
        real: The measured real scans.

    Returns:
        The split; without one, all scans on both sides.

    Raises:
        BadInputError: If a named side has fewer than two usable scans.
    """
    everything = list(range(len(real.cases)))
    if any(case.split in VAL_SPLITS for case in real.dataset.cases):
        train, val = split_cases(real.dataset)
        found = Split("train and val as given", real.rows({c.case for c in train}), real.rows({c.case for c in val}))
        smallest = min(len(found.train), len(found.val))
        if smallest < 2:
            raise BadInputError(
                f"{real.dataset.root}: expected at least 2 scans on each side of the real split, got {smallest}. "
                "Add scans or change the split."
            )
        return found
    labelled = [case for case in real.dataset.cases if case.label is not None]
    try:
        train, val = split_cases(replace(real.dataset, cases=labelled))
    except BadInputError:  # a part would be empty, so nothing was trained on this folder
        return Split(HALVES, everything, everything)
    rows = (real.rows({case.case for case in train}), real.rows({case.case for case in val}))
    if min(map(len, rows)) < FEW:
        return Split(HALVES, everything, everything)
    return Split("val as medgen train holds it out", *rows)
