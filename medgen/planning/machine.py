"""The machine that will train: what a plan may use, and how fast it is about."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from medgen.precision import has_fast_bf16, resolve_device

# Sustained TFLOP/s in training, of one CPU core or one GPU, with and without bfloat16 in hardware. Rough on purpose:
# every process of a run must come to the same plan, so nothing is measured here.
_TERAFLOPS = {("cpu", True): 0.1, ("cpu", False): 0.035, ("cuda", True): 30.0, ("cuda", False): 8.0}


@dataclass(frozen=True)
class Machine:
    """Where the training will run.

    Attributes:
        device: `cpu` or `cuda`, as torch names it.
        name: Name of the GPU, or `cpu`.
        cores: CPU cores that this process may use.
        memory_gb: All memory of the GPU, or of the CPU within the limit of a container.
        fast_bf16: Whether bfloat16 is multiplied in hardware.
    """

    device: str
    name: str
    cores: int
    memory_gb: float
    fast_bf16: bool

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        """Which rules of thumb hold for it; every accelerator counts as a GPU."""
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def operations_per_second(self) -> float:
        """Assumed floating point operations per second in training, of all processes together."""
        units = self.cores if self.kind == "cpu" else world_size()
        return 1e12 * _TERAFLOPS[self.kind, self.fast_bf16] * units


def read_machine(device: str = "auto") -> Machine:
    """What the training may use. All memory counts, not the free part, so that every process of a run sees the same.

    Args:
        device: `auto`, `cpu`, `cuda` or any torch device.

    Returns:
        The machine.

    Raises:
        BadInputError: If the device is not there.
    """
    chosen = resolve_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = chosen.type, _cpu_memory()
    return Machine(chosen.type, name, cores, round(memory / 1e9, 1), has_fast_bf16(chosen))


def _cpu_memory() -> int:
    # Windows has no sysconf; 8 GB is what a laptop has at least.
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 * 10**9
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path).read_text().strip() if Path(path).is_file() else ""
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def world_size() -> int:
    """Processes of this run, as torch's launchers announce them.

    Returns:
        1 or more.
    """
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))
