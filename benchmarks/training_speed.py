"""Training steps per second beside a plain fp32 loop as in the MONAI tutorials: same networks, scans and machine.

    python benchmarks/training_speed.py

The four kinds of step take turns in one process; medians count. `medgen`: the whole update of `medgen train` (cached
latents from disk, bf16 and channels_last where the hardware has it, gradient clipping, moving average). `plain`: scans
held in memory, encoded by the autoencoder in every step, fp32, default memory layout, neither clipping nor average.
`network bf16` and `network fp32`: the denoiser's update alone on a batch in memory, which leaves the caching out. Goal:
`medgen` at least twice as fast as `plain`. Writes ``benchmarks/results/training_speed.json``.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import ROOT, data_folder, save, table, verdict
from diffusers.training_utils import EMAModel
from jsonargparse import auto_cli
from torch.nn import functional as F
from torch.utils.data import DataLoader

from medgen.conditions.mask import one_hot
from medgen.data.dataset import read_dataset, split_cases
from medgen.networks import Autoencoder, Denoiser
from medgen.planning import Plan, network_arguments, read_plan
from medgen.precision import autocast, memory_format, resolve_precision
from medgen.training.cache import CachedScan, cache_scans, cache_variants, crop_to, read_scan
from medgen.training.denoiser import DenoiserStage
from medgen.training.steering import Steering

SETS = {2: ("cardiac_acdc", "cardiac_2d.yaml"), 3: ("hippocampus3d", "hippocampus_3d.yaml")}
GOAL = 2.0
Step = Callable[[], object]


def medgen_step(plan: Plan, encoder: Autoencoder, denoiser: Denoiser, scans: list[CachedScan], folder: Path) -> Step:
    """What `medgen train` does in a step of the stage `denoiser`."""
    precision = resolve_precision(plan.precision, "cpu")

    @torch.no_grad()
    def encode(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return encoder.encode(tensors["image"][None])[0][0].float()

    own = dataclasses.replace(plan.denoiser, variants=2)
    files = cache_variants(
        scans, encode, own, folder / "latents", size=plan.size, variants=2, seed=0, title="scans for medgen"
    )
    stage = DenoiserStage(
        "denoiser",
        denoiser,
        own,
        own.objective,
        files,
        [],
        steering=Steering(own.conditions, len(plan.class_names), scans),
        preview=lambda step, path: None,
        accelerator=Accelerator(cpu=True),
        precision=precision,
        seed=0,
    )
    parameters = list(stage.averaged.parameters())
    average = EMAModel(parameters, decay=own.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
    steps = itertools.count()

    def step() -> None:
        at = next(steps)
        terms = stage.update(at, list(range(at * own.batch_size, (at + 1) * own.batch_size)))
        terms["loss"].item()
        average.step(parameters)

    return step


def plain_step(plan: Plan, encoder: Autoencoder, denoiser: Denoiser, scans: list[CachedScan]) -> Step:
    """What the tutorials' loop does in a step."""
    denoiser.train()
    held = []
    for scan in scans:  # as MONAI's CacheDataset
        tensors = crop_to(read_scan(scan), plan.size, None)
        held.append({"image": tensors["image"], "label": tensors["label"].long()})
    optimizer = torch.optim.AdamW(denoiser.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    batches = _endless(DataLoader(held, batch_size=plan.denoiser.batch_size, shuffle=True, drop_last=True))
    classes = len(plan.class_names)

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            mean, std = encoder.encode(batch["image"])
            latents = mean + std * torch.randn_like(std)
        noise = torch.randn_like(latents)
        t = plan.denoiser.objective.sample_timesteps(len(latents), generator=torch.Generator())
        noisy = plan.denoiser.objective.add_noise(latents, noise, t)
        output = denoiser(noisy, t, {"mask": one_hot(batch["label"], classes)})
        loss = F.mse_loss(output, plan.denoiser.objective.target(latents, noise, t))
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def _endless(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def network_step(plan: Plan, denoiser: Denoiser, precision: str) -> Step:
    """Forward, backward and optimizer on one batch that is there already."""
    layout = memory_format(plan.spatial_dims) if precision == "bf16" else torch.contiguous_format
    denoiser.train().to(memory_format=layout)
    batch = plan.denoiser.batch_size
    channels, classes = denoiser.config["in_channels"], len(plan.class_names)
    size = [length // plan.compression for length in plan.size]
    x = torch.randn(batch, channels, *size).to(memory_format=layout)
    mask = one_hot(torch.randint(classes, (batch, *plan.size)), classes)
    t = torch.linspace(0, 999, batch)
    optimizer = torch.optim.AdamW(denoiser.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)

    def step() -> None:
        with autocast("cpu", precision):
            output = denoiser(x, t, {"mask": mask})
        F.mse_loss(output.float(), x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(dims: int, rounds: int, warmup: int, batch_size: int | None) -> dict[str, Any]:
    """Seconds of every step, the kinds in turn."""
    name, config = SETS[dims]
    plan = read_plan(ROOT / "configs" / config)
    if batch_size is not None:
        plan = dataclasses.replace(plan, denoiser=dataclasses.replace(plan.denoiser, batch_size=batch_size))
    dataset = read_dataset(data_folder(name))
    cases = split_cases(dataset)[0][: 2 * plan.denoiser.batch_size]
    torch.manual_seed(0)
    encoder = Autoencoder(**network_arguments(plan, "autoencoder")).eval()
    denoiser = Denoiser(**network_arguments(plan, "denoiser"))
    with tempfile.TemporaryDirectory() as folder:
        scans = cache_scans(
            dataset, cases, plan, Path(folder), divisor=plan.compression, skip_bad=False, title="training"
        )
        steps = {
            "medgen": medgen_step(plan, encoder, copy.deepcopy(denoiser), scans, Path(folder)),
            "plain": plain_step(plan, encoder, copy.deepcopy(denoiser), scans),
            "network bf16": network_step(plan, copy.deepcopy(denoiser), "bf16"),
            "network fp32": network_step(plan, copy.deepcopy(denoiser), "fp32"),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in steps}
        for turn in range(-warmup, rounds):
            for kind, step in steps.items():
                began = time.perf_counter()
                step()
                took = time.perf_counter() - began
                if turn >= 0:
                    seconds[kind].append(round(took, 4))
            print(f"{dims}D, round {turn + 1}/{rounds}", flush=True)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        "dataset": name,
        "config": config,
        "batch_size": plan.denoiser.batch_size,
        "size": plan.size,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "precision_of_medgen": resolve_precision(plan.precision, "cpu"),
        "seconds": seconds,
        "median": median,
        "speedup": median["plain"] / median["medgen"],
        "speedup_without_caching": median["network fp32"] / median["network bf16"],
        "medgen_over_cached_fp32": median["network fp32"] / median["medgen"],
    }


def main(dims: list[int] | None = None, rounds: int = 8, warmup: int = 2, batch_size: int | None = None) -> None:
    """Measure in 2D and 3D.

    Args:
        dims: 2, 3 or both; None is both.
        rounds: Timed steps of each kind.
        warmup: Steps of each kind before.
        batch_size: In place of the configuration's, for a trial.
    """
    results = {f"{count}d": measure(count, rounds, warmup, batch_size) for count in dims or [2, 3]}
    rows = []
    for name, result in results.items():
        rows += [[name, kind, value, 1 / value] for kind, value in result["median"].items()]
    table(["", "step", "seconds", "steps per second"], rows)
    names = {
        "speedup": f"medgen over plain loop (goal {GOAL:g}x)",
        "speedup_without_caching": "network alone, bf16 and channels_last over fp32",
        "medgen_over_cached_fp32": "medgen over fp32 network alone (plain loop with perfect caching)",
    }
    table(
        ["ratio of steps per second", *results],
        [[text, *(result[key] for result in results.values())] for key, text in names.items()],
    )
    reached = {name: result["speedup"] >= GOAL for name, result in results.items()}
    print(f"\ngoal {', '.join(f'{name}: {verdict(value)}' for name, value in reached.items())}")
    save(
        "training_speed",
        what=" ".join((__doc__ or "").split("\n\n")[2].split()),
        n={"rounds": rounds, "warmup": warmup},
        seeds=[0],
        threads=torch.get_num_threads(),
        goal=GOAL,
        reached=reached,
        **results,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
