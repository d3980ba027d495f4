"""A small report from the code that makes real ones, so that its keys are those of the evaluation."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from medgen.metrics.memorization import find_copies
from medgen.metrics.protocols import PROTOCOLS
from medgen.metrics.statistics import score_features
from medgen.provenance import runtime_info

VAL, TRAIN, MADE = 24, 30, 26


def _radiomics(generator: np.random.Generator, count: int, width: int, shift: float) -> np.ndarray:
    return generator.normal(5 + shift, 1, (count, width))


def _distances(protocol: str) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    names = PROTOCOLS[protocol].columns(2)[-60:]
    val, train, made = (
        _radiomics(generator, count, len(names), shift) for count, shift in ((VAL, 0), (TRAIN, 0), (MADE, 1))
    )
    options: dict[str, Any] = {"permutations": 99} if protocol == "frd-robust" else {}
    found, floor = (PROTOCOLS[protocol].distance(val, other, names, **options) for other in (made, train))
    return {
        **asdict(found),
        "unit": PROTOCOLS[protocol].unit,
        "floor": asdict(floor),
        "groups_real": VAL,
        "groups_synthetic": MADE,
        "permutations": 99 if protocol == "frd-robust" else None,
        "excluded": {"real": {}, "synthetic": {"image is constant": 2}},
        "region": "whole scans",
    }


def _copies() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(TRAIN, 1, 16, 16, generator=generator)
    made = torch.randn(MADE, 1, 16, 16, generator=generator)
    made[3] = real[5].flip(-1)
    found = find_copies(real, made)
    order = found.closest.similarity.argsort(descending=True)[:2].tolist()
    return {
        "copies": int(found.is_copy.sum()),
        "share": float(found.is_copy.double().mean()),
        "threshold": found.threshold,
        "expected_false_alarms": 0.005 * MADE,
        "auth_pct": 52.0,
        "c_t": -0.4,
        "searched": TRAIN,
        "held_out": {
            "searched": VAL,
            "copies": 1,
            "expected_false_alarms": 0.1,
            "pairs": [{"synthetic": "sample 7", "real": "patient 60", "similarity": 0.97}],
        },
        "nearest_ratio": [0.9, 1.0, 1.1],
        "pairs": [
            {
                "synthetic": f"sample {row}",
                "real": f"patient {int(found.closest.index[row])}",
                "similarity": float(found.closest.similarity[row]),
                "ratio": float(found.ratio[row]),
                "is_copy": bool(found.is_copy[row]),
                "pose": "mirrored left-right",
            }
            for row in order
        ],
        "warnings": [],
    }


@pytest.fixture(scope="session")
def _made_once() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    val, train = (torch.randn(count, 2, 6, generator=generator) for count in (VAL, TRAIN))
    made = torch.randn(MADE, 2, 6, generator=generator) + 2
    scores = score_features(
        val, made, real_reference=train, resamples=10, permutations=99, floor_draws=4, nearest_k=3, progress=False
    )
    points = {"real train": train[:, 0, :2], "real val": val[:, 0, :2], "synthetic": made[:, 0, :2]}
    names = PROTOCOLS["frd-robust"].columns(2)[:10]
    similarity = {"mean": 0.3, "std": 0.1, "pairs": 20}
    return {
        "format": "medgen-report/3",
        "real": {
            "folder": "hearts",
            "scans": VAL + TRAIN,
            "patients": 40,
            "split": "train and val as given",
            "train": TRAIN,
            "val": VAL,
        },
        "synthetic": {"folder": "made", "scans": MADE, "patients": None, "marked_synthetic": True},
        "spatial_dims": 2,
        "channels": 1,
        "rgb": False,
        "extractor": {
            "name": "efficientnet-lite0",
            "weights_sha256": "5793" * 16,
            "num_features": 6,
            "views": ["image", "other"],
            "preprocessing": {"image_size": 224, "resize": "stretched to a square"},
            "published_name": "Fréchet distance",
        },
        "scores": {name: score.to_json() for name, score in scores.items()},
        "frd": {name: _distances(name) for name in ("frd-robust", "frd-v1")},
        "radiomic_shift": {
            "features": 60,
            "beyond_chance": 4,
            "relabelings": 199,
            "largest": [
                {
                    "feature": name,
                    "effect": 1.2 - index / 4,
                    "p_value": 0.005 + index / 80,
                    "real": {"mean": 3.0, "std": 1.0},
                    "synthetic": {"mean": 4.2 - index / 4, "std": 1.0},
                }
                for index, name in enumerate(names)
            ],
        },
        "ms_ssim": {"scales": 3, "real": similarity, "synthetic": similarity, "synthetic_one_label": None},
        "memorization": _copies(),
        "utility": {
            "steps": 100,
            "train_real": {"scans": TRAIN},
            "classes": ["ventricle", "myocardium"],
            "dice": {"real": [0.8, 0.7], "synthetic": [0.7, 0.6], "real_and_synthetic": [0.85, 0.75]},
            "adherence": [0.75, None],
            "n": {"tested": VAL},
            "intervals": {"real": [[0.75, 0.85], [0.6, 0.8]]},
        },
        "embedding": {
            "method": "two main axes",
            "explained": [0.4, 0.2],
            "points": {name: places.tolist() for name, places in points.items()},
            "cases": {name: [f"{name} {index}" for index in range(len(rows))] for name, rows in points.items()},
        },
        "warnings": ["A warning of the whole report."],
        "rejected": [{"set": "real", "case": "torn", "reason": "expected a readable file"}],
        "seed": 7,
        "runtime": runtime_info(torch.device("cpu")),
        "seconds": 12.5,
    }


@pytest.fixture
def full(_made_once: dict[str, Any]) -> dict[str, Any]:
    """A report with every part, as it comes back from its file."""
    return json.loads(json.dumps(_made_once))


@pytest.fixture
def minimal(full: dict[str, Any]) -> dict[str, Any]:
    """A color set of few scans: no validation part, no floor, no test, no copies looked for, no use measured."""
    report = copy.deepcopy(full)
    report["real"] |= {"scans": 6, "train": 6, "val": 6, "patients": None, "split": "random halves of the real scans"}
    report |= {"channels": 3, "rgb": True, "utility": None, "memorization": None, "radiomic_shift": {}}
    report |= {"warnings": [], "rejected": [], "embedding": None, "runtime": {}}
    without = dict.fromkeys(
        ("interval", "floor", "floor_kind", "floor_n", "floor_interval", "value_at_floor_n", "p_value")
    )
    why = dict.fromkeys(
        ("interval", "floor", "floor_interval", "p_value"), "expected at least 4 patients in each set, got 3"
    )
    report["scores"] = {
        "frechet": {**report["scores"]["frechet"], **without, "missing": why, "warnings": [], "permutations": 0},
        "my_score": {**report["scores"]["kernel"], **without, "missing": why, "tail": "lower", "warnings": []},
    }
    report["frd"] = {
        "frd-v1": {**report["frd"]["frd-v1"], "value": None, "floor": None, "excluded": {}, "warnings": []},
    }
    report["ms_ssim"] = None
    return report
