"""Which real scans a synthetic one was made from, as its manifest says."""

from __future__ import annotations

from collections.abc import Iterable

from medgen.data.case import Case, Dataset
from medgen.provenance import MANIFEST, read_manifest, sha256_file


def made_from(synthetic: Dataset, cases: Iterable[Case]) -> set[str]:
    """Find scans that were made by changing one of some real scans.

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
    files = {sha256_file(path) for case in cases for path in case.images if path.is_file()}
    return {
        record.case
        for record in read_manifest(manifest)
        if any(item["sha256"] in files for item in record.conditions.get("source", {}).get("files", []))
    }
