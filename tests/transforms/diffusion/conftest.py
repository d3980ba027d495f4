from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medgen.generator import Generator


@pytest.fixture(scope="session")
def saved_model(make_generator: Callable[..., Generator], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny 2D model that label maps steer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_generator().save_pretrained(folder)
    return folder
