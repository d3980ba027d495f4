"""What was computed of a scan is found again for the same bytes and stamp, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medgen.evaluation.cache import FeatureCache


def test_arrays_and_facts_come_back_bit_for_bit(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    assert not cache.folder.exists()
    arrays = {"row": np.array([1.0, np.nan, -np.inf]), "picture": np.arange(6, dtype=np.float16).reshape(2, 3)[:, ::-1]}
    cache.put("ab" * 32, arrays, {"shape": "2 3"})
    found, facts = FeatureCache(tmp_path / "cache").get("ab" * 32) or ({}, {})
    assert facts == {"shape": "2 3"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert cache.get("cd" * 32) is None


def test_the_key_depends_on_bytes_and_stamp_and_not_on_names(tmp_path: Path) -> None:
    for name, content in (("a.png", b"one"), ("b.png", b"one"), ("c.png", b"two")):
        (tmp_path / name).write_bytes(content)
    files = {name: [tmp_path / f"{name}.png"] for name in "abc"}
    key = FeatureCache.digest(files["a"], {"kind": "features", "size": 32})
    assert FeatureCache.digest(files["b"], {"size": 32, "kind": "features"}) == key
    assert FeatureCache.digest(files["c"], {"kind": "features", "size": 32}) != key
    assert FeatureCache.digest(files["a"], {"kind": "features", "size": 33}) != key
    assert FeatureCache.digest(files["a"] + files["c"], {"kind": "features", "size": 32}) != key


def test_a_file_that_was_cut_off_counts_as_none(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("ef" * 32, {"row": np.zeros(100)})
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:50])
    assert cache.get("ef" * 32) is None
    cache.put("ef" * 32, {"row": np.ones(2)})
    assert cache.get("ef" * 32)[0]["row"].tolist() == [1, 1]  # type: ignore[index]
