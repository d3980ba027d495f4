"""What every test shares: one thread per worker, no network, no display, and the folder of real scans."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch and matplotlib are imported: two workers with all cores each would only get in each other's way.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets: ``MEDGEN_DATA``, else ``../shared/data`` beside the repository."""
    named = os.environ.get("MEDGEN_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: name its folder in MEDGEN_DATA to run this test")
    return folder
