"""A measured reference on disk: facts as JSON, arrays and weights as safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from medgen.filtering.consistency import FOLDS, Segmenters, load_segmenters
from medgen.filtering.measure import Measured, build_instruments
from medgen.filtering.reference import Reference
from medgen.provenance import write_bytes, write_text
from medgen.segmentation import Preparation
from medgen.types import BadInputError

FACTS = "reference.json"
_TENSORS = "reference.safetensors"


def save_reference(reference: Reference, folder: Path) -> None:
    """Keep a measured reference.

    Args:
        reference: The measured scans.
        folder: Where its segmenters are kept already.
    """
    tensors = {
        "features": reference.features,
        "descriptors": reference.descriptors,
        "similarity": reference.similarity,
    }
    whole = {name: value.contiguous() for name, value in tensors.items()}
    write_bytes(folder / _TENSORS, save(whole, metadata={"digest": reference.digest}))
    segmenters = reference.instruments.segmenters
    rows = [
        {
            "case": case,
            "patient": patient,
            "scores": scan.scores,
            "classes": sorted(scan.classes),
            "unseen": sorted(scan.unseen),
            "orientation": scan.orientation,
            "span": scan.span,
        }
        for case, patient, scan in zip(reference.cases, reference.patients, reference.scans, strict=True)
    ]
    facts = {
        "what": "Gates of medgen filter: measurements and small pictures of real scans. Keep them as you keep those.",
        "digest": reference.digest,
        "settings": reference.settings,
        "spatial_dims": reference.spatial_dims,
        "class_names": reference.class_names,
        "channel_names": reference.channel_names,
        "copy_threshold": reference.copy_threshold,
        "preparation": None if segmenters is None else asdict(segmenters.preparation),
        "folds": None if segmenters is None else segmenters.folds,
        "segmenters_digest": None if segmenters is None else segmenters.digest,
        "warnings": reference.warnings,
        "labels": reference.labels,
        "owners": reference.owners,
        "scans": rows,
    }
    write_text(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def load_reference(folder: Path, device: torch.device) -> Reference:
    """Measured real scans of an earlier run.

    Args:
        folder: Where they were kept.
        device: Where networks run.

    Returns:
        The measured scans.

    Raises:
        BadInputError: If a file is missing or damaged.
    """
    found = read_reference(folder, device)
    if found is None:
        raise BadInputError(
            f"{folder}: expected the whole of fitted gates ({FACTS}, {_TENSORS} and {FOLDS} segmenters of one run), "
            "got a part or a damaged file. Give the folder of the real scans in its place."
        )
    return found


def read_reference(folder: Path, device: torch.device, digest: str | None = None) -> Reference | None:
    """What a folder holds.

    Args:
        folder: Where a reference may be kept.
        device: Where networks run.
        digest: That it must have; None takes any.

    Returns:
        The measured scans; None where they are not whole, or of another digest.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        with safe_open(folder / _TENSORS, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            made = (stored.metadata() or {}).get("digest")
        if made != facts["digest"] or (digest is not None and made != digest):
            return None
        names = [{int(value): name for value, name in facts[key].items()} for key in ("class_names", "channel_names")]
        segmenters = None
        if facts["preparation"] is not None:
            stored_as = facts["preparation"].items()
            fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored_as}
            shape = Preparation(**fields)
            stamp = facts["segmenters_digest"]
            networks = load_segmenters(folder, stamp, shape, channels=len(names[1]), classes=len(names[0]))
            if networks is None:
                return None
            segmenters = Segmenters(shape, tuple(each.to(device) for each in networks), facts["folds"], stamp)
        rows = facts["scans"]
        scans = [
            Measured(
                scores=row["scores"],
                classes=frozenset(row["classes"]),
                unseen=frozenset(row["unseen"]),
                orientation=row["orientation"],
                features=tensors["features"][index],
                descriptor=tensors["descriptors"][index],
                span=row["span"],
            )
            for index, row in enumerate(rows)
        ]
        return Reference(
            class_names=names[0],
            channel_names=names[1],
            spatial_dims=facts["spatial_dims"],
            cases=[row["case"] for row in rows],
            patients=[row["patient"] for row in rows],
            scans=scans,
            similarity=tensors["similarity"],
            copy_threshold=facts["copy_threshold"],
            labels=facts["labels"],
            owners=facts["owners"],
            instruments=build_instruments(
                names[0], names[1], facts["spatial_dims"], segmenters=segmenters, device=device
            ),
            settings=facts["settings"],
            digest=made,
            warnings=facts["warnings"],
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
        return None
