"""What a control branch costs: memory of its training against that of a whole denoiser, time of sampling with two.

    python benchmarks/control_cost.py

A branch recomputes activations in the backward pass, because the frozen half of the base that lies above it would keep
its own. A whole denoiser keeps its activations, unless a plan asks for recomputing; it is measured that way too: how
much is due to that, and what a step takes in each case.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import cores, save, table, verdict
from diffusers.training_utils import EMAModel
from jsonargparse import auto_cli

from medgen.conditions.condition import Condition
from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.guidance import Guided
from medgen.diffusion.objective import Objective
from medgen.diffusion.sampler import sample
from medgen.generator import Generator, GeneratorConfig
from medgen.networks import Control, Denoiser
from medgen.training.control import ControlledDenoiser

MOST_MEMORY, MOST_TIME = 0.6, 1.5
CLASSES = 4
# What is freed goes back to the system at once, so that the peak is what was in use and not what the allocator held.
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
SIZES = {2: (64, 64), 3: (20, 28, 20)}
CHANNELS = {2: (64, 128, 192), 3: (32, 64, 96)}
STRIDES = {2: 4, 3: 2}


def build(spatial_dims: int) -> Denoiser:
    """The denoiser that the planner chooses for small sets, without conditions.

    Args:
        spatial_dims: 2 or 3.

    Returns:
        The network.
    """
    torch.manual_seed(0)
    return Denoiser(
        spatial_dims=spatial_dims,
        in_channels=8,
        channels=CHANNELS[spatial_dims],
        num_res_blocks=1,
        mask_stride=STRIDES[spatial_dims],
    )


def maps(spatial_dims: int, batch: int) -> dict[str, torch.Tensor]:
    """A mask and edges for a batch.

    Args:
        spatial_dims: 2 or 3.
        batch: Samples.

    Returns:
        Conditions by name.
    """
    size = tuple(n * STRIDES[spatial_dims] for n in SIZES[spatial_dims])
    return {"mask": torch.ones(batch, CLASSES, *size), "edge": torch.ones(batch, 2, *size)}


def status(name: str) -> int:
    """Memory of this process in KiB, as Linux counts it: `VmRSS` now, `VmHWM` the most so far."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[name].split()[0])


def train(kind: str, spatial_dims: int, batch: int) -> None:
    """Three training steps; prints GB of peak memory above that before the networks were built, and its fastest one."""
    conditions = maps(spatial_dims, batch) if kind == "control" else {}
    x = torch.randn(batch, 8, *SIZES[spatial_dims])
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    before = status("VmRSS")
    network: torch.nn.Module = build(spatial_dims)
    learned: torch.nn.Module = network
    if kind == "control":
        learned = Control.of(network, "mask", mask_classes=CLASSES)
        network = ControlledDenoiser(network, learned)
        conditions = {"mask": conditions["mask"]}
    elif kind == "recomputed":
        network.checkpoint_blocks()
    optimizer = torch.optim.AdamW(learned.parameters(), fused=True)
    average = EMAModel(learned.parameters())
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(x, torch.full((batch,), 500.0), conditions)
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(learned.parameters())
        seconds.append(time.perf_counter() - start)
    print(json.dumps([(status("VmHWM") - before) / 1024**2, min(seconds)]))


def sampling_seconds(spatial_dims: int, steps: int, rounds: int) -> dict[int, list[float]]:
    """Seconds of sampling with one and with two branches, in turn."""
    base = build(spatial_dims).eval()
    controls = {
        "mask": Control.of(base, "mask", mask_classes=CLASSES).eval(),
        "edge": Control.of(base, "edge").eval(),
    }
    config = GeneratorConfig(
        name="bench",
        spatial_dims=spatial_dims,
        channel_names={0: "image"},
        class_names=dict.fromkeys(range(CLASSES), "class"),
        size=tuple(n * STRIDES[spatial_dims] for n in SIZES[spatial_dims]),
        objective=Objective(),
        normalization=Normalization(),
        intensity=IntensityMap((1.0,), (0.0,)),
    )
    generator = Generator(config, base, controls=controls)
    given = maps(spatial_dims, 2)
    noise = torch.randn(2, 8, *SIZES[spatial_dims])
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, names in ((1, ("mask",)), (2, ("mask", "edge"))):
            chain, scales = Condition({name: given[name] for name in names}).chain(1.0)
            start = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                sample(Guided(generator.denoise, chain, scales), noise, objective=config.objective,
                       num_inference_steps=steps)  # fmt: skip
            seconds[count].append(time.perf_counter() - start)
    return seconds


def main(batch: int = 32, steps: int = 5, rounds: int = 5, kind: str | None = None, spatial_dims: int = 2) -> None:
    """Measure both, in 2D and in 3D.

    Args:
        batch: Samples of a training step.
        steps: Sampling steps.
        rounds: Of sampling.
        kind: Used by the script itself: train ``full``, ``recomputed`` (full) or ``control`` in a process of its own.
        spatial_dims: For `kind`.
    """
    if kind is not None:
        train(kind, spatial_dims, batch)
        return
    rows, measured, reached = [], {}, {}
    for dims in (2, 3):
        memory, step = {}, {}
        for mode in ("full", "recomputed", "control"):
            command = [sys.executable, __file__, "--kind", mode, "--spatial_dims", str(dims), "--batch", str(batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | _GIVES_BACK)
            memory[mode], step[mode] = json.loads(done.stdout)
        seconds = {count: statistics.median(values) for count, values in sampling_seconds(dims, steps, rounds).items()}
        share, factor = memory["control"] / memory["full"], seconds[2] / seconds[1]
        measured[f"{dims}D"] = {
            "memory_gb": memory,
            "share": share,
            "step_seconds": step,
            "seconds": seconds,
            "factor": factor,
        }
        reached[f"{dims}D"] = {"memory": share <= MOST_MEMORY, "time": factor <= MOST_TIME}
        rows += [
            [f"{dims}D: the whole recomputed / the whole", memory["recomputed"] / memory["full"], "", ""],
            [f"{dims}D: time of a step, branch / the whole", step["control"] / step["full"], "", ""],
            [
                f"{dims}D: memory of training a branch / the whole",
                share,
                f"<= {MOST_MEMORY}",
                verdict(share <= MOST_MEMORY),
            ],
            [
                f"{dims}D: sampling time with two branches / one",
                factor,
                f"<= {MOST_TIME}",
                verdict(factor <= MOST_TIME),
            ],
        ]
    table(["figure", "value", "goal", ""], rows)
    save(
        "control_cost",
        what="peak memory of training steps (weights, optimizer, average, batch) above the imports; time of sampling",
        n={"batch": batch, "sampling_steps": steps, "rounds": rounds, "cores": cores()},
        seeds=[0],
        measured=measured,
        goals={"memory": MOST_MEMORY, "time": MOST_TIME},
        reached=reached,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
