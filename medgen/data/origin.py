"""Which real scans, or label maps of real scans, a synthetic one was made from, as its manifest says."""

from __future__ import annotations

from collections.abc import Iterable

from medgen.data.case import Case, Dataset
from medgen.provenance import MANIFEST, read_manifest, sha256_file


def made_from(synthetic: Dataset, cases: Iterable[Case]) -> set[str]:
    """Find scans that were made by changing one of some real scans, or over one of their label maps.

    A label map counts also where it was deformed: the scan shows a variant of that patient's anatomy.

    Args:
        synthetic: Set of synthetic scans; without a manifest nothing is known of their origin.
        cases: The real scans.

    Returns:
        Identifiers of the synthetic scans.

    Raises:
        BadInputError: If the manifest cannot be read.
    """
    manifest = synthetic.root / MANIFEST
    if not manifest.is_file():
        return set()
    cases = list(cases)
    images = {sha256_file(path) for case in cases for path in case.images if path.is_file()}
    labels = {sha256_file(case.label) for case in cases if case.label is not None and case.label.is_file()}
    return {
        record.case
        for record in read_manifest(manifest)
        if (record.label or {}).get("sha256") in labels
        or any(item["sha256"] in images for item in record.conditions.get("source", {}).get("files", []))
    }
