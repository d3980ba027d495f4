"""Pairs of a folder judged one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from medgen.data.case import Case, Dataset
from medgen.filtering.gates import Gates, Verdict
from medgen.filtering.measure import Measured, measure_all
from medgen.provenance import SampleRecord, hide_folder
from medgen.types import BadInputError

UNREADABLE = "unreadable"
_CHUNK = 64  # pairs that are searched for copies together


def judge_cases(
    gates: Gates, cases: Sequence[Case], dataset: Dataset, records: Mapping[str, SampleRecord] | None, name: str
) -> Iterator[tuple[Case, Verdict]]:
    """Measure and judge pairs.

    A pair that was made over the label map of a reference patient is held to the segmenter that has not seen the
    patient, as the real scan is; any other to the mean of all three.

    Args:
        gates: The fitted gates.
        cases: Which.
        dataset: Their set, of the classes and channels of the reference.
        records: Of the set's manifest, by case; None where it has none. A record tells what the label should show.
        name: Of the pairs, for the progress bar.

    Yields:
        Each pair and the verdict on it, in order. One that cannot be read is rejected, and its reason says why.
    """
    chunk: list[tuple[Case, Measured | BadInputError]] = []
    labels = [None if records is None else records[case.case].label for case in cases]
    owners = [gates.patient_of(label) for label in labels]
    measured = measure_all(gates.reference.instruments, cases, dataset, owners, name)
    for index, pair in enumerate(zip(cases, measured, strict=True)):
        chunk.append(pair)
        if len(chunk) == _CHUNK or index == len(cases) - 1:
            yield from _judge(gates, chunk, dataset, records)
            chunk = []


def _judge(
    gates: Gates,
    chunk: Sequence[tuple[Case, Measured | BadInputError]],
    dataset: Dataset,
    records: Mapping[str, SampleRecord] | None,
) -> list[tuple[Case, Verdict]]:
    good = [(case, found) for case, found in chunk if isinstance(found, Measured)]
    wanted = [gates.requested(None if records is None else records[case.case].label) for case, _ in good]
    verdicts = iter(gates.judge([found for _, found in good], wanted))
    judged = []
    for case, found in chunk:
        if isinstance(found, BadInputError):
            reason = hide_folder(" ".join(str(found).split()), dataset.root)
            judged.append((case, Verdict((UNREADABLE,), {}, reason)))
        else:
            judged.append((case, next(verdicts)))
    return judged
