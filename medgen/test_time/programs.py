"""Trained segmenters on disk: TorchScript, exported programs and MONAI bundles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medgen.provenance import sha256_file
from medgen.types import BadInputError

_SCRIPTS = (".ts", ".pt", ".pth", ".jit", ".torchscript")
_EXPORTED = ".pt2"
_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")


@dataclass(frozen=True, eq=False)
class Program:
    """A segmenter from disk.

    Attributes:
        network: From ``(1, C, *spatial)`` to ``(1, K, *spatial)``.
        digest: SHA-256 of its weights, and of the configuration of a bundle.
        inferer: Of a bundle; None where it has none.
        preprocessing: Of a bundle, from ``{"image": path}`` to the scan as the network takes it; None for others.
        sigmoid: Whether a bundle's postprocessing says that its classes are not exclusive.
        one_at_a_time: Whether it takes one patch at a time, as programs are exported.
    """

    network: Callable[[torch.Tensor], Any]
    digest: str
    inferer: Callable[..., Any] | None = None
    preprocessing: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    sigmoid: bool = False
    one_at_a_time: bool = False


def load_program(path: Path, device: torch.device) -> Program:
    """Load a segmenter.

    Args:
        path: TorchScript (``.ts``, ``.pt``), a program of torch.export (``.pt2``), or the folder of a MONAI bundle,
            whose configuration is run as MONAI runs it: take bundles only from where you would take code.
        device: Where it goes.

    Returns:
        The segmenter.

    Raises:
        BadInputError: If there is none, or it cannot be loaded.
    """
    path = Path(path)
    if path.is_dir():
        return _load_bundle(path, device)
    if not path.is_file():
        raise BadInputError(f"{path}: expected a TorchScript file, a .pt2 program or a bundle, got nothing there.")
    ending = path.suffix.lower()
    try:
        if ending == _EXPORTED:
            network = torch.export.load(path).module().to(device)
        elif ending in _SCRIPTS:
            network = torch.jit.load(path, map_location=device).eval()
        else:
            raise BadInputError(f"{path}: expected .ts, .pt or .pt2, got {ending or 'no ending'}.")
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, BadInputError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInputError(
            f"{path}: expected a program of torch.jit or torch.export, got a file that does not load ({reason}). "
            "Weights alone cannot be run: save torch.jit.script(network) or torch.export.export(network, ...)."
        ) from error
    return Program(network, sha256_file(path), one_at_a_time=ending == _EXPORTED)


def _load_bundle(folder: Path, device: torch.device) -> Program:
    from monai.bundle import ConfigParser

    config = next((folder / "configs" / name for name in _CONFIGS if (folder / "configs" / name).is_file()), None)
    if config is None:
        raise BadInputError(
            f"{folder}: expected a MONAI bundle with configs/inference.json, got none. Give its folder, or a program."
        )
    parser = ConfigParser()
    parser.read_config(str(config))
    meta = folder / "configs" / "metadata.json"
    if meta.is_file():
        parser.read_meta(str(meta))
    parser["bundle_root"] = str(folder)
    script, weights = folder / "models" / "model.ts", folder / "models" / "model.pt"
    if "network_def" in parser and weights.is_file():
        network = parser.get_parsed_content("network_def").to(device)
        network.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
        network, found = network.eval(), weights
    elif script.is_file():
        network, found = torch.jit.load(script, map_location=device).eval(), script
    else:
        raise BadInputError(
            f"{folder}: expected models/model.pt with network_def, or models/model.ts, got neither. Download the "
            "bundle with its weights."
        )
    parts = {name: parser.get_parsed_content(name) if name in parser else None for name in ("inferer", "preprocessing")}
    digest = hashlib.sha256(f"{sha256_file(config)}{sha256_file(found)}".encode()).hexdigest()
    sigmoid = "sigmoid" in json.dumps(parser.get("postprocessing", "")).lower()
    return Program(network, digest, parts["inferer"], parts["preprocessing"], sigmoid)
