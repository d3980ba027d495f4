"""Safetensors files that are whole or absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from medgen.provenance import atomic_path


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors so that a kill or a full disk leaves the file that was there before.

    Args:
        tensors: Name to tensor, in any layout and on any device.
        path: Target; its folder exists.
        metadata: Text to keep beside them.

    Raises:
        BadInputError: If the disk is full.
    """
    # A copy in row-major order: safetensors refuses other layouts and shared memory.
    plain = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=metadata)
