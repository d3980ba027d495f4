"""Folder layouts: MSD, nnU-Net raw (v1, v2), folder + metadata file, plain images and labels.

Each layout becomes one list of cases. Names and headers are looked at, voxels are not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from medgen.data.case import RGB, VAL_SPLITS, Case, Dataset, require_file_name, stem
from medgen.data.io import IMAGE_SUFFIXES
from medgen.data.metadata import find_metadata, read_metadata, with_metadata
from medgen.data.survey import guess_modality, parse_class_names, scan_classes, survey_channels, survey_spatial_dims
from medgen.types import BadInputError

_RGB_NAMES = (["r", "g", "b"], ["red", "green", "blue"], ["rgb_to_0_1"] * 3)  # the last is nnU-Net's normalization
LABEL_ENDINGS = (".nii.gz", ".nii", ".png", ".tiff", ".tif")


def read_dataset(folder: str | Path) -> Dataset:
    """List the cases of a folder in any supported layout.

    Args:
        folder: MSD or nnU-Net (v1, v2) folder with ``dataset.json``, where texts and facts of the cases may lie beside
            it in ``metadata.csv`` or ``metadata.jsonl``; folder with either of these alone; or folder with ``images/``
            and ``labels/`` of the same names.

    Returns:
        The data set; no voxels are read, unless a folder without ``dataset.json`` has no ``classes.json`` either: then
        every label map is scanned once for its values.

    Raises:
        BadInputError: If the folder is missing, has none of these layouts, or its list of cases cannot be used.
    """
    root = Path(folder)
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing there"
        raise BadInputError(f"{root}: expected a folder of scans, got {got}. Check the path.")
    if (root / "dataset.json").is_file():
        return _read_dataset_json(root)
    cases, layout = _undeclared_cases(root)
    channel_names, notes = survey_channels(cases)
    modalities = {case.meta["modality"] for case in cases if case.meta.get("modality")}
    modality = modalities.pop() if len(modalities) == 1 else "RGB" if channel_names == RGB else None
    if modality and len(channel_names) == 1:
        channel_names = {0: modality}
    return Dataset(
        root=root,
        format=layout,
        cases=cases,
        class_names=_declared_classes(root) or scan_classes(root, cases),
        channel_names=channel_names,
        modality=modality,
        spatial_dims=survey_spatial_dims(cases),
        synthetic=bool(cases) and all(case.meta.get("synthetic") == "true" for case in cases),
        notes=notes,
    )


def label_splits(folder: str | Path) -> dict[Path, str]:
    """Splits of the label maps of a folder that lies in a data set.

    Args:
        folder: Folder of label maps, as for :func:`read_labels`.

    Returns:
        Resolved path to the name of its split, ``train`` where only others are named. Empty where the folder above is
        no data set, or one without splits.
    """
    cases = _split_cases_around(folder)
    return {case.label.resolve(): case.split or "train" for case in cases if case.label is not None}


def image_splits(folder: str | Path) -> dict[Path, str]:
    """Splits of the scans of a folder that lies in a data set.

    Args:
        folder: Folder of scans, one file each or one per channel.

    Returns:
        Resolved path to the name of its split, as :func:`label_splits` gives it for label maps.
    """
    cases = _split_cases_around(folder)
    return {path.resolve(): case.split or "train" for case in cases for path in case.images}


def _split_cases_around(folder: str | Path) -> list[Case]:
    """Cases of the data set that a folder lies in; none where it names no splits."""
    root = Path(folder).resolve().parent
    try:
        is_declared = (root / "dataset.json").is_file()
        cases = _read_dataset_json(root).cases if is_declared else _undeclared_cases(root)[0]
    except BadInputError:
        return []
    return cases if any(case.split for case in cases) else []


def _undeclared_cases(root: Path) -> tuple[list[Case], Literal["metadata", "plain"]]:
    """Cases of a folder without ``dataset.json``."""
    metadata = find_metadata(root)
    if metadata is None and not (root / "images").is_dir():
        raise BadInputError(
            f"{root}: expected dataset.json (MSD, nnU-Net), metadata.csv, metadata.jsonl, or images/ and labels/, "
            f"got {_listing(root)}. Point at the folder that holds one of them."
        )
    cases = read_metadata(metadata) if metadata else _plain_cases(root)
    cases = _with_listed_splits(root, _checked_names(cases, metadata or root))
    return cases, "metadata" if metadata else "plain"


def is_data_set(folder: str | Path) -> bool:
    """Whether a folder is a whole data set, as :func:`read_dataset` takes it, and not one of label maps alone.

    Args:
        folder: The folder.

    Returns:
        Whether it holds what lists cases, or their images; where files of label maps or scans lie directly in it,
        whether a table of metadata says which of them are label maps.
    """
    root = Path(folder)
    if not root.is_dir():
        return False
    metadata = find_metadata(root)
    if not _files(root, LABEL_ENDINGS):
        return metadata is not None or (root / "dataset.json").is_file() or (root / "images").is_dir()
    try:
        return metadata is not None and any(case.label is not None for case in read_metadata(metadata))
    except BadInputError:  # a table about something else
        return False


def read_labels(folder: str | Path) -> list[tuple[str, Path]]:
    """List the label maps of a plain folder.

    Args:
        folder: Folder of NIfTI, PNG or TIFF label maps, such as ``labels/`` or ``labelsTr/``.

    Returns:
        ``(case, path)`` pairs, by name.

    Raises:
        BadInputError: If the folder is missing, holds no label map, or holds two for one case.
    """
    root = Path(folder)
    if not root.is_dir():
        raise BadInputError(f"{root}: expected a folder of label maps, got none. Check the path.")
    found: dict[str, Path] = {}
    for path in _files(root, LABEL_ENDINGS):
        case = require_file_name(stem(path.name), path)
        if case in found:
            raise BadInputError(f"{path}: expected one label map per case, got {found[case].name} too. Remove one.")
        found[case] = path
    if not found:
        inner = next((root / name for name in ("labelsTr", "labels") if (root / name).is_dir()), None)
        remedy = f"Did you mean {inner}?" if inner else "Point at the folder that holds them."
        raise BadInputError(f"{root}: expected label maps ({', '.join(LABEL_ENDINGS)}), got {_listing(root)}. {remedy}")
    return list(found.items())


def _read_dataset_json(root: Path) -> Dataset:
    path = root / "dataset.json"
    content = _read_json(path)
    v2 = "channel_names" in content or "file_ending" in content
    if not v2 and "training" not in content:
        raise BadInputError(
            f"{path}: expected channel_names and file_ending (nnU-Net v2) or a list named training (MSD, nnU-Net v1), "
            f"got {', '.join(sorted(content)) or 'nothing'}. Complete the file."
        )
    class_names = parse_class_names(path, content.get("labels"))
    key = "channel_names" if v2 else "modality"
    names = content.get(key)
    if not isinstance(names, dict) or sorted(map(str, names)) != sorted(map(str, range(len(names)))) or not names:
        raise BadInputError(f'{path}: expected {key} as {{"0": "MRI", ...}}, got {names!r}. Number channels from 0.')
    channel_names = {index: str(names[str(index)]) for index in range(len(names))}
    if [name.lower() for name in channel_names.values()] in _RGB_NAMES:
        channel_names = dict(RGB)
    if v2:
        cases, layout = _nnunet_cases(root, content), "nnunet"
    else:
        cases, layout = _listed_cases(root, content)
    if not cases:
        remedy = "Check imagesTr and the list."
        if (root / "gates.json").is_file():
            remedy = "The gates accepted no pair: gates.json and gates.png beside it say why."
        raise BadInputError(f"{path}: expected at least one training case, got none. {remedy}")
    count = content.get("numTraining")
    listed = sum(case.split not in VAL_SPLITS for case in cases)
    if count is not None and count != listed:
        warnings.warn(f"{path}: numTraining says {count} case(s), the folder has {listed}", stacklevel=3)
    cases = _checked_names(cases, path)
    metadata = find_metadata(root)
    return Dataset(
        root=root,
        format="nnunet" if layout == "nnunet" else "msd",
        cases=_with_listed_splits(root, with_metadata(cases, metadata) if metadata else cases),
        class_names=class_names,
        channel_names=channel_names,
        modality=guess_modality(channel_names),
        spatial_dims=survey_spatial_dims(cases),
        synthetic=content.get("synthetic") is True,
    )


def _nnunet_cases(root: Path, content: Mapping[str, Any]) -> list[Case]:
    """nnU-Net v2: channels are found by their four-digit suffix, or listed under `dataset`."""
    listed = content.get("dataset")
    if listed is not None:
        try:
            return [
                Case(str(name), tuple(root / path for path in entry["images"]), root / entry["label"])
                for name, entry in listed.items()
            ]
        except (TypeError, KeyError, AttributeError):
            raise BadInputError(
                f"{root / 'dataset.json'}: expected dataset as a table of case: {{images: [...], label: ...}}, "
                "got something else. Correct the file."
            ) from None
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise BadInputError(f'{root / "dataset.json"}: expected file_ending as ".nii.gz", got {ending!r}. Correct it.')
    channels = _channel_files(root / "imagesTr", ending)
    labels = {path.name[: -len(ending)]: path for path in _files(root / "labelsTr", (ending,))}
    for case in labels.keys() - channels.keys():
        channels[case] = [root / "imagesTr" / f"{case}_0000{ending}"]
    return [Case(case, tuple(channels[case]), root / "labelsTr" / f"{case}{ending}") for case in sorted(channels)]


def _listed_cases(root: Path, content: Mapping[str, Any]) -> tuple[list[Case], str]:
    """MSD and nnU-Net v1 share the list; v1 leaves the channel suffix out of it."""
    rows: list[tuple[str, str, str | None]] = []
    for key, split in (("training", None), ("validation", "val"), ("val", "val")):
        for position, entry in enumerate(content.get(key) or []):
            try:
                rows.append((entry["image"], entry["label"], split))
                root / entry["image"], root / entry["label"]
            except (TypeError, KeyError):
                raise BadInputError(
                    f"{root / 'dataset.json'}: expected entry {position} of {key} as "
                    f'{{"image": "./imagesTr/x.nii.gz", "label": "./labelsTr/x.nii.gz"}}, got {entry!r}. Correct it.'
                ) from None
    v1: dict[str, list[Path]] = {}
    if rows and not any((root / image).exists() for image, _, _ in rows):
        v1 = _channel_files(root / "imagesTr", ".nii.gz")
    cases = []
    for image, label, split in rows:
        name = stem(Path(image).name)
        cases.append(Case(name, tuple(v1.get(name, [root / image])), root / label, split))
    return cases, "nnunet" if v1 else "msd"


def _plain_cases(root: Path) -> list[Case]:
    labels = dict(read_labels(root / "labels")) if (root / "labels").is_dir() else {}
    images = _files(root / "images", IMAGE_SUFFIXES) + [
        path for path in (root / "images").iterdir() if path.is_dir() and not path.name.startswith(".")
    ]
    cases = [
        Case(name, (path,), labels.pop(name, None))
        for name, path in sorted((path.name if path.is_dir() else stem(path.name), path) for path in images)
    ]
    if not cases:
        raise BadInputError(f"{root / 'images'}: expected scans, got {_listing(root / 'images')}. Put the scans there.")
    if labels:
        orphan = next(iter(labels.values()))
        message = f"{orphan}: expected an image of the same name in {root / 'images'}, got none"
        if all(case.label is None for case in cases):
            raise BadInputError(f"{message}. Give image and label the same name, or list both in metadata.csv.")
        warnings.warn(f"{message} ({len(labels)} such label(s) are left out)", stacklevel=3)
    return cases


def _with_listed_splits(root: Path, cases: list[Case]) -> list[Case]:
    """train.txt, val.txt and test.txt list case names; they count where the folder gives no split otherwise."""
    if any(case.split for case in cases):
        return cases
    known = {case.case for case in cases}
    splits: dict[str, str] = {}
    for split in ("train", "val", "test"):
        path = root / f"{split}.txt"
        for name in path.read_text(encoding="utf-8-sig").split("\n") if path.is_file() else []:
            name = name.strip() if name.strip() in known else stem(name.strip())
            if name and name not in known:
                raise BadInputError(f"{path}: expected names of cases, got {name}. Remove the line or add the case.")
            if splits.get(name, split) != split:
                raise BadInputError(
                    f"{path}: expected {name} in one split, got it in {splits[name]}.txt too. Remove one."
                )
            if name:
                splits[name] = split
    return [replace(case, split=splits.get(case.case)) for case in cases]


def _declared_classes(root: Path) -> dict[int, str] | None:
    path = root / "classes.json"
    return parse_class_names(path, _read_json(path)) if path.is_file() else None


def _channel_files(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Case to its files ``CASE_0000``, ``CASE_0001``, ..., in the order of the channels."""
    cases: dict[str, list[Path]] = {}
    for path in _files(folder, (ending,)):
        name = path.name[: -len(ending)]
        if len(name) < 6 or name[-5] != "_" or not name[-4:].isdigit():
            raise BadInputError(
                f"{path}: expected a name that ends in its channel, such as CASE_0000{ending}, got none. Rename it."
            )
        cases.setdefault(name[:-5], []).append(path)
    for case, paths in cases.items():
        for index, path in enumerate(paths):
            if path.name != f"{case}_{index:04d}{ending}":
                missing = folder / f"{case}_{index:04d}{ending}"
                raise BadInputError(f"{missing}: expected channel {index} of {case}, got none. Add the file.")
    return cases


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files by name; hidden ones (unfinished files, macOS forks) do not count."""
    if not folder.is_dir():
        raise BadInputError(f"{folder}: expected a folder of scans, got none. Check the layout of the data set.")
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(endings) and not path.name.startswith(".") and path.is_file()
    )


def _checked_names(cases: list[Case], source: Path) -> list[Case]:
    seen: set[str] = set()
    for case in cases:
        require_file_name(case.case, source)
        if case.case in seen:
            raise BadInputError(f"{source}: expected one entry per case, got {case.case} twice. Rename or remove one.")
        seen.add(case.case)
    return cases


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: expected JSON, got an error: {error}. Correct the file.") from error
    if not isinstance(content, dict):
        raise BadInputError(f"{path}: expected a JSON object, got {type(content).__name__}. Correct the file.")
    return content


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "an empty folder"
