"""The real scans that gates are fitted on: which they are, and what is measured of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from medgen.data.case import TRAIN_SPLITS, Case, Dataset
from medgen.data.dataset import labelled_training_cases
from medgen.filtering.consistency import VERSION
from medgen.filtering.measure import Instruments, Measured
from medgen.provenance import sha256_scan
from medgen.types import BadInputError

_VERSION = 4  # raise when measurements of equal scans change


@dataclass(frozen=True, eq=False)
class Reference:
    """Measured real scans, and what further scans are measured with.

    Attributes:
        class_names: Names by label value.
        channel_names: Names by channel.
        spatial_dims: 2 or 3.
        cases: Identifiers of the N scans.
        patients: Patient of each.
        scans: What was measured of each; consistency by the segmenter that has not seen the patient.
        similarity: ``(N,)`` of each to its closest real scan of another patient.
        copy_threshold: Similarity above which a scan is a copy.
        labels: Classes that each label file of the whole folder shows, by the SHA-256 of the file.
        owners: Patient of each label file of the N scans, by the same.
        instruments: What the scans were measured with.
        settings: `steps` and `seed` of the segmenters; no steps where none were trained.
        digest: Of all that the measurements depend on.
        warnings: What the user should know.
    """

    class_names: dict[int, str]
    channel_names: dict[int, str]
    spatial_dims: int
    cases: list[str]
    patients: list[str]
    scans: list[Measured]
    similarity: torch.Tensor
    copy_threshold: float
    labels: dict[str, list[str]]
    owners: dict[str, str]
    instruments: Instruments
    settings: dict[str, Any]
    digest: str
    warnings: list[str]

    @property
    def features(self) -> torch.Tensor:
        """``(N, D)``."""
        return torch.stack([scan.features for scan in self.scans])

    @property
    def descriptors(self) -> torch.Tensor:
        """``(N, C, G, G[, G])``."""
        return torch.stack([scan.descriptor for scan in self.scans])


def patient_of(case: Case) -> str:
    """Whose scan it is; a scan of unknown patient is one of its own.

    Args:
        case: The scan.

    Returns:
        A name that scans of one patient share.
    """
    return case.group or f"case {case.case}"


def training_cases(dataset: Dataset) -> tuple[list[Case], list[str]]:
    """Scans that gates are fitted on: the labelled ones of the training split.

    Where the folder names no validation scans with label maps, those that ``medgen train`` (of a model of label maps)
    and ``medgen utility`` hold out are left out here too, or gates would have seen the scans that a
    comparison is tested on.

    Args:
        dataset: The real set.

    Returns:
        The scans, and what the user should know of those left out.

    Raises:
        BadInputError: If none has a label, or there are too few patients to hold one out.
    """
    train = [case for case in dataset.cases if case.split is None or case.split in TRAIN_SPLITS]
    unlabelled = sum(case.label is None for case in train)
    if unlabelled == len(train) or len(dataset.class_names) < 2:
        raise BadInputError(
            f"{dataset.root}: expected labelled scans as a reference, got {len(train)} training scans without label "
            "maps. Add them, or give another folder with --reference."
        )
    notes = [f"{unlabelled} reference scans have no label map and were left out."] if unlabelled else []
    labelled, held_out = labelled_training_cases(dataset)
    if held_out:
        notes.append(
            f"{len(held_out)} reference scans were left out: medgen train and medgen utility hold them out for "
            "tests. Name validation scans in val.txt to hold out others."
        )
    return labelled, notes


def digest_of(dataset: Dataset, settings: Mapping[str, Any], *, segmenters: bool = False) -> str:
    """Digest of all that measurements of a reference depend on.

    Args:
        dataset: The real set.
        settings: Of the segmenters.
        segmenters: Whether it is that of the segmenters alone, which stay where more is measured than before.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        BadInputError: If no training scan has a label, or a file is missing.
    """
    cases = training_cases(dataset)[0]
    content = [
        [case.case, case.group, [sha256_scan(path) for path in (*case.images, case.label) if path]] for case in cases
    ]
    names = [sorted(dataset.class_names.items()), sorted(dataset.channel_names.items())]
    # What scans made over any label map of the folder should show is measured too.
    others = None if segmenters else sorted(sha256_scan(case.label) for case in dataset.cases if case.label)
    return hashlib.sha256(
        json.dumps([VERSION, None if segmenters else _VERSION, names, content, others, dict(settings)]).encode()
    ).hexdigest()
