"""The folders of accepted and of rejected pairs: copied case by case, continued where they were left, and closed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medgen.data.case import RGB, Case, Dataset
from medgen.data.dataset import LABEL_ENDINGS, load_case
from medgen.data.export import SYNTHETIC_MARK, CasePaths, case_paths, write_dataset_json, write_json, write_metadata
from medgen.data.io import write_image, write_label
from medgen.filtering.gates import Verdict
from medgen.filtering.judging import UNREADABLE
from medgen.pictures import contact_sheet
from medgen.provenance import MANIFEST, SampleRecord, atomic_path, explain_full_disk, sha256_file, write_text
from medgen.types import BadInputError

REJECTED = "rejected"
SCORES = "scores.jsonl"
_SHOWN = 12
_CONVERTED = ".nii.gz"


def ending_of(dataset: Dataset) -> str:
    """File type of the output.

    Args:
        dataset: The set that is filtered.

    Returns:
        The type of its files, where all are of one type with one file per channel (or one for all colors) and can be
        copied as they are; ``.nii.gz`` where they have to be converted.
    """
    files = 1 if dataset.channel_names == RGB else len(dataset.channel_names)
    endings = {_ending(path) for case in dataset.cases for path in (*case.images, case.label) if path is not None}
    whole = all(len(case.images) == files for case in dataset.cases)
    (only,) = endings if len(endings) == 1 else ("",)
    return only if whole and only in (".png", ".nii", ".nii.gz") else _CONVERTED


def check_names(dataset: Dataset, ending: str) -> None:
    """Refuse cases that cannot be named in an nnU-Net folder, before the work begins.

    Args:
        dataset: The set that is filtered.
        ending: File type of the output.

    Raises:
        BadInputError: If a name cannot be used.
    """
    for case in dataset.cases:
        case_paths("", case.case, num_files=1, ending=ending)


def put_pair(
    root: Path, case: Case, dataset: Dataset, index: int, verdict: Verdict, record: SampleRecord | None, ending: str
) -> dict[str, Any]:
    """Copy one pair to where it belongs, and note it there.

    Args:
        root: Output folder.
        case: The pair.
        dataset: Its set.
        index: Its place in the set.
        verdict: What the gates say.
        record: From the manifest of the set, if it has one.
        ending: File type of the output.

    Returns:
        The line that was added to the manifest, or to ``scores.jsonl`` where the set has no manifest.

    Raises:
        BadInputError: If a file cannot be read, or the disk is full.
    """
    folder = root if verdict.accepted else root / REJECTED
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rgb = dataset.channel_names == RGB
    files = 1 if rgb and ending == ".png" else len(dataset.channel_names)
    paths = case_paths(folder, case.case, num_files=files, ending=ending)
    sources = [path for path in (*case.images, case.label) if path is not None]
    if [_ending(path) for path in sources] == [ending] * len(paths.files):
        for source, target in zip(sources, paths.files, strict=True):
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
    else:
        try:
            _convert(case, dataset, paths)
        except BadInputError:
            # It was rejected because it cannot be read; its reason says so, and there is nothing to convert.
            paths = CasePaths((), None)
    written = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths.files}
    plain = {"case": case.case, "index": index, "synthetic": dataset.synthetic}
    known = plain if record is None else asdict(record)
    line = {**known, "files": written, "gates": as_json(verdict)}
    _append(folder / _list_name(record), line)
    return line


def as_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a manifest holds it.

    Args:
        verdict: What the gates say.

    Returns:
        ``reasons``, ``scores`` with six digits, and a ``message`` where it cannot be read.
    """
    scores = {code: float(f"{value:.6g}") for code, value in verdict.scores.items() if math.isfinite(value)}
    message = {"message": verdict.message} if verdict.message else {}
    return {"reasons": list(verdict.reasons), "scores": scores, **message}


def read_lines(root: Path, name: str) -> list[dict[str, Any]]:
    """What an earlier run noted of pairs whose files are whole; the rest is dropped from the list.

    Args:
        root: Folder of accepted or of rejected pairs.
        name: ``manifest.jsonl`` or ``scores.jsonl``.

    Returns:
        The lines, each case once.
    """
    path = root / name
    if not path.exists():
        return []
    kept: dict[str, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            files = {root / file: digest for file, digest in line["files"].items()}
            if "gates" in line and all(file.is_file() and sha256_file(file) == sha for file, sha in files.items()):
                kept[line["case"]] = line
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn by an interruption: the pair is simply judged again
    write_lines(path, list(kept.values()))
    return list(kept.values())


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a list of pairs in the order of the set, in one step.

    Args:
        path: The list.
        lines: Its lines.
    """
    ordered = sorted(lines, key=lambda line: line["index"])
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in ordered))


def close_part(root: Path, lines: Sequence[Mapping[str, Any]], dataset: Dataset, ending: str, title: str) -> None:
    """Declare a folder to nnU-Net, list texts and facts of its scans, and draw a contact sheet.

    Args:
        root: Folder of accepted or of rejected pairs.
        lines: Of its list.
        dataset: The set that was filtered.
        ending: File type.
        title: Of the contact sheet.
    """
    whole = [line for line in lines if line["files"]]
    declare(root, dataset, len(whole), ending)
    cases = {case.case: case for case in dataset.cases}
    rows = [_row(line, cases[line["case"]]) for line in whole]
    if dataset.synthetic and any(set(row) - {"id", "file_name", "label"} for row in rows):
        write_metadata(root, rows)
    shown = [cases[line["case"]] for line in whole if not _unreadable(line)]
    shown = shown[:: max(1, -(-len(shown) // _SHOWN))]
    if shown:
        samples = (load_case(case, dataset) for case in shown)
        contact_sheet(samples, root / "contact_sheet.png", class_names=dataset.class_names, title=title)


def declare(root: Path, dataset: Dataset, count: int, ending: str) -> None:
    """Write ``dataset.json``, marked as synthetic where the filtered set is.

    Args:
        root: Folder of accepted or of rejected pairs.
        dataset: The set that was filtered.
        count: Pairs in the folder.
        ending: File type.
    """
    own = dataset.root / "dataset.json"
    details = json.loads(own.read_text(encoding="utf-8-sig")) if own.is_file() else {}
    kept = {key: details[key] for key in ("name", "description", "model", "model_hash", "licence") if key in details}
    if dataset.synthetic:
        write_dataset_json(
            root,
            class_names=dataset.class_names,
            channel_names=dataset.channel_names,
            num_training=count,
            ending=ending,
            name=str(kept.get("name", "medgen")),
            details={**kept, "filtered": True},
        )
        if "description" in kept:  # it says whether scans of patients went in
            written = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
            write_json(root / "dataset.json", {**written, "description": kept["description"]})
        return
    content = {
        "channel_names": {str(index): name for index, name in sorted(dataset.channel_names.items())},
        "labels": {name: value for value, name in sorted(dataset.class_names.items())},
        "numTraining": count,
        "file_ending": ending,
    }
    write_json(root / "dataset.json", {**kept, **content, "filtered": True})


def _row(line: Mapping[str, Any], case: Case) -> dict[str, str]:
    parts: dict[str, list[str]] = {"imagesTr": [], "labelsTr": []}
    for name in line["files"]:
        parts[name.partition("/")[0]].append(name)
    told = {**case.meta, **({"text": case.text} if case.text else {}), **({"group": case.group} if case.group else {})}
    told = {key: value for key, value in told.items() if value and key not in ("synthetic", "file_name", "image", "id")}
    return {**told, "id": line["case"], "file_name": ";".join(parts["imagesTr"]), "label": "".join(parts["labelsTr"])}


def _unreadable(line: Mapping[str, Any]) -> bool:
    return UNREADABLE in line["gates"]["reasons"]


def _convert(case: Case, dataset: Dataset, paths: CasePaths) -> None:
    sample = load_case(case, dataset)
    if sample.image is None or sample.label is None or paths.label is None:
        raise BadInputError(f"{case.case}: expected an image and a label, got one of them only.")
    mark = SYNTHETIC_MARK if dataset.synthetic else ""
    for path, channel in zip(paths.images, sample.image.split(1), strict=True):
        write_image(path, channel, sample.grid, dtype="float32", description=mark)
    write_label(paths.label, sample.label, sample.grid, description=mark)


def _ending(path: Path) -> str:
    return next((ending for ending in LABEL_ENDINGS if path.name.lower().endswith(ending)), path.suffix.lower())


def _list_name(record: SampleRecord | None) -> str:
    return SCORES if record is None else MANIFEST


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with explain_full_disk(path), open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
