"""What a folder of scans is like: the facts that a training plan is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medgen.data.case import RGB, TRAIN_SPLITS, Case, Dataset
from medgen.data.dataset import load_case
from medgen.data.geometry import place
from medgen.data.intensity import Normalization
from medgen.data.io import read_grid
from medgen.planning.machine import Machine, read_machine
from medgen.seeding import spread
from medgen.types import BadInputError, Sample

# Scans whose voxels are read; of all others only the header. Volumes are big, and alike within a data set.
_SAMPLED = {2: 24, 3: 8}
_VOXELS_PER_SCAN = 200_000
# Voxel sizes that differ by less are the same size in differently rounded headers.
_SPACING_TOLERANCE = 0.01
# Below this many headers a progress bar would only flicker.
_LONG = 200


@dataclass(frozen=True)
class Fingerprint:
    """Facts about a data set, in the axis order of the model (RAS for volumes of known orientation).

    Attributes:
        cases: Scans in the folder.
        labelled: Scans with a label map.
        useful: Scans that are used for training and validation: all, or those with a label map where it takes one.
        unreadable: Of these, and not held out by the folder's own split, scans with a damaged header; training says
            what is wrong with them.
        sampled: Scans whose voxels were read.
        spatial_dims: 2 or 3.
        sizes: Smallest, median and largest number of voxels per axis.
        spacings: Smallest, median and largest voxel size in mm per axis; None where no file states it.
        extent: Median field of view in mm per axis; None where no file states a voxel size.
        flat: Whether no file states its geometry, as pictures (PNG, TIFF).
        channel_names: Image channels, in file order.
        modality: What the scanner was, as far as the folder says.
        class_names: Label value to name.
        class_shares: Mean share of the voxels per label value, in the sampled scans.
        intensities: Per channel: lowest voxel, medians over scans of the percentiles 0.5, 50 and 99.5, highest voxel.
        tails: Over all channels: least 0.5th and greatest 99.5th percentile of any sampled scan.
        whole_numbers: Whether all sampled intensities are integers.
        sparse: Whether both percentiles of the default normalization coincide in some sampled scan.
        notes: What the reader of the plan should know.
        machine: Where the training will run.
    """

    cases: int
    labelled: int
    useful: int
    unreadable: int
    sampled: int
    spatial_dims: int
    sizes: tuple[tuple[int, ...], ...]
    spacings: tuple[tuple[float, ...], ...] | None
    extent: tuple[float, ...] | None
    flat: bool
    channel_names: dict[int, str]
    modality: str | None
    class_names: dict[int, str]
    class_shares: dict[int, float]
    intensities: tuple[tuple[float, ...], ...]
    tails: tuple[float, float]
    whole_numbers: bool
    sparse: bool
    notes: tuple[str, ...]
    machine: Machine

    @property
    def mixed_spacing(self) -> bool:
        """Whether scans differ in voxel size by more than a rounded header would explain."""
        if self.spacings is None:
            return False
        low, _, high = np.array(self.spacings)
        return bool((high > low * (1 + _SPACING_TOLERANCE)).any())

    @property
    def is_rgb(self) -> bool:
        """Whether the channels are the colors of one picture."""
        return self.channel_names == RGB

    @property
    def is_hounsfield(self) -> bool:
        """Whether intensities are CT numbers: declared CT below 0, or undeclared integers from air to bone."""
        low, high = min(row[0] for row in self.intensities), max(row[-1] for row in self.intensities)
        if self.modality is None:
            return len(self.channel_names) == 1 and self.whole_numbers and -3100 <= low <= -900 and 100 <= high <= 32767
        return self.modality.upper() == "CT" and low < 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a YAML file.

        Returns:
            What a reader wants to see; numbers are rounded.
        """
        names = ("smallest", "median", "largest")
        statistics = ("lowest", "percentile_0.5", "median", "percentile_99.5", "highest")
        intensities = zip(self.channel_names.values(), self.intensities, strict=True)
        return {
            "cases": self.cases,
            "labelled_cases": self.labelled,
            "unreadable_cases": self.unreadable,
            "sampled_cases": self.sampled,
            "size": {name: list(row) for name, row in zip(names, self.sizes, strict=True)},
            "spacing_mm": None
            if self.spacings is None
            else {name: [_short(n) for n in row] for name, row in zip(names, self.spacings, strict=True)},
            "intensity": {
                name: {key: _short(value) for key, value in zip(statistics, row, strict=True)}
                for name, row in intensities
            },
            "class_share": {self.class_names[value]: _short(share) for value, share in self.class_shares.items()},
            "machine": {
                "device": self.machine.name,
                "cpu_cores": self.machine.cores,
                "memory_gb": self.machine.memory_gb,
            },
            "notes": list(self.notes),
        }


def fingerprint(dataset: Dataset, *, needs_labels: bool = True, device: str = "auto") -> Fingerprint:
    """Look at a data set and at this machine: the header of every scan that is learned from, the voxels of a few.

    Scans that the folder's own split holds out, for validation or test, are counted and not looked at.

    Args:
        dataset: The data set.
        needs_labels: Whether only scans with a label map are learned from.
        device: `auto`, `cpu`, `cuda` or any torch device.

    Returns:
        The facts; the same folder on the same machine gives the same.

    Raises:
        BadInputError: If no training scan has a label that is needed, or none can be read, or the device is not there.
    """
    labelled = [case for case in dataset.cases if case.label is not None]
    if not labelled and needs_labels:
        raise BadInputError(
            f"{dataset.root}: expected scans with label maps, got {len(dataset.cases)} scan(s) without. "
            "Put label maps of the same names into labels/, or name them in the column `label` of the metadata file; "
            "or train without them: --conditions text, edge, a column of the metadata, or none."
        )
    useful = labelled if needs_labels else dataset.cases
    learned = [case for case in useful if case.split is None or case.split in TRAIN_SPLITS]
    if not learned:
        raise BadInputError(
            f"{dataset.root}: expected scans for training, got {len(useful)} that the folder's split all holds out. "
            "Put some into the training split."
        )
    sizes, spacings, extents, unreadable = _headers(learned, dataset.spatial_dims)
    samples = _sample(dataset, learned)
    rows, tails, whole_numbers, sparse = _intensities([sample.image for sample in samples if sample.image is not None])
    notes = [*dataset.notes]
    if len(useful) < len(dataset.cases):
        notes.append(f"{len(dataset.cases) - len(useful)} scan(s) have no label map and are not used for training")
    if unreadable:
        notes.append(f"{unreadable} scan(s) cannot be read; training stops at them, or skips them with --skip_bad")
    return Fingerprint(
        cases=len(dataset.cases),
        labelled=len(labelled),
        useful=len(useful),
        unreadable=unreadable,
        sampled=len(samples),
        spatial_dims=dataset.spatial_dims,
        sizes=tuple(tuple(int(n) for n in row) for row in _spread(sizes)),
        spacings=tuple(tuple(float(n) for n in row) for row in _spread(spacings)) if spacings else None,
        extent=tuple(float(n) for n in np.median(extents, axis=0)) if extents else None,
        flat=not spacings,
        channel_names=dict(dataset.channel_names),
        modality=dataset.modality,
        class_names=dict(dataset.class_names),
        class_shares=_class_shares(samples, sorted(dataset.class_names)),
        intensities=rows,
        tails=tails,
        whole_numbers=whole_numbers,
        sparse=sparse,
        notes=tuple(notes),
        machine=read_machine(device),
    )


def _headers(
    cases: Sequence[Case], spatial_dims: int
) -> tuple[list[tuple[int, ...]], list[tuple[float, ...]], list[tuple[float, ...]], int]:
    """Sizes, then spacings and fields of view in mm where known, and how many headers are damaged."""
    sizes, spacings, extents, unreadable = [], [], [], 0
    first: BadInputError | None = None
    for case in tqdm(cases, desc="looking at scans", disable=len(cases) < _LONG, leave=False):
        try:
            grid = read_grid(case.images[0])
            if grid.spatial_dims != spatial_dims:
                raise BadInputError(
                    f"{case.images[0]}: expected a {spatial_dims}D scan as in the rest of the folder, "
                    f"got {grid.spatial_dims}D. Keep 2D and 3D scans in separate folders."
                )
        except BadInputError as error:
            first, unreadable = first or error, unreadable + 1
            continue
        placement = place(grid)
        sizes.append(placement.reoriented_shape)
        if grid.known:
            spacings.append(tuple(grid.spacing[axis] for axis in placement.axes[0]))
            extents.append(tuple(n * length for n, length in zip(sizes[-1], spacings[-1], strict=True)))
    if first is not None and not sizes:
        raise first
    return sizes, spacings, extents, unreadable


def _sample(dataset: Dataset, cases: Sequence[Case]) -> list[Sample]:
    """A few whole scans, evenly spread over the folder; unusable ones are left for the training to report."""
    chosen = spread(cases, _SAMPLED[dataset.spatial_dims])
    samples, first = [], None
    for case in tqdm(chosen, desc="measuring scans", disable=dataset.spatial_dims == 2, leave=False):
        try:
            sample = load_case(case, dataset)
        except BadInputError as error:
            first = first or error
            continue
        # Every n-th voxel is enough for percentiles and shares, and keeps big volumes from piling up in memory.
        step = max(1, int(np.prod(sample.grid.shape)) // _VOXELS_PER_SCAN)
        image = None if sample.image is None else sample.image.flatten(1)[:, ::step].clone()
        label = None if sample.label is None else sample.label.flatten()[::step].clone()
        samples.append(Sample(case=sample.case, grid=sample.grid, image=image, label=label))
    if first is not None and not samples:
        raise first
    return samples


def _intensities(
    images: Sequence[torch.Tensor],
) -> tuple[tuple[tuple[float, ...], ...], tuple[float, float], bool, bool]:
    """Statistics per channel, extreme percentiles, whether all are integers, and whether percentiles coincide."""
    points = np.array([np.percentile(image.numpy(), [0, 0.5, 50, 99.5, 100], axis=1) for image in images])
    middle = np.median(points, axis=0)
    middle[0], middle[-1] = points[:, 0].min(axis=0), points[:, -1].max(axis=0)
    rows = tuple(tuple(float(value) for value in channel) for channel in middle.T)
    tails = (float(points[:, 1].min()), float(points[:, 3].max()))
    whole_numbers = all(bool((image == image.round()).all()) for image in images)
    return rows, tails, whole_numbers, not all(_fits(Normalization(), image) for image in images)


def _fits(normalization: Normalization, image: torch.Tensor) -> bool:
    try:
        normalization.fit(image)
    except BadInputError:
        return False
    return True


def _class_shares(samples: Sequence[Sample], values: Sequence[int]) -> dict[int, float]:
    labels = [sample.label for sample in samples if sample.label is not None]
    if not labels:
        return {}
    return {value: float(np.mean([float((label == value).float().mean()) for label in labels])) for value in values}


def _spread(rows: Sequence[tuple[float, ...]]) -> np.ndarray:
    array = np.array(rows)
    return np.stack([array.min(axis=0), np.median(array, axis=0), array.max(axis=0)])


def _short(value: float) -> float:
    return float(f"{value:.5g}")
