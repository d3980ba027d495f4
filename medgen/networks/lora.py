"""LoRA: a few weights beside frozen ones, trained in their place (Hu et al. 2022, arXiv:2106.09685).

A layer ``W x`` becomes ``W x + B A x`` with ``A (r, in)`` and ``B (out, r)``; the factor of the paper's equation 3,
alpha / r, is always 1. Files are those of diffusers: a LoRA of a Stable Diffusion base loads there, and one from there
here. It needs the package peft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from medgen.provenance import explain_full_disk
from medgen.types import BadInputError

LORA_FILE = "pytorch_lora_weights.safetensors"
# Layers of the attentions, by the names that diffusers and MONAI give them.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "out_proj")
_ADAPTER = "default"
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")


def add_lora(network: nn.Module, rank: int = 8, targets: Sequence[str] | None = None) -> list[str]:
    """Put LoRA weights beside layers of a network; they alone are trainable then, and change nothing before training.

    Args:
        network: A denoiser, own or of a base, or a control branch; changed in place.
        rank: r, 1 or more.
        targets: Ends of the names of the layers, such as ``to_q``; None for all attention layers.

    Returns:
        Names of the layers.

    Raises:
        BadInputError: If peft is not installed, the rank is below 1, no layer has one of these names, or the network
            has LoRA weights already.
    """
    if rank < 1:
        raise BadInputError(f"rank: expected 1 or more, got {rank}. Take for example 8.")
    _refuse_tuned(network)
    chosen = find_lora_layers(network, targets)
    _inject(network, dict.fromkeys(chosen, rank))
    return chosen


def find_lora_layers(network: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """Layers of a network that LoRA weights would go beside.

    Args:
        network: As for :func:`add_lora`.
        targets: As there.

    Returns:
        Their names.

    Raises:
        BadInputError: If no layer has one of these names.
    """
    layers = [name for name, module in network.named_modules() if isinstance(module, _LAYERS)]
    wanted = targets if targets is not None else [end for end in ATTENTION if any(map(_ends(end), layers))]
    unknown = [target for target in wanted if not any(map(_ends(target), layers))]
    if unknown or not wanted:
        raise BadInputError(
            f"LoRA targets: expected ends of names of layers of {type(network).__name__}, got "
            f"{', '.join(unknown) or 'none'}. There are {', '.join(_kinds(layers)) or 'no layers'}."
        )
    return [name for name in layers if any(_ends(end)(name) for end in wanted)]


def save_lora(network: nn.Module, folder: str | Path) -> Path:
    """Write the LoRA weights of a network as diffusers does.

    Args:
        network: With LoRA weights.
        folder: Made if absent.

    Returns:
        The file; for a base ``StableDiffusionPipeline.load_lora_weights`` of diffusers reads it.

    Raises:
        BadInputError: If the network has none, or the disk is full.
    """
    suffix = f".{_ADAPTER}.weight"
    weights = {
        name.removesuffix(suffix) + ".weight": tensor.detach().cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if name.endswith(suffix) and ".lora_" in name
    }
    if not weights:
        raise BadInputError(f"{type(network).__name__}: expected LoRA weights to save, got none. Add them first.")
    path = Path(folder) / LORA_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path):
        save_file(weights, path, metadata={"format": "pt"})
    return path


def load_lora(network: nn.Module, folder: str | Path) -> list[str]:
    """Put saved LoRA weights beside the layers that they belong to; they alone are trainable then.

    Args:
        network: The kind of network that they were trained for, without LoRA weights; changed in place.
        folder: As :func:`save_lora` or diffusers wrote it, or the file itself.

    Returns:
        Names of the layers.

    Raises:
        BadInputError: If the file is missing or damaged, holds other weights than those of a LoRA for this network, or
            peft is not installed.
    """
    path = Path(folder) if Path(folder).is_file() else Path(folder) / LORA_FILE
    _refuse_tuned(network)
    weights, settings = _read(path)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, _LAYERS)}
    foreign = sorted(name for name in weights if name not in layers)
    if foreign:
        raise BadInputError(
            f"{path}: expected a LoRA for this {type(network).__name__}, got weights for {', '.join(foreign[:3])}, "
            f"which it does not have ({len(foreign)} of {len(weights)} layers). Name a LoRA of this base, "
            "without text encoder."
        )
    ranks = {}
    for name, parts in weights.items():
        rank, weight = len(parts["A"]), layers[name].weight
        shapes = [tuple(parts["A"].shape[:2]), tuple(parts["B"].shape[:2])]
        if shapes != [(rank, weight.shape[1]), (weight.shape[0], rank)]:
            raise BadInputError(
                f"{path}: expected for {name} weights of shapes {(rank, weight.shape[1])} and "
                f"{(weight.shape[0], rank)}, got {shapes[0]} and {shapes[1]}. Name a LoRA that was trained for this "
                "base."
            )
        ranks[name] = rank
    _inject(network, ranks)
    with torch.no_grad():
        for name, parts in weights.items():
            layer: Any = network.get_submodule(name)
            layer.lora_A[_ADAPTER].weight.copy_(parts["A"])
            layer.lora_B[_ADAPTER].weight.copy_(parts["B"] * (settings.get("lora_alpha", ranks[name]) / ranks[name]))
    return list(weights)


def merge_lora(network: nn.Module) -> nn.Module:
    """Add the LoRA weights to those beside them and remove the LoRA layers; every weight is trainable again.

    Args:
        network: With LoRA weights; changed in place.

    Returns:
        The network, which computes what it did up to rounding.

    Raises:
        BadInputError: If the network has none, or peft is not installed.
    """
    tuned = _tuned_layers(network)
    if not tuned:
        raise BadInputError(f"{type(network).__name__}: expected LoRA weights to merge, got none. Add them first.")
    for name, layer in tuned.items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    del network.peft_config
    return network.requires_grad_(True)


def require_peft() -> Any:
    """Make sure that LoRA weights can be made.

    Returns:
        The package peft.

    Raises:
        BadInputError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise BadInputError("LoRA: expected the package peft, got none. Run: pip install 'medgen[lora]'") from error
    return peft


def _ends(target: str) -> Any:
    return lambda name: name == target or name.endswith(f".{target}")


def _kinds(layers: Sequence[str]) -> list[str]:
    """Names of layers without those of the blocks around them; where the last is a number, with what it numbers."""
    return sorted({found[0] for name in layers if (found := re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name))})


def _tuned_layers(network: nn.Module) -> dict[str, Any]:
    require_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def _refuse_tuned(network: nn.Module) -> None:
    if _tuned_layers(network):
        raise BadInputError(
            f"{type(network).__name__}: expected no LoRA weights yet, got some. Merge them first (merge_lora)."
        )


def _inject(network: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put new LoRA layers around those of these names."""
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    peft = require_peft()
    config = peft.LoraConfig(
        r=1, lora_alpha=1, rank_pattern=patterns, alpha_pattern=patterns, target_modules=list(ranks)
    )
    peft.inject_adapter_in_model(config, network, adapter_name=_ADAPTER)
    missed = set(ranks) - set(_tuned_layers(network))
    if missed:
        raise RuntimeError(f"expected LoRA layers at {sorted(missed)[:3]}, but peft did not put them there")


def _read(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Weights A and B by layer, and the settings that diffusers writes into some files."""
    if not path.is_file():
        pickles = sorted(path.parent.glob("*.bin")) if path.parent.is_dir() else []
        advice = f" {pickles[0].name} is a pickle, which can run code when opened." if pickles else ""
        raise BadInputError(
            f"{path}: expected LoRA weights, got no such file.{advice} Name a folder or file as diffusers saves it."
        )
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            metadata = json.loads((handle.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInputError(f"{path}: expected safetensors, got a damaged file ({error}). Copy it again.") from error
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise BadInputError(
                f"{path}: expected names that end in lora_A.weight or lora_B.weight, got {name}: another format. "
                "Load it in diffusers and save it there with save_lora_weights."
            )
        found.setdefault(match["layer"], {})[match["part"]] = tensor
    half = [name for name, parts in found.items() if len(parts) < 2]
    if half or not found:
        got = f"one of them for {half[0]}" if half else "none"
        raise BadInputError(f"{path}: expected lora_A and lora_B for every layer, got {got}. Copy it again.")
    settings = {name.rpartition(".")[2]: value for name, value in metadata.items()}
    odd = [name for name in ("alpha_pattern", "use_rslora", "use_dora", "lora_bias") if settings.get(name)]
    if odd:
        raise BadInputError(
            f"{path}: expected a plain LoRA, got one with {', '.join(odd)}. Merge it in diffusers (fuse_lora) and save "
            "the pipeline."
        )
    return found, settings
