"""Model folders: found by path or by name, read with their checksums, and replaced in one step.

A folder holds ``generator.json`` and one folder per network, whose name ends in a digest of what is in it. New networks
therefore lie beside the old ones until ``generator.json``, which names those that count, is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from medgen.provenance import explain_full_disk, sha256_file, write_text
from medgen.types import BadInputError

SETTINGS = "generator.json"
FORMAT_VERSION = 2
NETWORKS = ("autoencoder", "denoiser", "label_denoiser", "text_encoder", "control_mask", "control_edge")
# What this module leaves in a folder: networks in use, and what an interrupted save did not get to use or to remove.
_NETWORK = "|".join(NETWORKS)
_OWN_NAME = re.compile(rf"({_NETWORK})-[0-9a-f]{{8}}|\.({_NETWORK})\.partial|\.generator\.json\.[0-9a-f]+\.partial")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True)
class Bundle:
    """A model folder whose files are all there and as they were written.

    Attributes:
        settings: Its ``generator.json``.
        networks: Folder of each network, by name.
        config: What the model was trained for, as JSON values.
        digest: SHA-256 over weights, network settings and ``config``: what the model makes depends on nothing else.
    """

    settings: Path
    networks: dict[str, Path]
    config: dict[str, Any]
    digest: str


def find_model(name: str | Path) -> Path:
    """Folder of a model: a path, an embedded name, or a Hub id that the user names.

    Args:
        name: Folder of a model or of a training run (which has its model in ``model/``), name of an embedded model, or
            ``owner/name`` on the Hub, which is asked only where no local folder ``owner`` exists.

    Returns:
        A folder with ``generator.json``, unless it comes from the Hub.

    Raises:
        BadInputError: If there is no such model.
    """
    given = Path(name)
    for folder in (given, given / "model"):
        if (folder / SETTINGS).is_file():
            return folder
    if given.exists():
        raise BadInputError(
            f"{given / SETTINGS}: expected a medgen model (generator.json and weights) here or in {given / 'model'}, "
            "got none. If this is a training run, let `medgen train` with the same arguments finish."
        )
    pretrained = Path(str(files("medgen"))) / "pretrained"
    if (pretrained / str(name) / SETTINGS).is_file():
        return pretrained / str(name)
    if str(name).count("/") == 1 and not given.parent.is_dir():
        return _download(str(name))
    embedded = sorted(path.parent.name for path in pretrained.glob(f"*/{SETTINGS}"))
    beside = sorted(path.name for path in given.parent.iterdir() if path.is_dir()) if given.parent.is_dir() else []
    close = get_close_matches(given.name, [*beside, *embedded], n=1)
    meant = f" Did you mean {given.parent / close[0]}?" if close else ""
    local = f"; not looked up on the Hub, because the folder {given.parent} exists here" if "/" in str(name) else ""
    raise BadInputError(
        f"{name}: expected a model folder, a Hub id or an embedded model, got nothing of that name{local}.{meant} "
        f"Embedded: {embedded}."
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInputError(
            f"{name}: expected a model folder or a reachable Hub id, got neither: there is no such folder here, and "
            f"the Hub answers {type(error).__name__}. Check the spelling, or download the model and give its folder."
        ) from error


def read_bundle(folder: Path) -> Bundle:
    """Read the settings of a model folder and check every file that they name.

    Args:
        folder: As :func:`find_model` gives it.

    Returns:
        What is in the folder; no weights are loaded.

    Raises:
        BadInputError: If the folder is incomplete or damaged, or holds pickled weights.
    """
    networks, checksums, config = _read_settings(folder / SETTINGS)
    for name in networks:
        _check_files(networks[name], checksums[name])
    return Bundle(folder / SETTINGS, networks, config, _digest({"networks": checksums, "config": config}))


def _read_settings(path: Path) -> tuple[dict[str, Path], dict[str, dict[str, str]], dict[str, Any]]:
    """Folder and checksums of each network, and the configuration."""
    if not path.is_file():
        raise BadInputError(f"{path}: expected a medgen model, got no such file. Name another model.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        version, components, config = settings["format_version"], settings["components"], settings["config"]
        if version == 1:  # its folders had the plain names of the networks
            components = {name: {"folder": name, "files": checksums} for name, checksums in components.items()}
        elif version != FORMAT_VERSION:
            raise BadInputError(f"{path}: expected format version {FORMAT_VERSION}, got {version}. Update medgen.")
        folders = {name: path.parent / entry["folder"] for name, entry in components.items()}
        checksums = {name: dict(entry["files"]) for name, entry in components.items()}
    except BadInputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"{path}: expected JSON of a medgen model, got a damaged file ({error}). Copy it again."
        ) from error
    unknown = sorted(set(folders) - set(NETWORKS))
    if unknown or "denoiser" not in folders:
        raise BadInputError(
            f"{path}: expected the network denoiser and none but {', '.join(NETWORKS)}, got "
            f"{', '.join(sorted(folders)) or 'none'}. {'Update medgen' if unknown else 'Copy the model again'}."
        )
    return folders, checksums, config


def write_bundle(folder: Path, networks: Mapping[str, Any], config: Mapping[str, Any], *, dtype: torch.dtype) -> str:
    """Write a model; at every moment, also when killed, the folder holds the old model or the new one.

    Args:
        folder: Made if absent; other files in it are left alone.
        networks: diffusers models by name.
        config: What the model was trained for, as values that JSON can hold.
        dtype: Storage format of the weights.

    Returns:
        Digest of the model, as :func:`read_bundle` will give it.

    Raises:
        BadInputError: If the disk is full; the old model then remains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replaced = _folders_in_use(folder)
    components = {name: _write_network(folder, name, network, dtype) for name, network in networks.items()}
    values = json.loads(json.dumps(config))
    settings = {"format_version": FORMAT_VERSION, "components": components, "config": values}
    write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
    kept = {entry["folder"] for entry in components.values()}
    for path in folder.iterdir():
        if path.name not in kept and (path.name in replaced or _OWN_NAME.fullmatch(path.name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return _digest({"networks": {name: entry["files"] for name, entry in components.items()}, "config": values})


def _folders_in_use(folder: Path) -> set[str]:
    """Folders of the model that is about to be replaced; none where its settings cannot be read any more."""
    try:
        return {path.name for path in _read_settings(folder / SETTINGS)[0].values()}
    except BadInputError:
        return set()


def _write_network(folder: Path, name: str, network: Any, dtype: torch.dtype) -> dict[str, Any]:
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    stored = network
    if hasattr(network, "from_config"):
        # Where a network was once loaded from is nobody's business, and would change the model's digest.
        stored = type(network).from_config({k: v for k, v in network.config.items() if not k.startswith("_")})
        stored.load_state_dict(network.state_dict())
        for parameter in stored.parameters():
            parameter.data = parameter.data.to(dtype)
    try:
        with explain_full_disk(folder / name):
            stored.save_pretrained(partial)
            for path in partial.iterdir():
                with open(path, "rb+") as handle:
                    os.fsync(handle.fileno())  # else a power cut could leave the new names on empty files
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    checksums = {path.name: sha256_file(path) for path in sorted(partial.iterdir())}
    target = folder / f"{name}-{_digest(checksums)[:8]}"
    try:
        _check_files(target, checksums)
    except BadInputError:  # absent or damaged
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    else:
        shutil.rmtree(partial)
    return {"folder": target.name, "files": checksums}


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check_files(folder: Path, checksums: Mapping[str, str]) -> None:
    for name, expected in checksums.items():
        path = folder / name
        if not path.is_file():
            pickles = [found.name for pattern in _PICKLES for found in folder.glob(pattern)]
            if pickles:
                raise BadInputError(
                    f"{folder / pickles[0]}: expected safetensors weights, got a pickle, which can run code when "
                    "opened. Convert it to safetensors where you trust it."
                )
            raise BadInputError(
                f"{path}: expected this file of the model, got none. Copy the model folder again, whole."
            )
        if sha256_file(path) != expected:
            raise BadInputError(
                f"{path}: expected SHA-256 {expected[:12]}…, got another: the file is damaged. Copy it again."
            )
