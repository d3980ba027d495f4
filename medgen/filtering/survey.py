"""A reference measured: segmenters trained, every real scan measured beside those of other patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from medgen.data.case import Case, Dataset
from medgen.data.dataset import load_label
from medgen.filtering.consistency import train_segmenters
from medgen.filtering.measure import build_instruments, measure_all
from medgen.filtering.neighbors import search_real
from medgen.filtering.reference import Reference, digest_of, patient_of, training_cases
from medgen.filtering.storage import read_reference, save_reference
from medgen.filtering.tolerance import FEWEST
from medgen.provenance import sha256_file, sha256_scan
from medgen.types import BadInputError


def measure_reference(
    dataset: Dataset, folder: Path, *, steps: int | None, seed: int, device: torch.device
) -> Reference:
    """Train the segmenters, and measure every scan; what the folder holds of the same scans and settings stays.

    Args:
        dataset: The real set.
        folder: Where the result is kept. It holds small pictures of the real scans.
        steps: Steps of each segmenter; None trains none, so that consistency is not measured.
        seed: Of the folds and segmenters.
        device: Where networks run.

    Returns:
        The measured scans.

    Raises:
        BadInputError: If a scan cannot be used, or a class is shown by too few scans.
        DivergedError: If a segmenter came to no finite loss.
    """
    cases, warnings = training_cases(dataset)
    patients = [patient_of(case) for case in cases]
    settings = {"steps": steps, "seed": seed}
    digest = digest_of(dataset, settings)
    folder.mkdir(parents=True, exist_ok=True)
    if (found := read_reference(folder, device, digest)) is not None:
        return found
    labels = _label_classes(dataset)
    _require_shown(cases, patients, labels)
    segmenters = None
    if steps is not None:
        segmenters = train_segmenters(
            cases,
            patients,
            dataset,
            steps=steps,
            seed=seed,
            device=device,
            folder=folder,
            digest=digest_of(dataset, settings, segmenters=True),
        )
    instruments = build_instruments(
        dataset.class_names, dataset.channel_names, dataset.spatial_dims, segmenters=segmenters, device=device
    )
    scans = []
    for measured in measure_all(instruments, cases, dataset, patients, "reference"):
        if isinstance(measured, BadInputError):
            raise measured
        scans.append(measured)
    search, told = search_real(torch.stack([scan.descriptor for scan in scans]), patients)
    reference = Reference(
        class_names=dict(dataset.class_names),
        channel_names=dict(dataset.channel_names),
        spatial_dims=dataset.spatial_dims,
        cases=[case.case for case in cases],
        patients=patients,
        scans=scans,
        similarity=search.closest_real.similarity.double(),
        copy_threshold=search.threshold,
        labels=labels,
        owners={sha256_scan(case.label): name for case, name in zip(cases, patients, strict=True) if case.label},
        instruments=instruments,
        settings=settings,
        digest=digest,
        warnings=warnings + told,
    )
    save_reference(reference, folder)
    return reference


def _label_classes(dataset: Dataset) -> dict[str, list[str]]:
    """What each label file shows: so it is known what a label map that was made from it should show."""
    found = {}
    for case in dataset.cases:
        if case.label is None:
            continue
        label = load_label(case.label, dataset.class_names, allow_empty=True).label
        values = [] if label is None else label.unique().tolist()
        found[sha256_file(case.label)] = [dataset.class_names[value] for value in values if value]
    return found


def _require_shown(cases: Sequence[Case], patients: Sequence[str], labels: Mapping[str, Sequence[str]]) -> None:
    """Every class needs scans that its tolerance can be fitted to, whichever patient is left out."""
    owners: dict[str, list[str]] = {}
    for case, patient in zip(cases, patients, strict=True):
        for name in labels[sha256_scan(case.label)] if case.label else []:
            owners.setdefault(name, []).append(patient)
    for name, shown in owners.items():
        left = len(shown) - max(shown.count(patient) for patient in set(shown))
        if left < FEWEST:
            raise BadInputError(
                f"reference: expected class {name} in at least {FEWEST} scans beside those of any one patient, got it "
                f"in {left}. Add scans that show it, or take the class off the labels."
            )
