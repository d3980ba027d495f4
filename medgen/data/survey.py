"""Classes, channels and dimension of a folder of scans: as it declares them, or else as its files show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import tifffile
from PIL import Image

from medgen.data.case import RGB, Case
from medgen.data.io import read_grid, read_label
from medgen.types import BadInputError

_MR_NAMES = ("MR", "MRI", "T1", "T1W", "T1C", "T1GD", "T1CE", "T2", "T2W", "FLAIR", "ADC", "DWI", "PD")
# More values than this in a folder that declares no classes are instance numbers or gray levels, not classes.
_MOST_UNDECLARED_CLASSES = 64
# Headers that are read to learn what a folder holds; every scan is held to it when it is loaded.
_SURVEYED_CASES = 20


def parse_class_names(path: Path, labels: object) -> dict[int, str]:
    """Value to name, from ``{"0": "background"}`` (MSD) or ``{"background": 0}`` (nnU-Net v2).

    Args:
        path: File that the table was read from, for the message.
        labels: The table, as read from JSON.

    Returns:
        Label value to name, consecutive from 0.

    Raises:
        BadInputError: If it is no such table, values repeat or leave gaps, or it has regions or an ignore class.
    """
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


def scan_classes(root: Path, cases: Iterable[Case]) -> dict[int, str]:
    """Classes of a folder that declares none. Damaged labels are passed over: loading their case reports them.

    Args:
        root: The folder, for the message.
        cases: Its cases; every label map is read once.

    Returns:
        Label value to ``background`` or ``class_VALUE``, consecutive from 0.

    Raises:
        BadInputError: If the values leave gaps, or are so many that they cannot be classes.
    """
    values: dict[int, Path | None] = {0: None}  # with the first file that has it
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
        values = {**dict.fromkeys(found, case.label), **values}
    beyond = [value for place, value in enumerate(sorted(values)) if value != place]
    if beyond:
        raise BadInputError(
            f"{root}: expected label values 0, 1, 2, ... without gaps, got {sorted(values)}; {values[beyond[0]]} has "
            f"{beyond[0]}. "
            "Renumber the label maps, or declare unused classes in classes.json."
        )
    return {value: "background" if value == 0 else f"class_{value}" for value in sorted(values)}


def survey_channels(cases: Sequence[Case]) -> tuple[dict[int, str], list[str]]:
    """Channel names of a folder that declares none, from the headers; broken files are left for loading to report.

    Args:
        cases: The cases of the folder.

    Returns:
        Channel index to name, and what a reader of the plan should know.
    """
    counts: Counter[int] = Counter()
    for case in cases:
        pictures = len(case.images) == 1 and case.images[0].suffix.lower() in (".png", ".tif", ".tiff")
        # Only pictures mix gray and RGB, so only they are looked at one by one.
        if not pictures and counts.total() == _SURVEYED_CASES:
            break
        try:
            counts[sum(_count_channels(path) for path in case.images)] += 1
        except MemoryError:
            raise
        except Exception:  # damaged files make decoders raise nearly anything
            continue
    if pictures and set(counts) in ({3}, {1, 3}):
        mixed = f"{counts[1]} gray and {counts[3]} RGB images: gray ones are read as RGB of equal channels"
        return dict(RGB), [mixed] if counts[1] else []
    count = counts.most_common(1)[0][0] if counts else 1
    return ({index: f"channel_{index}" for index in range(count)} if count > 1 else {0: "image"}), []


def survey_spatial_dims(cases: Sequence[Case]) -> int:
    """Dimension of most of the first cases, so that one broken or foreign file does not decide it.

    Args:
        cases: The cases of the folder.

    Returns:
        2 or 3.

    Raises:
        BadInputError: If no header can be read.
    """
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


def guess_modality(channel_names: Mapping[int, str]) -> str | None:
    """Kind of scanner, as the names of the channels tell it.

    Args:
        channel_names: Channel index to name.

    Returns:
        ``RGB``, ``MR``, the one name that all channels share, or None.
    """
    names = {name.upper() for name in channel_names.values()}
    if names == {"R", "G", "B"}:
        return "RGB"
    if names <= set(_MR_NAMES):
        return "MR"
    return names.pop() if len(names) == 1 else None


def _count_channels(path: Path) -> int:
    if path.name.endswith((".nii", ".nii.gz")):
        shape: tuple[int, ...] = nib.load(path).shape  # type: ignore[attr-defined]
        return shape[3] if len(shape) > 3 else 1
    if path.suffix.lower() in (".tif", ".tiff"):
        # Pillow cannot open 16-bit RGB TIFF.
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            # The reader drops an alpha channel; samples of unstated meaning (0) are channels.
            return int(page.samplesperpixel) - any(int(extra) for extra in page.extrasamples)
    if path.suffix.lower() == ".png":
        with Image.open(path) as picture:
            # As the reader gives them: without alpha, and palettes in color.
            return {"RGBA": 3, "P": 3, "LA": 1}.get(picture.mode) or len(picture.getbands())
    return 1
