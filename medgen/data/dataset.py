"""Folders of labelled scans as one list of cases: MSD, nnU-Net raw, folder + metadata file, plain images and labels.

Reading a folder looks at names and headers only; voxels are read, and checked, case by case.
"""

from __future__ import annotations

import csv
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import tifffile
import torch
from nibabel.filebasedimages import ImageFileError
from PIL import Image

from medgen.data.io import IMAGE_SUFFIXES, read_grid, read_image, read_label
from medgen.seeding import derive_seed
from medgen.types import BadInputError, Grid, Sample

RGB = {0: "R", 1: "G", 2: "B"}
_RGB_NAMES = (["r", "g", "b"], ["red", "green", "blue"], ["rgb_to_0_1"] * 3)  # the last is nnU-Net's normalization
LABEL_ENDINGS = (".nii.gz", ".nii", ".png", ".tiff", ".tif")
_ID_COLUMNS = ("id", "case", "case_id")
_IMAGE_COLUMNS = ("image", "file_name", "images", "path")
_LABEL_COLUMNS = ("label", "mask", "segmentation")
_TEXT_COLUMNS = ("text", "caption", "report")
_GROUP_COLUMNS = ("group", "patient", "patient_id", "subject", "subject_id")
_TRAIN, _VAL = ("train", "training"), ("val", "valid", "validation", "dev")
_MR_NAMES = ("MR", "MRI", "T1", "T1W", "T1C", "T1GD", "T1CE", "T2", "T2W", "FLAIR", "ADC", "DWI", "PD")
# More values than this in a folder that declares no classes are instance numbers or gray levels, not classes.
_MOST_UNDECLARED_CLASSES = 64
# Headers that are read to learn what a folder holds; every scan is held to it when it is loaded.
_SURVEYED_CASES = 20


@dataclass(frozen=True)
class Case:
    """Files of one scan.

    Attributes:
        case: Identifier, unique within the data set.
        images: One file per channel, or one file that holds every channel.
        label: Label map, or None where the scan has none.
        split: ``train``, ``val`` or another name that the data set gives, or None.
        group: Patient or group that must not be torn apart by a split, or None.
        text: Free text that describes the scan, or None.
        meta: Every further column of the data set.
    """

    case: str
    images: tuple[Path, ...]
    label: Path | None = None
    split: str | None = None
    group: str | None = None
    text: str | None = None
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """A case that was left out.

    Attributes:
        case: Identifier of the case.
        reason: The error message, which names the file.
    """

    case: str
    reason: str


@dataclass
class Dataset:
    """A folder of scans.

    Attributes:
        root: The folder.
        format: How the folder is laid out.
        cases: The scans, in the order of the folder's own list or else by name.
        class_names: Label value to name, consecutive from 0, which is the background.
        channel_names: Channel index to name.
        modality: ``CT``, ``MR``, ``RGB``, another name that the data set gives, or None.
        spatial_dims: 2 or 3.
        synthetic: True where the folder declares itself synthetic.
        notes: What a reader of the plan should know, such as gray images in a set of RGB images.
        rejected: Cases that :func:`load_cases` left out.
    """

    root: Path
    format: Literal["msd", "nnunet", "metadata", "plain"]
    cases: list[Case]
    class_names: dict[int, str]
    channel_names: dict[int, str]
    modality: str | None
    spatial_dims: int
    synthetic: bool = False
    notes: list[str] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


def read_dataset(folder: str | Path) -> Dataset:
    """List the cases of a folder in any supported layout.

    Args:
        folder: MSD or nnU-Net (v1, v2) folder with ``dataset.json``, folder with ``metadata.csv`` or
            ``metadata.jsonl``, or folder with ``images/`` and ``labels/`` of the same names.

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
    metadata = [root / name for name in ("metadata.csv", "metadata.jsonl") if (root / name).is_file()]
    if len(metadata) > 1:
        raise BadInputError(f"{root}: expected metadata.csv or metadata.jsonl, got both. Remove one of them.")
    if metadata:
        cases, layout = _metadata_cases(metadata[0]), "metadata"
    elif (root / "images").is_dir():
        cases, layout = _plain_cases(root), "plain"
    else:
        raise BadInputError(
            f"{root}: expected dataset.json (MSD, nnU-Net), metadata.csv, metadata.jsonl, or images/ and labels/, "
            f"got {_listing(root)}. Point at the folder that holds one of them."
        )
    cases = _with_listed_splits(root, _unique(cases, root))
    channel_names, notes = _survey_channels(cases)
    modalities = {case.meta["modality"] for case in cases if case.meta.get("modality")}
    modality = modalities.pop() if len(modalities) == 1 else "RGB" if channel_names == RGB else None
    if modality and len(channel_names) == 1:
        channel_names = {0: modality}
    return Dataset(
        root=root,
        format="metadata" if layout == "metadata" else "plain",
        cases=cases,
        class_names=_declared_classes(root) or _scan_classes(root, cases),
        channel_names=channel_names,
        modality=modality,
        spatial_dims=_spatial_dims(cases),
        notes=notes,
    )


def load_case(case: Case, dataset: Dataset) -> Sample:
    """Read one case and check it against its data set.

    Args:
        case: One of ``dataset.cases``.
        dataset: The data set, for its channels, classes and dimension.

    Returns:
        Image ``(C, H, W[, D])`` in source units and label ``(H, W[, D])``, or None, on one grid. A gray image of an
        RGB set gets three equal channels. A label whose axes are stored in another order than the image's (usual for
        a DICOM series with a NIfTI label) is reordered, which moves no voxel in space.

    Raises:
        BadInputError: If a file is missing or damaged, if channels, shapes or affines disagree, if the image is
            constant, or if the label is empty or has a value outside the classes.
    """
    parts = [read_image(path) for path in case.images]
    image, grid = parts[0]
    source = case.images[0]
    if grid.spatial_dims != dataset.spatial_dims:
        raise BadInputError(
            f"{source}: expected a {dataset.spatial_dims}D scan as in the rest of the folder, "
            f"got {grid.spatial_dims}D of shape {grid.shape}. Keep 2D and 3D scans in separate folders."
        )
    for path, (_, other) in zip(case.images[1:], parts[1:], strict=True):
        _require_same_grid(path, other, source, grid)
    image = torch.cat([part for part, _ in parts])
    expected = len(dataset.channel_names)
    rgb = dataset.channel_names == RGB
    if rgb and image.shape[0] == 1 and not grid.known:
        image = image.expand(3, *grid.shape).clone()
    if image.shape[0] != expected:
        names = ", ".join(dataset.channel_names.values())
        raise BadInputError(
            f"{source}: expected {expected} channel(s) ({names}), got {image.shape[0]} in {len(case.images)} file(s). "
            "Add the missing channel files or correct the channel names of the data set."
        )
    # One empty color is common (a fluorescence stain stored as RGB); an empty MR or CT channel is a broken scan.
    for index, channel in enumerate(image.flatten()[None] if rgb else image):
        if channel.min() == channel.max():
            path = case.images[index] if len(case.images) == expected else source
            raise BadInputError(
                f"{path}: expected an image with contrast, got the constant value {channel.flatten()[0].item():g}"
                f"{'' if rgb else f' in channel {index}'}. Replace or remove this scan."
            )
    label = None
    if case.label is not None:
        label, label_grid = read_label(case.label)
        label, label_grid = _reorder_axes(label, label_grid, grid)
        _require_same_grid(case.label, label_grid, source, grid)
        _require_classes(case.label, label, dataset.class_names)
    return Sample(case=case.case, grid=grid, image=image, label=label, text=case.text, meta=dict(case.meta))


def load_cases(dataset: Dataset, cases: Iterable[Case], *, skip_bad: bool = False) -> Iterator[Sample]:
    """Read cases one after another.

    Args:
        dataset: The data set that the cases belong to.
        cases: The cases to read.
        skip_bad: Note a bad case in ``dataset.rejected`` and go on, in place of raising.

    Yields:
        The samples, as :func:`load_case` gives them.

    Raises:
        BadInputError: At the first bad case without ``skip_bad``; with it, if no case at all is good.
    """
    good, bad = 0, []
    for case in cases:
        try:
            sample = load_case(case, dataset)
        except BadInputError as error:
            if not skip_bad:
                raise
            bad.append(Rejection(case.case, str(error)))
            # A second pass over the same cases must not list them twice.
            if bad[-1] not in dataset.rejected:
                dataset.rejected.append(bad[-1])
            continue
        good += 1
        yield sample
    if bad and not good:
        raise BadInputError(
            f"{dataset.root}: expected at least one good case, got {len(bad)} bad ones; the first: {bad[0].reason}"
        )


def split_cases(dataset: Dataset, *, val_fraction: float = 0.15, seed: int = 0) -> tuple[list[Case], list[Case]]:
    """Cases for training and for validation.

    Args:
        dataset: The data set. Where it names a validation split, that split is used, and cases without any split go to
            training. Cases of other splits (``test``) go to neither.
        val_fraction: Least share of the cases that is set aside where the data set names no validation split.
        seed: Chooses which patients or groups are set aside; one group never lies in both parts.

    Returns:
        ``(train, val)``, each in the order of ``dataset.cases``.

    Raises:
        BadInputError: If a part would be empty.
    """
    if not 0 < val_fraction < 1:
        raise BadInputError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}. Try 0.15.")
    train = [case for case in dataset.cases if case.split is None or case.split in _TRAIN]
    val = [case for case in dataset.cases if case.split in _VAL]
    if val:
        torn = {case.group for case in train if case.group} & {case.group for case in val if case.group}
        if torn:
            warnings.warn(
                f"{dataset.root}: the given split puts {len(torn)} group(s) in both parts, such as {min(torn)}: "
                "validation figures will be too good",
                stacklevel=2,
            )
    else:
        groups: dict[str, list[Case]] = {}
        for case in train:
            groups.setdefault(case.group or case.case, []).append(case)
        wanted = val_fraction * len(train)
        # Drawn by hash, so that a group's place does not depend on the order of the files.
        for name in sorted(groups, key=lambda name: derive_seed(seed, "split", name))[: len(groups) - 1]:
            if len(val) >= wanted:
                break
            val.extend(groups[name])
        held_out = {case.case for case in val}
        val = [case for case in train if case.case in held_out]
        train = [case for case in train if case.case not in held_out]
    if not train or not val:
        raise BadInputError(
            f"{dataset.root}: expected cases for training and for validation, got {len(train)} and {len(val)} "
            "(cases of one patient or group stay together). Add cases, or list them in train.txt and val.txt."
        )
    return train, val


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
        case = _stem(path.name)
        if case in found:
            raise BadInputError(f"{path}: expected one label map per case, got {found[case].name} too. Remove one.")
        found[case] = path
    if not found:
        inner = next((root / name for name in ("labelsTr", "labels") if (root / name).is_dir()), None)
        remedy = f"Did you mean {inner}?" if inner else "Point at the folder that holds them."
        raise BadInputError(f"{root}: expected label maps ({', '.join(LABEL_ENDINGS)}), got {_listing(root)}. {remedy}")
    return list(found.items())


def load_label(path: str | Path, class_names: Mapping[int, str], *, case: str | None = None) -> Sample:
    """Read one label map and check its values.

    Args:
        path: NIfTI, PNG or TIFF file.
        class_names: The classes that the model knows, 0 being the background.
        case: Identifier of the sample; without one, the name of the file.

    Returns:
        A sample with a label and no image.

    Raises:
        BadInputError: If the file is missing or damaged, if the label is empty or has a value outside the classes.
    """
    path = Path(path)
    label, grid = read_label(path)
    _require_classes(path, label, class_names)
    return Sample(case=case or _stem(path.name), grid=grid, label=label)


def require_spacing(path: str | Path, grid: Grid, spacing: Sequence[float], *, tolerance: float = 0.01) -> None:
    """Check a scan against a model that works at one voxel size and does not resample.

    Args:
        path: File that the grid was read from, for the message.
        grid: Grid of the scan. A grid of unknown spacing passes.
        spacing: Voxel edge lengths of the model in mm, in the array order of the scan.
        tolerance: Largest relative difference that passes.

    Raises:
        BadInputError: If the spacing differs.
    """
    if grid.known and not np.allclose(grid.spacing, spacing, rtol=tolerance, atol=0):
        raise BadInputError(
            f"{path}: expected the model's voxel size {_millimeters(spacing)}, got {_millimeters(grid.spacing)}. "
            "Resample the scan, or train with a spacing in the plan, so that medgen resamples every scan to it."
        )


def _read_dataset_json(root: Path) -> Dataset:
    path = root / "dataset.json"
    content = _read_json(path)
    v2 = "channel_names" in content or "file_ending" in content
    if not v2 and "training" not in content:
        raise BadInputError(
            f"{path}: expected channel_names and file_ending (nnU-Net v2) or a list named training (MSD, nnU-Net v1), "
            f"got {', '.join(sorted(content)) or 'nothing'}. Complete the file."
        )
    class_names = _class_names(path, content.get("labels"))
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
        raise BadInputError(f"{path}: expected at least one training case, got none. Check imagesTr and the list.")
    count = content.get("numTraining")
    listed = sum(case.split not in _VAL for case in cases)
    if count is not None and count != listed:
        warnings.warn(f"{path}: numTraining says {count} case(s), the folder has {listed}", stacklevel=3)
    return Dataset(
        root=root,
        format="nnunet" if layout == "nnunet" else "msd",
        cases=_with_listed_splits(root, _unique(cases, path)),
        class_names=class_names,
        channel_names=channel_names,
        modality=_modality(channel_names),
        spatial_dims=_spatial_dims(cases),
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
        name = _stem(Path(image).name)
        cases.append(Case(name, tuple(v1.get(name, [root / image])), root / label, split))
    return cases, "nnunet" if v1 else "msd"


def _metadata_cases(path: Path) -> list[Case]:
    root = path.parent
    cases = []
    for line, row in _rows(path):
        values = {key: value for key, value in row.items() if value not in (None, "", [])}
        image_key = _first(row, _IMAGE_COLUMNS)
        if image_key is None:
            raise BadInputError(
                f"{path}: expected a column named {' or '.join(_IMAGE_COLUMNS)}, got {', '.join(map(str, row))}. "
                "Rename the column that names the image file."
            )
        image = values.get(image_key)
        if image is None:
            raise BadInputError(f"{path}, line {line}: expected a file in {image_key}, got nothing. Fill it in.")
        images = image if isinstance(image, list) else str(image).split(";")
        label_key, id_key = _first(values, _LABEL_COLUMNS), _first(values, _ID_COLUMNS)
        text_key, group_key = _first(values, _TEXT_COLUMNS), _first(values, _GROUP_COLUMNS)
        name = "_".join(Path(_stem(str(images[0]))).parts)
        taken = {image_key, label_key, id_key, text_key, "split"}
        split = values.get("split")
        cases.append(
            Case(
                case=str(values[id_key]) if id_key else name.removeprefix("images_"),
                images=tuple(root / str(part).strip() for part in images),
                label=root / str(values[label_key]) if label_key else None,
                split=str(split).strip().lower() if split else None,
                group=str(values[group_key]) if group_key else None,
                text=str(values[text_key]) if text_key else None,
                meta={str(key): str(value) for key, value in values.items() if key not in taken},
            )
        )
    if not cases:
        raise BadInputError(f"{path}: expected at least one row, got none. List the scans in it.")
    return cases


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and columns of each row of a CSV or JSON lines file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    if None in row or None in row.values():
                        raise BadInputError(
                            f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or [])} columns as in "
                            "the header, got another number. Quote values that contain commas."
                        )
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise BadInputError(
                            f"{path}, line {number}: expected a JSON object, got {line.strip()[:40]}. Fix it."
                        )
                    yield number, record
    except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
        kind = "CSV" if path.suffix == ".csv" else "one JSON object per line"
        raise BadInputError(f"{path}: expected {kind} in UTF-8, got an error: {error}. Correct the file.") from error


def _plain_cases(root: Path) -> list[Case]:
    labels = dict(read_labels(root / "labels")) if (root / "labels").is_dir() else {}
    images = _files(root / "images", IMAGE_SUFFIXES) + [
        path for path in (root / "images").iterdir() if path.is_dir() and not path.name.startswith(".")
    ]
    cases = [
        Case(name, (path,), labels.pop(name, None))
        for name, path in sorted((path.name if path.is_dir() else _stem(path.name), path) for path in images)
    ]
    if not cases:
        raise BadInputError(f"{root / 'images'}: expected scans, got {_listing(root / 'images')}. Put the scans there.")
    if labels:
        orphan = next(iter(labels.values()))
        message = f"{orphan}: expected an image of the same name in {root / 'images'}, got none"
        if all(case.label is None for case in cases):
            raise BadInputError(f"{message}. Give image and label the same name, or list both in metadata.csv.")
        warnings.warn(f"{message} ({len(labels)} such label(s) are left out)", stacklevel=4)
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
            name = name.strip() if name.strip() in known else _stem(name.strip())
            if name and name not in known:
                raise BadInputError(f"{path}: expected names of cases, got {name}. Remove the line or add the case.")
            if splits.get(name, split) != split:
                raise BadInputError(
                    f"{path}: expected {name} in one split, got it in {splits[name]}.txt too. Remove one."
                )
            if name:
                splits[name] = split
    return [
        Case(case.case, case.images, case.label, splits.get(case.case), case.group, case.text, case.meta)
        for case in cases
    ]


def _declared_classes(root: Path) -> dict[int, str] | None:
    path = root / "classes.json"
    return _class_names(path, _read_json(path)) if path.is_file() else None


def _class_names(path: Path, labels: object) -> dict[int, str]:
    """Value to name, from {"0": "background"} (MSD) or {"background": 0} (nnU-Net v2)."""
    shape = '{"background": 0, "organ": 1, ...} or {"0": "background", "1": "organ", ...}'
    if not isinstance(labels, dict) or not labels:
        raise BadInputError(f"{path}: expected labels as {shape}, got {labels!r}. Declare the classes.")
    names: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value, list):
            raise BadInputError(
                f"{path}: expected one label value per class, got the region {key}: {value}. "
                "Overlapping regions are not supported: declare the values that the label maps hold, one by one."
            )
        number, name = (value, key) if not isinstance(value, str) else (key, value)
        try:
            index = int(number)
        except (TypeError, ValueError):
            raise BadInputError(f"{path}: expected labels as {shape}, got {key!r}: {value!r}. Correct it.") from None
        if str(name).lower() == "ignore":
            raise BadInputError(
                f"{path}: expected fully labelled scans, got the class ignore ({index}). "
                "Give the ignored voxels a class, or leave out the scans that have them."
            )
        if index in names:
            raise BadInputError(f"{path}: expected one name per label value, got two for {index}. Remove one.")
        names[index] = str(name)
    if sorted(names) != list(range(len(names))):
        raise BadInputError(
            f"{path}: expected label values 0, 1, 2, ... without gaps, got {sorted(names)}. Renumber the label maps."
        )
    return dict(sorted(names.items()))


def _scan_classes(root: Path, cases: Iterable[Case]) -> dict[int, str]:
    """Classes of a folder that declares none. Damaged labels are passed over: loading their case reports them."""
    values: set[int] = {0}
    for case in cases:
        try:
            found = set() if case.label is None else set(np.unique(read_label(case.label)[0].numpy()).tolist())
        except BadInputError:
            continue
        if len(found) > _MOST_UNDECLARED_CLASSES:
            raise BadInputError(
                f"{case.label}: expected at most {_MOST_UNDECLARED_CLASSES} classes, got {len(found)} values. "
                "Is it an image, or a map of instances? Give class indices, or declare the classes in classes.json."
            )
        values |= found
    if sorted(values) != list(range(len(values))):
        raise BadInputError(
            f"{root}: expected label values 0, 1, 2, ... without gaps, got {sorted(values)}. "
            "Renumber the label maps, or declare unused classes in classes.json."
        )
    return {value: "background" if value == 0 else f"class_{value}" for value in sorted(values)}


def _survey_channels(cases: Sequence[Case]) -> tuple[dict[int, str], list[str]]:
    """Channel names of a folder that declares none, from the headers; broken files are left for load_case to report."""
    counts: Counter[int] = Counter()
    for case in cases:
        pictures = len(case.images) == 1 and case.images[0].suffix.lower() in (".png", ".tif", ".tiff")
        # Only pictures mix gray and RGB, so only they are looked at one by one.
        if not pictures and counts.total() == _SURVEYED_CASES:
            break
        try:
            counts[sum(_count_channels(path) for path in case.images)] += 1
        except (OSError, ValueError, ImageFileError):
            continue
    if pictures and set(counts) in ({3}, {1, 3}):
        mixed = f"{counts[1]} gray and {counts[3]} RGB images: gray ones are read as RGB of equal channels"
        return dict(RGB), [mixed] if counts[1] else []
    count = counts.most_common(1)[0][0] if counts else 1
    return ({index: f"channel_{index}" for index in range(count)} if count > 1 else {0: "image"}), []


def _count_channels(path: Path) -> int:
    if path.name.endswith((".nii", ".nii.gz")):
        shape: tuple[int, ...] = nib.load(path).shape  # type: ignore[attr-defined]
        return shape[3] if len(shape) > 3 else 1
    if path.suffix.lower() in (".tif", ".tiff"):
        # Pillow cannot open 16-bit RGB TIFF.
        with tifffile.TiffFile(path) as tiff:
            return int(tiff.pages.first.samplesperpixel)
    if path.suffix.lower() == ".png":
        with Image.open(path) as picture:
            return len(picture.getbands())
    return 1


def _spatial_dims(cases: Sequence[Case]) -> int:
    """Dimension of most of the first cases, so that one broken or foreign file does not decide it."""
    found: Counter[int] = Counter()
    first: BadInputError | None = None
    for case in cases:
        try:
            found[read_grid(case.images[0]).spatial_dims] += 1
        except BadInputError as error:
            first = first or error
        if found.total() == _SURVEYED_CASES:
            break
    if not found:
        raise first or BadInputError("expected at least one case, got none. Add scans to the folder.")
    return found.most_common(1)[0][0]


def _modality(channel_names: Mapping[int, str]) -> str | None:
    names = {name.upper() for name in channel_names.values()}
    if names == {"R", "G", "B"}:
        return "RGB"
    if names <= set(_MR_NAMES):
        return "MR"
    return names.pop() if len(names) == 1 else None


def _reorder_axes(label: torch.Tensor, grid: Grid, target: Grid) -> tuple[torch.Tensor, Grid]:
    """Bring the label's axes into the image's order and direction; the voxels stay where they are in space."""
    if not (grid.known and target.known and grid.spatial_dims == target.spatial_dims == 3):
        return label, grid
    orientations = nib.orientations
    turn = orientations.ornt_transform(nib.io_orientation(grid.affine), nib.io_orientation(target.affine))
    if np.array_equal(turn, [[0, 1], [1, 1], [2, 1]]):
        return label, grid
    array = np.ascontiguousarray(orientations.apply_orientation(label.numpy(), turn))
    affine = grid.affine @ orientations.inv_ornt_aff(turn, grid.shape)
    return torch.from_numpy(array), Grid(array.shape, affine, grid.known)


def _require_same_grid(path: Path, grid: Grid, source: Path, expected: Grid) -> None:
    if grid.shape != expected.shape:
        raise BadInputError(
            f"{path}: expected shape {expected.shape} as in {source}, got {grid.shape}. "
            "Resample one onto the grid of the other."
        )
    if grid.known != expected.known:
        raise BadInputError(
            f"{path}: expected a file {'with' if expected.known else 'without'} an affine as {source}, "
            "got the other kind. Store image and label in the same format."
        )
    if grid.known:
        corners = np.array([*itertools.product(*((0, size - 1) for size in grid.shape))], dtype=np.float64)
        axes = grid.spatial_dims
        shift = corners @ (grid.affine - expected.affine)[:3, :axes].T + (grid.affine - expected.affine)[:3, 3]
        # A tenth of a voxel lets rounded headers pass and no shift that a segmenter could see.
        off = float(np.linalg.norm(shift, axis=1).max())
        if off > 0.1 * min(expected.spacing):
            raise BadInputError(
                f"{path}: expected the affine of {source}, got one that puts voxels up to {off:.3g} mm elsewhere. "
                "Resample one onto the grid of the other, or correct the header."
            )


def _require_classes(path: Path, label: torch.Tensor, class_names: Mapping[int, str]) -> None:
    values = np.unique(label.numpy())
    unknown = [int(value) for value in values if int(value) not in class_names]
    if unknown:
        known = ", ".join(f"{value} ({name})" for value, name in sorted(class_names.items()))
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise BadInputError(f"{path}: expected label values {known}, got {shown}. Correct the label or the classes.")
    if not values.any():
        raise BadInputError(
            f"{path}: expected at least one voxel of a class other than background, got an empty label. "
            "Correct or remove this case."
        )


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


def _unique(cases: list[Case], source: Path) -> list[Case]:
    seen: set[str] = set()
    for case in cases:
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


def _stem(name: str) -> str:
    return next((name[: -len(ending)] for ending in IMAGE_SUFFIXES if name.lower().endswith(ending)), name)


def _first(columns: Iterable[str], wanted: Sequence[str]) -> str | None:
    present = set(columns)
    return next((name for name in wanted if name in present), None)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "an empty folder"


def _millimeters(spacing: Sequence[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in spacing) + " mm"
