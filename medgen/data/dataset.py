"""Data sets of labelled scans: their cases listed, split, and loaded one by one, each checked against its data set."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from medgen.data.case import RGB, TRAIN_SPLITS, VAL_SPLITS, Case, Dataset, Rejection, stem
from medgen.data.io import read_image, read_label
from medgen.data.layouts import LABEL_ENDINGS, image_splits, is_data_set, label_splits, read_dataset, read_labels
from medgen.seeding import derive_seed
from medgen.types import BadInputError, Grid, Sample

__all__ = [
    "LABEL_ENDINGS",
    "RGB",
    "Case",
    "Dataset",
    "Rejection",
    "image_splits",
    "is_data_set",
    "label_splits",
    "labelled_training_cases",
    "load_case",
    "load_cases",
    "load_label",
    "read_dataset",
    "read_labels",
    "require_orientation",
    "split_cases",
]


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
        check_same_grid(path, other, source, grid)
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
        check_same_grid(case.label, label_grid, source, grid)
        _require_classes(case.label, label, dataset.class_names)
    return Sample(case=case.case, grid=grid, image=image, label=label, text=case.text, meta=dict(case.meta))


def load_cases(
    dataset: Dataset,
    cases: Iterable[Case],
    *,
    skip_bad: bool = False,
    check: Callable[[Case, Sample], object] | None = None,
) -> Iterator[Sample]:
    """Read cases one after another.

    Args:
        dataset: The data set that the cases belong to.
        cases: The cases to read.
        skip_bad: Note a bad case in ``dataset.rejected`` and go on, in place of raising.
        check: Called with each case and its sample, to hold it to what the caller needs beyond :func:`load_case`; a
            BadInputError that it raises makes the case a bad one.

    Yields:
        The samples, as :func:`load_case` gives them.

    Raises:
        BadInputError: At the first bad case without ``skip_bad``; with it, if no case at all is good.
    """
    good, bad = 0, []
    for case in cases:
        try:
            sample = load_case(case, dataset)
            if check is not None:
                check(case, sample)
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


def split_cases(dataset: Dataset, *, val_fraction: float = 0.15) -> tuple[list[Case], list[Case]]:
    """Cases for training and for validation, the same ones in every command and whatever its seed.

    Args:
        dataset: The data set. Where it names a validation split, that split is used, and cases without any split go to
            training. Cases of other splits (``test``) go to neither.
        val_fraction: Least share of the cases that is set aside where the data set names no validation split. A hash
            of their names chooses the patients or groups; one group never lies in both parts.

    Returns:
        ``(train, val)``, each in the order of ``dataset.cases``.

    Raises:
        BadInputError: If a part would be empty.
    """
    if not 0 < val_fraction < 1:
        raise BadInputError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}. Try 0.15.")
    train = [case for case in dataset.cases if case.split is None or case.split in TRAIN_SPLITS]
    val = [case for case in dataset.cases if case.split in VAL_SPLITS]
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
        # Not by the order of files, nor by a seed: gates or a comparison with another seed than the generator would
        # be tested on what it has learned from.
        for name in sorted(groups, key=lambda name: derive_seed(0, "split", name))[: len(groups) - 1]:
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


def labelled_training_cases(dataset: Dataset) -> tuple[list[Case], list[Case]]:
    """Labelled scans of the training split, without those that medgen holds out where the folder names no split.

    Args:
        dataset: The data set.

    Returns:
        The scans; and those of the training split that are held out, none where the folder names labelled validation
        scans.

    Raises:
        BadInputError: If a part would be empty.
    """
    labelled = [case for case in dataset.cases if case.label is not None]
    train = [case for case in labelled if case.split is None or case.split in TRAIN_SPLITS]
    if any(case.split in VAL_SPLITS for case in labelled):
        if not train:
            raise BadInputError(f"{dataset.root}: expected labelled scans of the training split, got none. Add some.")
        return train, []
    return split_cases(replace(dataset, cases=train))


def load_label(
    path: str | Path, class_names: Mapping[int, str], *, case: str | None = None, allow_empty: bool = False
) -> Sample:
    """Read one label map and check its values.

    Args:
        path: NIfTI, PNG or TIFF file.
        class_names: The classes that the model knows, 0 being the background.
        case: Identifier of the sample; without one, the name of the file.
        allow_empty: Take a label map of background alone.

    Returns:
        A sample with a label and no image.

    Raises:
        BadInputError: If the file is missing or damaged, if the label is empty or has a value outside the classes.
    """
    path = Path(path)
    label, grid = read_label(path)
    _require_classes(path, label, class_names, allow_empty=allow_empty)
    return Sample(case=case or stem(path.name), grid=grid, label=label)


def require_orientation(path: str | Path, grid: Grid, orientation: str | None) -> None:
    """Check that a scan says which way it lies, where the model has an orientation that it must be turned to.

    Args:
        path: File that the grid was read from, for the message.
        grid: Grid of the scan. A 2D scan passes.
        orientation: Axis codes of the model, or None where it takes scans as they are stored.

    Raises:
        BadInputError: If the file of a volume states no orientation.
    """
    if orientation is not None and grid.spatial_dims == 3 and not grid.known:
        raise BadInputError(
            f"{path}: expected a volume that states its orientation, as the model turns each one to {orientation}, got "
            "a header without (qform and sform codes are 0). Copy the affine from the original scan, or train with "
            "`orientation: null` in the plan on scans that are all stored in one order."
        )


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


def check_same_grid(path: Path, grid: Grid, source: Path, expected: Grid) -> None:
    """Refuse a file whose voxels do not lie where those of another do.

    Args:
        path: The file.
        grid: Its grid.
        source: The file that it belongs to.
        expected: The grid of that.

    Raises:
        BadInputError: If shape or affine differ, or only one of them has an affine.
    """
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


def _require_classes(
    path: Path, label: torch.Tensor, class_names: Mapping[int, str], *, allow_empty: bool = False
) -> None:
    values = np.unique(label.numpy())
    unknown = [int(value) for value in values if int(value) not in class_names]
    if unknown:
        known = ", ".join(f"{value} ({name})" for value, name in sorted(class_names.items()))
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise BadInputError(f"{path}: expected label values {known}, got {shown}. Correct the label or the classes.")
    if not values.any() and not allow_empty:
        raise BadInputError(
            f"{path}: expected at least one voxel of a class other than background, got an empty label. "
            "Correct or remove this case."
        )
