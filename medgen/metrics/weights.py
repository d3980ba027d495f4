"""Weight files of extractors: read without running code, hashed, and loaded completely or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from medgen.provenance import sha256_file
from medgen.types import BadInputError

_SHOWN = 5  # keys that an error names


def read_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors of a local weight file, ``.safetensors`` or of ``torch.save``, and the file's digest.

    A state dict inside ``state_dict`` or ``model`` is taken out, and the prefix ``module.`` of data-parallel training
    is taken off.

    Args:
        path: The file.

    Returns:
        Tensors on the CPU by name, and the SHA-256 of the file.

    Raises:
        BadInputError: If there is no such file, or it holds other things than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInputError(f"{path}: expected a weight file, got none there. Download it by hand and name its path.")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise BadInputError(
            f"{path}: expected a file of tensors, as torch.save writes a state dict or as .safetensors, got one that "
            f"cannot be read: {str(error).splitlines()[0]} Save the state dict alone."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise BadInputError(
            f"{path}: expected tensors by name, got {type(content).__name__}. Save the state dict alone."
        )
    return {str(name).removeprefix("module."): value for name, value in content.items()}, sha256_file(path)


def load_strictly(network: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load all weights, or say what does not fit.

    The counters of batch normalization have no part in inference, and may be absent.

    Args:
        network: Loaded in place.
        weights: Tensors by the names of the network's state dict.
        source: File and what it should hold, for the message of an error.

    Raises:
        BadInputError: If names are missing or unknown, or shapes differ.
    """
    expected = network.state_dict()
    given = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    needed = {name for name in expected if not name.endswith("num_batches_tracked")}
    problems = {
        "missing": sorted(needed - set(given)),
        "unknown": sorted(set(given) - needed),
        "of another shape": sorted(name for name in needed & set(given) if given[name].shape != expected[name].shape),
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {problem} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
            for problem, names in problems.items()
            if names
        )
        raise BadInputError(
            f"{source}: expected all weights of the network and no others, got {found}. Use another file."
        )
    network.load_state_dict(given, strict=False)
