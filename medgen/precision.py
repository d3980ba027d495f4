"""Which number format the networks run in, on which device, and in which memory layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from medgen.types import BadInputError

Precision = Literal["auto", "fp32", "bf16"]


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn a user's device name into a device that is there.

    Args:
        device: ``"auto"`` (CUDA if there is one, else CPU) or any torch device name.

    Returns:
        The device.

    Raises:
        BadInputError: If the name is unknown or no such device is present.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise BadInputError(
            f"device: expected a device of this machine, got {device!r} ({first_line}). Use 'auto' or 'cpu'."
        ) from error
    return chosen


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 multiplications are done in hardware, and so pay.

    Args:
        device: CPU or accelerator.

    Returns:
        True for a CPU with AMX-BF16 or AVX512-BF16 and for a GPU with native bfloat16.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    read = getattr(torch.cpu, "get_capabilities", None)  # newer torch only
    if read is not None:
        capabilities = read()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "amx_bf16" in flags or "avx512_bf16" in flags


def has_bf16_kernels() -> bool:
    """Whether this CPU has bfloat16 convolutions, in hardware or emulated.

    Returns:
        False where torch falls back to unfolding, which is slow and takes memory: on CPUs without AVX-512, for example.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_precision(precision: Precision, device: str | torch.device) -> Literal["fp32", "bf16"]:
    """Turn ``"auto"`` into the format that is fast on this device; an explicit choice is kept, with a warning if slow.

    Args:
        precision: ``"auto"``, ``"fp32"`` or ``"bf16"``.
        device: Device that the networks run on.

    Returns:
        ``"bf16"`` or ``"fp32"``.

    Raises:
        BadInputError: If the name is not one of the three.
    """
    if precision == "auto":
        return "bf16" if has_fast_bf16(torch.device(device)) else "fp32"
    if precision not in ("fp32", "bf16"):
        raise BadInputError(f"precision: expected 'auto', 'fp32' or 'bf16', got {precision!r}. Use 'auto'.")
    if precision == "bf16" and torch.device(device).type == "cpu" and not has_bf16_kernels():
        warnings.warn(
            "precision: this CPU has no bfloat16 convolutions, so that 'bf16' is many times slower than 'fp32'. Use "
            "'auto', which takes what is fast.",
            stacklevel=2,
        )
    return precision


def autocast(device: str | torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Context in which the networks run in ``precision``; parameters and states stay float32.

    Args:
        device: Device that the networks run on.
        precision: As for :func:`resolve_precision`.

    Returns:
        A context manager; for fp32 it also switches an outer autocast off.
    """
    enabled = resolve_precision(precision, device) == "bf16"
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Context in which float32 is float32: GPUs round it to TensorFloat-32 (10 bits) in convolutions by default.

    Yields:
        Nothing.
    """
    conv: Any = getattr(torch.backends.cudnn, "conv", None)
    # torch before 2.9 has the older switch only; later ones refuse to read it where a user has set the newer one.
    older = (torch.backends.cudnn, "allow_tf32", False)
    switch, name, exact = older if conv is None else (conv, "fp32_precision", "ieee")
    before, matmul_before = getattr(switch, name), torch.get_float32_matmul_precision()
    setattr(switch, name, exact)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        setattr(switch, name, before)
        torch.set_float32_matmul_precision(matmul_before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, which torch says in several ways.

    Args:
        error: What was caught.

    Returns:
        True for MemoryError and for torch's messages on CPU and GPU.
    """
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def memory_format(spatial_dims: int) -> torch.memory_format:
    """Layout in which bfloat16 convolutions are fastest.

    Args:
        spatial_dims: 2 or 3.

    Returns:
        ``torch.channels_last`` or ``torch.channels_last_3d``, for ``module.to(memory_format=...)``.
    """
    return torch.channels_last_3d if spatial_dims == 3 else torch.channels_last
