"""Features of real scans against golden values of PyRadiomics, within the bounds that their README states."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medgen.radiomics import Parameters, extract

DATA = Path(os.environ.get("MEDGEN_DATA", Path(__file__).parents[3] / "shared" / "data"))
ORACLE = DATA.parent / "oracles" / "features.json"
ENTRIES = json.loads(ORACLE.read_text())["entries"] if ORACLE.exists() else []

WAVELET_LOG = {
    "imageType": {"Original": {}, "LoG": {"sigma": [1.0, 2.0, 3.0]}, "Wavelet": {}},
    "setting": {"binWidth": 5, "normalize": True, "normalizeScale": 100},
}
LOOSE = ("_shape_", "_shape2D_", "_MCC", "_Imc1", "_Imc2")


def _read(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    if path.suffix == ".png":
        pixels = np.asarray(Image.open(path), dtype=np.float64)
        return pixels, (1.0, 1.0)
    scan = nibabel.load(path)
    return np.asarray(scan.dataobj, dtype=np.float64), tuple(float(step) for step in scan.header.get_zooms()[:3])


def _parameters(entry: dict[str, Any]) -> Parameters:
    from medgen.metrics.frd import PROTOCOLS

    if entry["setting"] == "frd_v1":
        return PROTOCOLS["frd-v1"].parameters(entry["ndim"])
    content: dict[str, Any] = {} if entry["setting"] == "default_bw25" else dict(WAVELET_LOG)
    setting = dict(content.get("setting", {}))
    if entry["ndim"] == 2 and entry["setting"] != "wavelet_log_bw5_nd2":
        setting.update(force2D=True, force2Ddimension=0)
    return Parameters.from_dict({**content, "setting": setting})


def _features(entry: dict[str, Any]) -> dict[str, float]:
    image, spacing = _read(DATA / entry["image"])
    label, _ = _read(DATA / entry["label"])
    if entry["mask"].startswith("full"):
        mask = np.ones(image.shape, dtype=np.uint8)
        mask[(0,) * image.ndim] = 0
    else:
        name, relation, value = entry["mask"].split()
        assert name == "label"
        mask = (label == int(value) if relation == "==" else label > int(value)).astype(np.uint8)
    if entry["setting"] == "frd_v1":
        found = extract(image, mask, spacing=spacing, parameters=_parameters(entry), diagnostics=True)
        return {name.removeprefix("original_"): value for name, value in found.items()}
    if entry["ndim"] == 2 and entry["setting"] != "wavelet_log_bw5_nd2":  # as a volume of one slice, (x, y, z)
        image, mask, spacing = image.T[..., None], mask.T[..., None], (1.0, 1.0, 1.0)
    return extract(image, mask, spacing=spacing, parameters=_parameters(entry))


def _bound(entry: dict[str, Any], name: str) -> tuple[float, float]:
    if entry["setting"] == "default_bw25":
        return (1e-6 if any(part in f"_{name}" for part in LOOSE) else 1e-9), 1e-12
    return 1e-6, 1e-9


@pytest.mark.skipif(not ENTRIES, reason="needs the shared golden values, oracles/features.json beside MEDGEN_DATA")
@pytest.mark.filterwarnings("ignore:.*LoG.*")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['id']}-{e['setting']}-{e['mask'].replace(' ', '')}")
def test_equals_the_golden_values(entry: dict[str, Any]) -> None:
    assert hashlib.sha256((DATA / entry["image"]).read_bytes()).hexdigest() == entry["image_sha256"]
    found = _features(entry)
    golden = entry["features"]
    assert set(found) == set(golden)
    fragile = set(entry.get("fragile_noise", {})) | set(entry.get("fragile_affine", {}))
    on_edges = tuple(f"{name.removeprefix('original_')}_" for name in entry.get("bin_edge_voxels", {}))
    wrong = []
    for name, value in golden.items():
        if name in fragile or name.startswith(on_edges or ("\0",)):
            continue
        expected, (relative, absolute) = float(value), _bound(entry, name)
        both_nan = math.isnan(found[name]) and math.isnan(expected)
        if not both_nan and not math.isclose(found[name], expected, rel_tol=relative, abs_tol=absolute):
            wrong.append(f"{name}: {found[name]!r} instead of {expected!r}")
    assert not wrong, f"{len(wrong)} of {len(golden)} differ:\n" + "\n".join(wrong[:20])
