"""Samples drawn until as many are accepted as were asked for: the rest goes to `rejected` with its reasons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from scipy.stats import beta

from medgen.data.case import Case, Dataset
from medgen.filtering import Gate, Gates, ReferenceSource, find_reference
from medgen.filtering.folder import REJECTED, as_json, close_part
from medgen.filtering.judging import judge_cases
from medgen.filtering.summary import write_summary
from medgen.generator import Generator
from medgen.provenance import MANIFEST, SampleRecord, append_record, finalize_manifest, salvage_manifest
from medgen.synthesis.folder import is_whole, read_done
from medgen.synthesis.replay import Batch
from medgen.types import BadInputError

_FEWEST_DRAWS, _MOST_PER_SAMPLE = 20, 10
_LEAST_RATE = 0.05  # below this acceptance a run is given up


@dataclass(frozen=True, eq=False)
class Filter:
    """What a run holds its samples to.

    Attributes:
        source: Of the gates.
        options: Which gates judge, and the share of real scans that they may reject.
        wanted: Samples that are to be accepted.
        overwrite: Replace gates of another run's output.
    """

    source: ReferenceSource
    options: tuple[tuple[Gate, ...], float]
    wanted: int
    overwrite: bool

    @classmethod
    def find(cls, reference: Path, output: Path, num_samples: int | None, *, overwrite: bool) -> Self:
        """Look at the reference, before anything is drawn.

        Args:
            reference: Folder of real scans, or of fitted gates.
            output: Folder of the run.
            num_samples: Samples that are to be accepted.
            overwrite: Replace gates of another run's output.

        Returns:
            The filter; nothing is fitted yet.

        Raises:
            BadInputError: If the number is not given, or the reference cannot be used.
        """
        if num_samples is None or num_samples < 1:
            raise BadInputError(
                f"num_samples: expected the number of scans to accept beside filter, got {num_samples}. Give "
                "--num_samples N."
            )
        source = find_reference(Path(reference), output)
        try:
            options = source.choose(None, None)
        except BadInputError as error:
            raise BadInputError(
                f"{error} Such options are given to medgen filter: run it once on any set of such scans, and give the "
                "folder of gates that it leaves beside its output as filter."
            ) from error
        return cls(source, options, num_samples, overwrite)

    @property
    def most_draws(self) -> int:
        """Samples that are drawn at most."""
        return max(_FEWEST_DRAWS, _MOST_PER_SAMPLE * self.wanted)

    def require_model(self, generator: Generator, sources: set[str]) -> None:
        """Refuse a model or a run whose scans the gates cannot judge.

        Args:
            generator: The model.
            sources: Where labels of the run come from.

        Raises:
            BadInputError: If dimension, channels or classes differ, or scans have no label.
        """
        config = generator.config
        names = (config.channel_names, config.class_names)
        self.source.require_same_kind(Path(f"model {config.name}"), config.spatial_dims, *names)
        if "none" in sources:
            raise BadInputError(
                "filter: expected scans with label maps, which the gates judge, got some without. Give --labels FOLDER "
                "or --label_source generate, or filter nothing."
            )


def draw_accepted(
    output: Path,
    chosen: Filter,
    generator: Generator,
    batches: Sequence[Batch],
    make: Callable[[Sequence[Batch]], None],
    wait: Callable[[], None],
    *,
    main: bool,
) -> None:
    """Make batches until enough samples are accepted, or there is no hope; sort what was made.

    Which samples are accepted depends on the seed and the gates alone: the first ones of the plan that pass. What was
    drawn beyond them is removed.

    Args:
        output: Folder of the run.
        chosen: What the samples are held to.
        generator: The model.
        batches: All that may be drawn.
        make: Makes batches that are not in the folder yet, each process its share.
        wait: Waits for all processes.
        main: Whether this process judges.

    Raises:
        BadInputError: If too few samples are accepted; those that were are in the folder, and ``gates.json`` says why.
    """
    device = generator.device
    gates = chosen.source.fit(*chosen.options, device, overwrite=chosen.overwrite) if main else None
    if main:
        _salvage(output / REJECTED)
    wait()
    at = 0
    while True:
        if gates is not None:
            _settle(output, gates, generator)
        wait()
        accepted, rejected = read_done(output), read_done(output / REJECTED)
        wait()  # until all have read, so that all decide alike
        drawn = len(accepted) + len(rejected)
        if len(accepted) >= chosen.wanted or at >= len(batches) or _is_hopeless(len(accepted), drawn):
            break
        rate = (len(accepted) + 1) / (drawn + 1)
        count = math.ceil((chosen.wanted - len(accepted)) / rate / max(len(batches[0].wanted), 1))
        done = {record.case for record in [*accepted, *rejected]}
        while at < len(batches) and batches[at].wanted <= done:
            at += 1
        make(batches[at : at + count])
        at += count
        wait()
    if gates is not None:
        _finish(output, gates, generator, chosen.wanted)
    wait()


def close_gated(output: Path, chosen: Filter, generator: Generator) -> None:
    """Describe the rejected samples, and refuse to call a run done that has too few accepted ones.

    Args:
        output: Folder of the run; its accepted samples are described.
        chosen: What the samples were held to.
        generator: The model.

    Raises:
        BadInputError: If too few samples were accepted.
    """
    accepted, rejected = read_done(output), read_done(output / REJECTED)
    if rejected:
        lines = [{"case": r.case, "index": r.index, "files": r.files, "gates": r.gates} for r in rejected]
        dataset = _dataset(output / REJECTED, rejected, generator)
        ending = "".join(Path(next(iter(rejected[0].files))).suffixes[-2:])
        title = f"rejected: {len(rejected)} of {len(accepted) + len(rejected)} synthetic scans"
        close_part(output / REJECTED, lines, dataset, ending, title)
    if len(accepted) < chosen.wanted:
        drawn = len(accepted) + len(rejected)
        reasons = Counter(reason for record in rejected for reason in record.gates["reasons"])
        words = ", ".join(f"{name} {count / drawn:.0%}" for name, count in reasons.most_common(5))
        raise BadInputError(
            f"{output}: expected {chosen.wanted} accepted scans, got {len(accepted)} of {drawn} drawn (at most "
            f"{chosen.most_draws} are, and fewer where less than {_LEAST_RATE:.0%} pass). Failed: {words}. Look at "
            f"{output / 'gates.png'} and {output / REJECTED}; train the model longer, give label maps like those of "
            "the reference, or ask for fewer scans."
        )


def _is_hopeless(accepted: int, drawn: int) -> bool:
    """Whether the acceptance is below what is worth drawing for, with 95 % confidence (Clopper and Pearson 1934)."""
    return drawn >= _FEWEST_DRAWS and float(beta.ppf(0.95, accepted + 1, drawn - accepted)) < _LEAST_RATE


def _salvage(folder: Path) -> None:
    """Of an interrupted run keep the rejected samples whose files are whole; the others are judged again."""
    records = salvage_manifest(folder / MANIFEST)
    whole = [record for record in records if is_whole(folder, record)]
    if len(whole) < len(records):
        finalize_manifest(folder / MANIFEST, whole)


def _settle(output: Path, gates: Gates, generator: Generator) -> None:
    """Judge what is in the folder and was not judged; take what fails out of it."""
    records = read_done(output)
    moved = {record.case for record in read_done(output / REJECTED)}
    kept = [record for record in records if record.gates and record.case not in moved]
    new = {record.case: record for record in records if not record.gates and record.case not in moved}
    if not new:
        return
    dataset = _dataset(output, list(new.values()), generator)
    for case, verdict in judge_cases(gates, dataset.cases, dataset, new, "drawn"):
        record = replace(new[case.case], gates=as_json(verdict))
        if verdict.accepted:
            kept.append(record)
            continue
        for name in record.files:
            (output / REJECTED / name).parent.mkdir(parents=True, exist_ok=True)
        append_record(output / REJECTED / MANIFEST, record)
        for name in record.files:
            (output / name).replace(output / REJECTED / name)
    finalize_manifest(output / MANIFEST, kept)


def _finish(output: Path, gates: Gates, generator: Generator, wanted: int) -> None:
    """Drop what was drawn beyond the last accepted sample that was asked for, and say what came of the rest."""
    accepted, rejected = (sorted(read_done(folder), key=lambda r: r.index) for folder in (output, output / REJECTED))
    if len(accepted) >= wanted:
        last = accepted[wanted - 1].index
        for folder, records in ((output, accepted), (output / REJECTED, rejected)):
            if not records:
                continue
            finalize_manifest(folder / MANIFEST, [record for record in records if record.index <= last])
            for record in records:
                for name in record.files if record.index > last else ():
                    (folder / name).unlink(missing_ok=True)
        accepted, rejected = read_done(output), read_done(output / REJECTED)
    lines: list[dict[str, Any]] = [{"gates": record.gates} for record in [*accepted, *rejected]]
    write_summary(output, gates, lines, model=generator.config.name, wanted=wanted)


def _dataset(folder: Path, records: Sequence[SampleRecord], generator: Generator) -> Dataset:
    """The samples of some records as a data set."""
    config = generator.config
    cases = []
    for record in records:
        images, labels = ([folder / n for n in sorted(record.files) if n.startswith(p)] for p in ("images", "labels"))
        cases.append(Case(record.case, tuple(images), next(iter(labels), None), text=record.conditions.get("text")))
    return Dataset(
        root=folder,
        format="nnunet",
        cases=cases,
        class_names=dict(config.class_names),
        channel_names=dict(config.channel_names),
        modality=config.modality,
        spatial_dims=config.spatial_dims,
        synthetic=True,
    )
