"""A filtered set: pairs of a folder judged by gates that are fitted on real scans, and copied to where they belong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from medgen.data.case import Dataset
from medgen.data.dataset import read_dataset
from medgen.data.export import prepare_output, released_on_failure
from medgen.filtering.folder import (
    REJECTED,
    SCORES,
    check_names,
    close_part,
    ending_of,
    put_pair,
    read_lines,
    write_lines,
)
from medgen.filtering.gates import Gate, Gates
from medgen.filtering.judging import judge_cases
from medgen.filtering.source import STEPS, find_reference
from medgen.filtering.summary import write_summary
from medgen.precision import resolve_device
from medgen.provenance import MANIFEST, SampleRecord, read_manifest, sha256_scan
from medgen.types import BadInputError


def filter_pairs(
    input: Path,
    reference: Path,
    output: Path,
    *,
    gates: list[Gate] | None = None,
    real_rejected: float | None = None,
    steps: int = STEPS,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Accept or reject each scan of a labelled set by gates that are fitted on real scans; a rejection has reasons.

    Gates: consistency (segmenters, trained on the real scans of other patients, find each class where the label has
    it), intensity (level and spread of each class), size (volume and share of each class), geometry (spacing, field of
    view, orientation), outlier (how far off the real scan is that looks most alike) and copy (a training scan, also
    mirrored, turned or shifted). A class that is missing always rejects. All scores are held to one level, chosen so
    that all gates together reject no more than `real_rejected` of real scans of new patients.

    What was fitted is kept in a folder beside the output, with `_gates` added to its name, and can be given again as
    the reference. It holds small pictures of the real scans: keep it as you keep those. The same command on the same
    folder continues an interrupted run.

    Args:
        input: Folder of labelled scans, such as the output of ``medgen synthesize``.
        reference: Folder of the labelled real scans; those of its training split count. Where it names no validation
            scans, those are left out that ``medgen train`` and ``medgen utility`` hold out. Or the folder of gates that
            an earlier run fitted.
        output: Folder to write: accepted pairs as an nnU-Net v2 data set, rejected ones likewise in `rejected`, and
            gates.json and gates.png, which say why.
        gates: Gates that judge; by default all, or those that the fitted gates were made with.
        real_rejected: Share of real scans that all gates together may reject; by default 0.05, or that which the fitted
            gates were made with. Fewer than 19 patients, not counting those held out, need a larger one, which makes
            stricter gates: 0.17 with 5 patients, 0.1 with 9.
        steps: Of each of the three segmenters.
        seed: Of the segmenters.
        device: 'auto', 'cpu', 'cuda' or another torch device.
        overwrite: Replace another run's output in the folder.

    Returns:
        What ``gates.json`` holds.

    Raises:
        BadInputError: If a set cannot be used, the sets differ in dimension, channels or classes, a gate cannot run,
            the reference is too small, or the output folder holds something else.
        DivergedError: If a segmenter came to no finite loss.
    """
    output, target = Path(output), resolve_device(device)
    dataset = read_dataset(input)
    for name, path in (("input", Path(input)), ("reference", Path(reference))):
        if path.resolve().is_relative_to(output.resolve()) or output.resolve().is_relative_to(path.resolve()):
            raise BadInputError(
                f"{output}: expected an output folder apart from the {name}, got one inside the other ({path}). "
                "Choose another output folder."
            )
    records = _read_records(dataset)
    ending = ending_of(dataset)
    check_names(dataset, ending)
    trained = gates is None or "consistency" in gates
    source = find_reference(Path(reference), output, steps=steps, seed=seed, consistency=trained)
    source.require_same_kind(dataset.root, dataset.spatial_dims, dataset.channel_names, dataset.class_names)
    chosen, share = source.choose(gates, real_rejected)
    identity = {
        "reference_digest": source.digest,
        "input_sha256": _digest_input(dataset),
        "gates": list(chosen),
        "real_rejected": share,
    }
    claimed = prepare_output(output, identity, overwrite=overwrite) == "new"
    with released_on_failure(output, identity, claimed=claimed):
        fitted = source.fit(chosen, share, target, overwrite=overwrite)
        lines = _judge_all(output, dataset, records, fitted, ending)
    return _close(output, dataset, lines, fitted, ending)


def _read_records(dataset: Dataset) -> dict[str, SampleRecord] | None:
    """Records of the pairs; None where the set has no manifest. Files must be those that it lists."""
    path = dataset.root / MANIFEST
    if not path.exists():
        return None
    records = {record.case: record for record in read_manifest(path)}
    for record in records.values():
        for name, digest in record.files.items():
            if sha256_scan(dataset.root / name) != digest:
                raise BadInputError(
                    f"{dataset.root / name}: expected the file that {MANIFEST} lists, got one with other content. "
                    "Restore it, or filter the set without its manifest."
                )
    unknown = [case.case for case in dataset.cases if case.case not in records]
    if unknown:
        raise BadInputError(
            f"{path}: expected a record of every case, got none of {unknown[0]} ({len(unknown)} in all). Remove the "
            "case, or restore the manifest."
        )
    return records


def _digest_input(dataset: Dataset) -> str:
    files = [[case.case, [sha256_scan(path) for path in (*case.images, case.label) if path]] for case in dataset.cases]
    names = [sorted(dataset.class_names.items()), sorted(dataset.channel_names.items()), dataset.synthetic]
    return hashlib.sha256(json.dumps([files, names]).encode()).hexdigest()


def _judge_all(
    output: Path, dataset: Dataset, records: dict[str, SampleRecord] | None, gates: Gates, ending: str
) -> list[dict[str, Any]]:
    """Judge what no earlier run has judged, and put it where it belongs."""
    name = SCORES if records is None else MANIFEST
    lines = [line for folder in (output, output / REJECTED) for line in read_lines(folder, name)]
    done = {line["case"] for line in lines}
    places = {case.case: index for index, case in enumerate(dataset.cases)}
    todo = [case for case in dataset.cases if case.case not in done]
    if done:
        print(f"{len(done)} of {len(dataset.cases)} pairs are judged already")

    for case, verdict in judge_cases(gates, todo, dataset, records, "filtered"):
        record = None if records is None else records[case.case]
        lines.append(put_pair(output, case, dataset, places[case.case], verdict, record, ending))
    return sorted(lines, key=lambda line: int(line["index"]))


def _close(output: Path, dataset: Dataset, lines: list[dict[str, Any]], gates: Gates, ending: str) -> dict[str, Any]:
    name = MANIFEST if (dataset.root / MANIFEST).exists() else SCORES
    for folder, part, accepted in ((output, "accepted", True), (output / REJECTED, "rejected", False)):
        own = [line for line in lines if accepted != bool(line["gates"]["reasons"])]
        if own or accepted:
            write_lines(folder / name, own)
            title = f"{part}: {len(own)} of {len(lines)} scans of {dataset.root.resolve().name}"
            close_part(folder, own, dataset, ending, title)
    report = write_summary(output, gates, lines, input=dataset.root.resolve().name)
    print(f"accepted pairs in {output}, rejected ones in {output / REJECTED}")
    return report
