"""The value objects of a data set: its cases, what it is made of, and which cases were left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medgen.data.io import IMAGE_SUFFIXES
from medgen.types import BadInputError

RGB = {0: "R", 1: "G", 2: "B"}
TRAIN_SPLITS, VAL_SPLITS = ("train", "training"), ("val", "valid", "validation", "dev")


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
        meta: Every further column of the data set, empty where it says nothing, that of the text included.
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


def unlike_classes(names: Mapping[int, str], others: Mapping[int, str]) -> list[int]:
    """Label values that mean one thing in one set and another in the other, or that one of them lacks.

    A set that declares no names calls its classes by number, ``class_1``, which fits any name. Neither case nor the
    name of the background counts.

    Args:
        names: Names by label value.
        others: Those of the other set.

    Returns:
        The values, in order.
    """

    def alike(value: int) -> bool:
        if value not in names or value not in others:
            return False
        pair = (names[value].lower(), others[value].lower())
        return pair[0] == pair[1] or f"class_{value}" in pair

    return [value for value in sorted({*names, *others}) if value and not alike(value)]


def require_file_name(case: str, source: str | Path) -> str:
    """Refuse an identifier that would lead files of its name elsewhere.

    Args:
        case: Identifier of a case, as a data set gives it.
        source: File or folder that gives it, for the message.

    Returns:
        The identifier.

    Raises:
        BadInputError: If it is empty, hidden, or holds a slash, a backslash or a control character.
    """
    if not case.strip() or case.startswith(".") or not case.isprintable() or set(case) & set("/\\"):
        raise BadInputError(
            f"{source}: expected identifiers of cases that can be file names (no '/' or '\\', no '.' in front), got "
            f"{case!r}. Rename the case, or give it another name in a column `id`."
        )
    return case


def stem(name: str) -> str:
    """Name of a file without the ending of its format.

    Args:
        name: Name of the file.

    Returns:
        ``a.v2`` for ``a.v2.nii.gz``; the name itself where it has no ending that medgen reads.
    """
    return next((name[: -len(ending)] for ending in IMAGE_SUFFIXES if name.lower().endswith(ending)), name)
