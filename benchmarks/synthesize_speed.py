"""Wall time and peak memory of the main command on two CPU cores, offline, and the share spent inside the networks.

    python benchmarks/synthesize_speed.py

Runs ``medgen synthesize --output TMP`` several times as a user would; goals: 8 scans in 60 s, within 2 GB. Then the
same samples once more here, with a clock around the networks; goal: at least 95 % of sampling and decoding. Writes
``benchmarks/results/synthesize_speed.json``. Linux.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import save, table, verdict
from jsonargparse import auto_cli

CORES = 2
GOALS = {"seconds": 60.0, "peak_gb": 2.0, "network_share": 0.95}
# A dead proxy besides: whatever still asks for the network gets an error instead of an answer.
OFFLINE = {"HF_HUB_OFFLINE": "1", **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")}


def run_command(arguments: list[str]) -> dict[str, float]:
    """Time and peak resident memory of one run of the command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "medgen", "synthesize", "--output", f"{folder}/out", *arguments]
        began = time.monotonic()
        process = subprocess.Popen(command, env=os.environ | OFFLINE, stdout=subprocess.DEVNULL)
        # Popen.wait would not give this child's own resources.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"medgen synthesize: expected success, got exit status {process.returncode}")
    return {"seconds": round(seconds, 2), "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3)}


def profile(model: str, num_samples: int, steps: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Seconds of sampling and decoding in all, and inside each network."""
    # Imported late: a child starts with its parent's peak memory, so this process stays small until here.
    import torch

    from medgen.generator import Generator
    from medgen.precision import resolve_precision
    from medgen.synthesis import SamplingSettings, plan_samples
    from medgen.synthesis.labels import prepare
    from medgen.synthesis.sampling import sample_batch

    generator = Generator.from_pretrained(model)
    inside: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                inside[name] = inside.get(name, 0.0) + time.perf_counter() - began

        return wrapped

    generator.denoiser.forward = timed("denoiser", generator.denoiser.forward)
    if generator.label_denoiser is not None:
        generator.label_denoiser.forward = timed("label_denoiser", generator.label_denoiser.forward)
    if generator.autoencoder is not None:
        generator.autoencoder.decode = timed("decoder", generator.autoencoder.decode)
    settings = SamplingSettings(num_inference_steps=steps, precision=resolve_precision("auto", "cpu"))
    specs = plan_samples(num_samples, seed=seed)
    total = 0.0
    for at in range(0, num_samples, batch_size):
        batch = [prepare(spec, generator) for spec in specs[at : at + batch_size]]
        began = time.perf_counter()
        sample_batch(generator, batch, settings)
        total += time.perf_counter() - began
    return {
        "seconds": round(total, 3),
        "inside": {name: round(seconds, 3) for name, seconds in inside.items()},
        "network_share": sum(inside.values()) / total,
        "precision": settings.precision,
        "threads": torch.get_num_threads(),
        "weights_hash": generator.weights_hash,
    }


def main(
    model: str = "hippocampus-mr-3d",
    runs: int = 3,
    num_samples: int = 8,
    num_inference_steps: int = 20,
    batch_size: int = 4,
    seed: int = 0,
) -> None:
    """Time the command, then profile.

    Args:
        model: Folder or name of a generator with a label generator.
        runs: Runs of the command.
        num_samples: As for `medgen synthesize`.
        num_inference_steps: As for `medgen synthesize`.
        batch_size: As for `medgen synthesize`.
        seed: As for `medgen synthesize`.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # children inherit it
    given = {
        "--model": (model, "hippocampus-mr-3d"),
        "--num_samples": (num_samples, 8),
        "--num_inference_steps": (num_inference_steps, 20),
        "--batch_size": (batch_size, 4),
        "--seed": (seed, 0),
    }
    arguments = [word for name, (value, usual) in given.items() if value != usual for word in (name, str(value))]
    measured = []
    for run in range(runs):
        measured.append(run_command(arguments))
        print(f"run {run + 1}: {measured[-1]['seconds']:.1f} s, {measured[-1]['peak_gb']:.2f} GB", flush=True)
    profiled = profile(model, num_samples, num_inference_steps, batch_size, seed)
    figures = {
        "seconds": statistics.median(run["seconds"] for run in measured),
        "peak_gb": statistics.median(run["peak_gb"] for run in measured),
        "network_share": profiled["network_share"],
    }
    reached = {
        name: value >= GOALS[name] if name == "network_share" else value <= GOALS[name]
        for name, value in figures.items()
    }
    rows = [[name, figures[name], GOALS[name], verdict(reached[name])] for name in GOALS]
    table(["figure (median)", "value", "goal", ""], rows)
    save(
        "synthesize_speed",
        what=f"`medgen synthesize --output TMP`: wall time and peak resident memory of the process, {CORES} CPU cores, "
        "offline; share of sampling and decoding inside the networks' forward",
        n={"runs": runs, "scans": num_samples, "num_inference_steps": num_inference_steps, "batch_size": batch_size},
        seeds=[seed],
        model=Path(model).name,
        goals=GOALS,
        median=figures,
        reached=reached,
        runs=measured,
        profile=profiled,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
