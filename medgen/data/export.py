"""Write scans as an nnU-Net v2 raw folder, or with a metadata table, that says of itself that it is synthetic.

Every file is written under a temporary name and renamed, and a case's label comes last: a case with a label is whole.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from medgen.data.dataset import LABEL_ENDINGS, RGB
from medgen.data.io import ImageDtype, write_image, write_label
from medgen.provenance import write_text
from medgen.types import BadInputError, Grid

RUN_FILE = "run.json"
# Stays in every image and label, also where it is copied out of its folder.
SYNTHETIC_MARK = "medgen synthetic, not a patient"
EDITED_MARK = "medgen synthetic, made from the scan of a patient"
# What a run may leave in its folder: `overwrite` removes these and nothing else.
_OWN_NAMES = (
    "imagesTr",
    "labelsTr",
    "dataset.json",
    "metadata.csv",
    "classes.json",
    "manifest.jsonl",
    "contact_sheet.png",
    "README.md",
    "rejected",
    "scores.jsonl",
    "gates.json",
    "gates.png",
    RUN_FILE,
)
# A training run keeps a `run.json` too, and one of these beside it.
_TRAINING_NAMES = ("plan.yaml", "checkpoints")
_CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class CasePaths:
    """Files of one written case.

    Attributes:
        images: One file per channel, or a single one for RGB.
        label: The label map, or None where the scan has none.
    """

    images: tuple[Path, ...]
    label: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them, the label last."""
        return self.images if self.label is None else (*self.images, self.label)


def prepare_output(
    folder: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False
) -> Literal["new", "resumed"]:
    """Make a folder ready for a run, or for the rest of an interrupted one.

    Args:
        folder: Where the run writes. It is made if it does not exist.
        settings: JSON values that tell this run from every other; they are kept in ``run.json``. The run of a model
            has its ``model_hash`` among them, that of gates a ``reference_digest``: only such a run is ever replaced.
        overwrite: Replace another synthesis, or another set that gates let through: ``imagesTr``, ``labelsTr`` and
            ``rejected`` go with all that is in them, and so do ``dataset.json``, ``metadata.csv``, ``classes.json``,
            the manifest and scores, the pictures, ``gates.json``, ``README.md`` and ``run.json``. Other files stay. A
            folder without ``run.json``, or of a training run, is refused all the same.

    Returns:
        ``new``, or ``resumed`` where the folder holds a run of the same settings.

    Raises:
        BadInputError: If the folder holds another run, or files of unknown origin, or cannot be written to.
    """
    root = Path(folder)
    run_file = root / RUN_FILE
    wanted = json.loads(json.dumps(settings, default=str))
    if root.exists() and not root.is_dir():
        raise BadInputError(f"{root}: expected a folder for the output, got a file. Choose another output folder.")
    if run_file.is_file():
        try:
            found = json.loads(run_file.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found == wanted and not overwrite:
            _make_folders(root)
            _remove_unfinished(root)
            return "resumed"
        if not _is_synthesis(root, found):
            raise BadInputError(
                f"{root}: expected an empty folder or an output of synthesize, got a folder whose {RUN_FILE} is not of "
                "a synthesis, such as a training run. Choose another output folder."
            )
        if not overwrite:
            raise BadInputError(
                f"{root}: expected an empty folder or the same run, got another run{_difference(found, wanted)}. "
                "Choose another output folder, or pass --overwrite to replace that run."
            )
        for name in _OWN_NAMES:
            path = root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    elif root.is_dir() and any(root.iterdir()):
        names = ", ".join(sorted(path.name for path in root.iterdir())[:3])
        raise BadInputError(
            f"{root}: expected an empty folder or a run of medgen, got a folder with other files ({names}). "
            "Choose another output folder."
        )
    _make_folders(root)
    write_json(run_file, wanted)
    return "new"


@contextmanager
def released_on_failure(
    folder: str | Path, settings: Mapping[str, Any], *, claimed: bool = True, papers: Sequence[str] = ()
) -> Iterator[None]:
    """Give a folder up where the run that has claimed it fails before it made anything, so that another may take it.

    A folder with any other file in it, or that another run has replaced meanwhile, stays as it is.

    Args:
        folder: As :func:`prepare_output` has made it.
        settings: As given there.
        claimed: Whether it was ``new`` there; one of a run that is continued is never given up.
        papers: Names of files beside ``run.json`` that say nothing of what was made.

    Yields:
        Nothing.
    """
    try:
        yield
    except BaseException:
        if claimed:
            with suppress(OSError, ValueError):  # the failure of the run is what counts
                _release(Path(folder), settings, papers)
        raise


def file_ending(grid: Grid, image_dtype: ImageDtype) -> str:
    """File type that holds a scan without loss.

    Args:
        grid: Grid of the scan.
        image_dtype: Type of the stored intensities, such as ``uint8``, ``uint16``, ``int16`` or ``float32``.

    Returns:
        ``.png`` for 2D scans of unsigned integers, ``.nii.gz`` for everything else.
    """
    return ".png" if grid.spatial_dims == 2 and image_dtype in ("uint8", "uint16") else ".nii.gz"


def is_rgb(channel_names: Mapping[int, str]) -> bool:
    """Whether the channels are the colors of one picture, which go into one file.

    Args:
        channel_names: Channel index to name.

    Returns:
        True for R, G, B.
    """
    return dict(channel_names) == RGB


def case_paths(root: str | Path, case: str, *, num_files: int, ending: str, labelled: bool = True) -> CasePaths:
    """Names that nnU-Net v2 wants for the files of a case.

    Args:
        root: The output folder.
        case: Identifier of the case: letters, digits, dot, dash and underscore.
        num_files: Image files: the number of channels, or 1 for RGB.
        ending: ``.nii.gz`` or ``.png``.
        labelled: Whether it has a label map.

    Returns:
        The paths; nothing is written.

    Raises:
        BadInputError: If the identifier cannot be a file name.
    """
    if not _CASE_NAME.fullmatch(case) or case.lower().endswith(LABEL_ENDINGS):
        raise BadInputError(
            f"{case!r}: expected a case name of letters, digits, '.', '-' and '_' without file ending, got another. "
            "Rename the case."
        )
    images = tuple(Path(root, "imagesTr", f"{case}_{index:04d}{ending}") for index in range(num_files))
    return CasePaths(images, Path(root, "labelsTr", f"{case}{ending}") if labelled else None)


def write_case(
    root: str | Path,
    case: str,
    image: torch.Tensor,
    label: torch.Tensor | None,
    grid: Grid,
    *,
    image_dtype: ImageDtype,
    rgb: bool = False,
    ending: str | None = None,
    edited: bool = False,
) -> CasePaths:
    """Write one scan and its label; every file says in its header that it is synthetic.

    Args:
        root: Folder made by :func:`prepare_output`.
        case: Identifier, unique within the folder.
        image: ``(C, H, W[, D])`` in the units that go on disk.
        label: ``(H, W[, D])`` class indices, or None where it has none.
        grid: Grid of both.
        image_dtype: Type of the stored intensities.
        rgb: Store three channels as one color PNG.
        ending: File type, ``.png`` or ``.nii.gz``; None is that of :func:`file_ending`.
        edited: Whether it was made from a real scan, parts of which it may show as they are.

    Returns:
        The files written: images first, the label last.

    Raises:
        BadInputError: If shapes do not agree, the case cannot be a file name, or the disk is full; no part of a file
            remains.
    """
    shapes = [tuple(image.shape[1:])] if label is None else [tuple(image.shape[1:]), tuple(label.shape)]
    if any(shape != grid.shape for shape in shapes):
        raise BadInputError(
            f"{case}: expected image and label of shape {grid.shape}, got {' and '.join(map(str, shapes))}. Resample "
            "both onto the grid."
        )
    ending = ending or file_ending(grid, image_dtype)
    mark = EDITED_MARK if edited else SYNTHETIC_MARK
    if rgb and (image.shape[0] != 3 or ending != ".png"):
        raise BadInputError(
            f"{case}: expected a 2D image of 3 channels as uint8 or uint16 for RGB, got {image.shape[0]} channel(s) of "
            f"{grid.spatial_dims}D {image_dtype}. Write one file per channel with rgb=False."
        )
    files = 1 if rgb else image.shape[0]
    paths = case_paths(root, case, num_files=files, ending=ending, labelled=label is not None)
    parts: Sequence[torch.Tensor] = [image] if rgb else list(image.split(1))
    for path, part in zip(paths.images, parts, strict=True):
        write_image(path, part, grid, dtype=image_dtype, description=mark)
    if label is not None and paths.label is not None:
        write_label(paths.label, label, grid, description=mark)
    return paths


def write_dataset_json(
    root: str | Path,
    *,
    class_names: Mapping[int, str],
    channel_names: Mapping[int, str],
    num_training: int,
    ending: str,
    name: str = "medgen",
    edited: bool = False,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Declare the folder to nnU-Net v2, marked as synthetic.

    Args:
        root: The output folder.
        class_names: Label value to name, from 0.
        channel_names: Channel index to name. nnU-Net picks its normalization by name (``CT``).
        num_training: Number of whole cases in the folder.
        ending: ``.nii.gz`` or ``.png``.
        name: Name of the data set.
        edited: Whether scans in it were made from real ones.
        details: Further fields, such as the model and its hash.

    Returns:
        Path of ``dataset.json``.

    Raises:
        BadInputError: If two classes share a name, or the disk is full; the older file then remains.
    """
    twice = next((each for each, count in Counter(class_names.values()).items() if count > 1), None)
    if twice is not None:
        raise BadInputError(
            f"{Path(root) / 'dataset.json'}: expected one name per class, got {twice} twice. Rename one."
        )
    whose = "some of them from scans of patients" if edited else "not of any patient"
    content: dict[str, Any] = {
        "name": name,
        "description": f"Synthetic scans made by medgen: {whose}, and not for diagnosis.",
        "synthetic": True,
        "channel_names": {str(index): channel for index, channel in sorted(channel_names.items())},
        "labels": {class_name: value for value, class_name in sorted(class_names.items())},
        "numTraining": num_training,
        "file_ending": ending,
    }
    # The fixed fields win: no detail can take the synthetic mark off.
    content = {**content, **(details or {}), **content}
    return write_json(Path(root) / "dataset.json", content)


def write_metadata(
    root: str | Path,
    rows: Sequence[Mapping[str, str]],
    *,
    class_names: Mapping[int, str] | None = None,
) -> Path:
    """Declare a folder whose scans have texts or facts, or not all a label, as ``metadata.csv`` and ``classes.json``.

    Args:
        root: The output folder.
        rows: Columns of each scan: ``id``, ``file_name`` (channels joined by ``;``), ``label``, ``text`` and any other;
            what is missing is written empty.
        class_names: Label value to name, from 0; None writes no ``classes.json``.

    Returns:
        Path of ``metadata.csv``.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*columns, "synthetic"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "synthetic": "true"} for row in rows)
    if class_names is not None:
        write_json(Path(root) / "classes.json", {str(value): name for value, name in sorted(class_names.items())})
    path = Path(root) / "metadata.csv"
    write_text(path, buffer.getvalue())
    return path


def write_json(path: Path, content: object) -> Path:
    """Write a JSON file so that a reader sees the old file or the new one, never half of it.

    Args:
        path: The file.
        content: JSON values.

    Returns:
        The path.

    Raises:
        BadInputError: If the disk is full; the older file remains.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def _is_synthesis(root: Path, found: Any) -> bool:
    trained = any((root / name).exists() for name in _TRAINING_NAMES)
    return isinstance(found, dict) and bool({"model_hash", "reference_digest"} & set(found)) and not trained


def _release(root: Path, settings: Mapping[str, Any], papers: Sequence[str]) -> None:
    run_file = root / RUN_FILE
    wanted = json.loads(json.dumps(settings, default=str))
    own = {"imagesTr", "labelsTr", RUN_FILE, *papers}
    if {path.name for path in root.iterdir()} - own or json.loads(run_file.read_text(encoding="utf-8")) != wanted:
        return
    try:
        for name in ("imagesTr", "labelsTr"):
            (root / name).rmdir()  # fails where anything is in it, also by another process of this run
    except OSError:
        _make_folders(root)
        return
    for name in (*papers, RUN_FILE):
        (root / name).unlink(missing_ok=True)


def _make_folders(root: Path) -> None:
    try:
        for name in ("imagesTr", "labelsTr"):
            (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"{root}: expected a folder to write to, got: {error}. Choose another one.") from error


def _remove_unfinished(root: Path) -> None:
    """Leftovers of a killed run."""
    for folder in (root, root / "imagesTr", root / "labelsTr"):
        for path in folder.glob(".*") if folder.is_dir() else []:
            if path.name.endswith(".partial"):
                path.unlink()


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    """First setting that differs, as words for an error message."""
    if not isinstance(found, dict):
        return ""
    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            return f" ({key}: {found.get(key)!r} there, {wanted.get(key)!r} now)"
    return ""
