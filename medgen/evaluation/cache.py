"""What was computed of a scan, kept on disk under the digest of its files: a run that was killed goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medgen.provenance import sha256_file, write_bytes


class FeatureCache:
    """A folder of arrays, one file for each scan and kind of result.

    A result is found again only for the same bytes of image and label, and the same stamp of what computed it.

    Args:
        folder: Where the files are; made when the first one is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def digest(files: Iterable[Path], stamp: Mapping[str, Any]) -> str:
        """Key of a result.

        Args:
            files: Files of the scan.
            stamp: Plain values that say what is computed of it and how.

        Returns:
            SHA-256 in hexadecimal.
        """
        content = [sha256_file(path) for path in files]
        return hashlib.sha256(json.dumps([content, stamp], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
        """A stored result.

        Args:
            key: From :meth:`digest`.

        Returns:
            Arrays and facts, or None where there are none; a file that was cut off counts as none.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="np") as stored:
                return {name: stored.get_tensor(name) for name in stored.keys()}, dict(stored.metadata() or {})  # noqa: SIM118
        except (SafetensorError, OSError):
            return None

    def put(self, key: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, str] | None = None) -> None:
        """Store a result, whole or not at all.

        Args:
            key: From :meth:`digest`.
            arrays: Arrays by name.
            facts: Words by name.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_bytes(path, save(whole, metadata=dict(facts or {})))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
