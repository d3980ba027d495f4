"""Scans beside the real ones: how far off the closest look of one lies, and whether it is a copy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from medgen.filtering.tolerance import Kind
from medgen.metrics.copies import CopySearch, find_copies
from medgen.metrics.matching import closest
from medgen.seeding import derive_seed

KINDS = {"outlier": Kind("log", "high")}
FALSE_ALARMS = 0.005  # share of scans that copy nothing and are still taken for copies, at most


def nearest_distance(
    features: torch.Tensor, reference: torch.Tensor, exclude: torch.Tensor | None = None
) -> torch.Tensor:
    """Distance of each scan to the real one that looks most like it.

    Args:
        features: ``(Q, D)`` of the scans.
        reference: ``(N, D)`` of the real scans.
        exclude: ``(Q, N)`` True for pairs that do not count, such as scans of one patient.

    Returns:
        ``(Q,)`` float64 Euclidean distances.
    """
    distances = torch.cdist(features.double(), reference.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if exclude is not None:
        distances = distances.masked_fill(exclude, torch.inf)
    return distances.min(dim=1).values


def same_patient(patients: Sequence[str]) -> torch.Tensor:
    """Pairs of scans of one patient, each scan and itself among them.

    Args:
        patients: Patient of each of the N scans.

    Returns:
        ``(N, N)`` bool.
    """
    ids = _ids(patients)
    return ids[:, None] == ids


def search_real(descriptors: torch.Tensor, patients: Sequence[str]) -> tuple[CopySearch, list[str]]:
    """How alike real scans of different patients are, and the threshold that follows.

    Args:
        descriptors: ``(N, C, G, G[, G])`` of :func:`medgen.metrics.descriptor.describe`.
        patients: Patient of each.

    Returns:
        The search, of which ``closest_real`` and ``threshold`` count, and its warnings.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find_copies(
            descriptors.float(), descriptors[:1].float(), groups=_ids(patients), false_alarm_rate=FALSE_ALARMS
        )
    return found, [str(item.message) for item in caught]


def similarity(descriptors: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Correlation of each scan with its closest real one, in the pose in which the two are most alike.

    Args:
        descriptors: ``(Q, C, G, G[, G])``.
        reference: ``(N, C, G, G[, G])``.

    Returns:
        ``(Q,)`` in [-1, 1].
    """
    return closest(descriptors.float(), reference.float()).similarity


def _ids(patients: Sequence[str]) -> torch.Tensor:
    return torch.tensor([derive_seed("group", name) for name in patients])
