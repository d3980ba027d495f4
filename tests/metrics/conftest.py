"""What the tests of extractors with local weights share: weights and scans that are the same on every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def _fill(network: nn.Module) -> dict[str, torch.Tensor]:
    filled = {}
    for number, (name, value) in enumerate(sorted(network.state_dict().items())):
        if name.endswith("num_batches_tracked"):
            filled[name] = torch.tensor(0)
            continue
        index = torch.arange(value.numel(), dtype=torch.float64)
        random = torch.frac(torch.sin(index * 12.9898 + number) * 43758.5453).abs().reshape(value.shape)
        if value.ndim > 1:
            random = (random - 0.5) * (24 / (value.numel() / len(value))) ** 0.5  # keeps the size of activations
        elif name.endswith("running_var"):
            random = random + 0.5
        elif name.endswith("weight"):
            random = 0.75 + random / 2
        else:
            random = 0.2 * (random - 0.5)
        filled[name] = random.float()
    return filled


def _scans(count: int, channels: int, *size: int) -> torch.Tensor:
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) / n for n in size], indexing="ij")
    ramp = sum((7 * (k + 1) * axis for k, axis in enumerate(axes)), torch.zeros(()))
    scans = [
        torch.stack([torch.sin(ramp * (1 + i) + 3 * channel + 9 * axes[0] * axes[1]) for channel in range(channels)])
        for i in range(count)
    ]
    return ((torch.stack(scans) + 1) / 2).float()


@pytest.fixture(scope="session")
def fill_weights() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    """State dict of pseudo-random values for a network."""
    return _fill


@pytest.fixture(scope="session")
def smooth_scans() -> Callable[..., torch.Tensor]:
    """Function of count, channels and spatial shape that gives smooth scans ``(B, C, *shape)`` in [0, 1]."""
    return _scans


_START = """
import json, sys
import torch
from torch import distributed

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
"""
_END = """
print(json.dumps(found))
distributed.destroy_process_group()
"""


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[[str], list[Any]]:
    """Function of a program that two processes run, which know `rank` and `folder`; it gives what each has `found`."""

    def run(program: str) -> list[Any]:
        command = [sys.executable, "-c", _START + program + _END]
        started = [
            subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0]
        return [json.loads(output.splitlines()[-1]) for output in outputs]

    return run
