"""A large volume decoded by tiles: memory, time, and the difference from the whole decode.

    python benchmarks/tiled_decode.py

A process of its own decodes 256³ voxels within each memory bound. At a size whose whole decode fits, tiled and whole
decode are compared, beside the tile borders (two voxels to either side) and away from them, and across them: a seam is
a jump of the difference between two neighbors. The latents are those of a real scan, mirrored to size. Goals: memory
within the bound, and a difference of at most 1e-3 of values in [-1, 1] (fp32). Writes
``benchmarks/results/tiled_decode.json``. Linux.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import data_folder, save, table, verdict
from jsonargparse import auto_cli

from medgen.data.dataset import load_case, read_dataset, split_cases
from medgen.data.geometry import place, to_model
from medgen.data.intensity import Normalization
from medgen.generator import Generator
from medgen.precision import autocast, memory_format

GOAL = 1e-3
MARGIN = 2  # voxels on either side of a border that count as beside it


def latents_of(generator: Generator, size: int) -> torch.Tensor:
    """Latents ``(1, c, n, n, n)`` for ``size`` voxels per axis, from the first validation scan, mirrored on and on."""
    dataset = read_dataset(data_folder("hippocampus3d"))
    sample = load_case(split_cases(dataset)[1][0], dataset)
    if sample.image is None:
        raise SystemExit("expected an image in the first validation case, got none")
    image = Normalization().fit(sample.image).forward(sample.image)
    placement = place(sample.grid, divisor=generator.divisor)
    image = to_model(image, placement, mode="linear", padding="reflect")
    with torch.inference_mode():
        latents = generator.encode(image[None])
        for axis in range(2, latents.ndim):
            extra = size // generator.compression - latents.shape[axis]
            mirrored = np.pad(np.arange(latents.shape[axis]), (0, max(extra, 0)), mode="symmetric")
            mirrored = mirrored[: size // generator.compression]
            latents = latents.index_select(axis, torch.from_numpy(mirrored))
    return latents.contiguous()


def memory_gb(field: str) -> float:
    """Resident memory of this process in GB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def decode_large(model: str, size: int, bound: float, precision: str) -> dict[str, Any]:
    """Decode one large volume; runs in a process of its own."""
    generator = Generator.from_pretrained(model)
    if precision == "bf16":
        generator.to(memory_format=memory_format(3))
    latents = latents_of(generator, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_gb("VmRSS")
    began = time.perf_counter()
    with torch.inference_mode(), autocast("cpu", precision):
        image = generator.decode(latents, max_memory_gb=bound)
    seconds = time.perf_counter() - began
    peak = memory_gb("VmHWM")
    return {
        "bound_gb": bound,
        "precision": precision,
        "shape": list(image.shape),
        "seconds": round(seconds, 2),
        "before_gb": round(before, 3),
        "peak_gb": round(peak, 3),
        "increase_gb": round(peak - before, 3),
        "within_bound": peak - before <= bound,
        "threads": torch.get_num_threads(),
    }


def compare(model: str, size: int, bound: float, precision: str) -> dict[str, Any]:
    """Differences between tiled and whole decode."""
    generator = Generator.from_pretrained(model)
    autoencoder = generator.autoencoder
    if autoencoder is None:
        raise SystemExit(f"{model}: expected a model with an autoencoder, got one in pixel space")
    if precision == "bf16":
        generator.to(memory_format=memory_format(3))
    latents = latents_of(generator, size)
    tiles: list[int] = []
    inner = autoencoder._decode
    autoencoder._decode = lambda x: (tiles.append(x.shape[-1]), inner(x))[1]
    with torch.inference_mode(), autocast("cpu", precision):
        tiled = generator.decode(latents, max_memory_gb=bound)
        count = len(tiles)
        whole = generator.decode(latents)
    if count < 2:
        raise SystemExit(f"expected several tiles at {size} voxels, got one; lower compare_gb")
    stride = (tiles[0] - 2 * autoencoder.decoder_radius) * autoencoder.compression
    difference = tiled - whole
    beside = torch.zeros(difference.shape, dtype=torch.bool)
    seam = 0.0
    for axis in range(2, 5):
        for border in range(stride, size, stride):
            beside.narrow(axis, border - MARGIN, min(2 * MARGIN, size - border + MARGIN)).fill_(True)
            jump = difference.narrow(axis, border, 1) - difference.narrow(axis, border - 1, 1)
            seam = max(seam, jump.abs().max().item())
    return {
        "bound_gb": bound,
        "precision": precision,
        "size": size,
        "tiles": count,
        "tile_stride": stride,
        "beside_borders": difference[beside].abs().max().item(),
        "away": difference[~beside].abs().max().item() if (~beside).any() else None,
        "seam": seam,
        "std_of_whole": whole.std().item(),
    }


def main(
    model: str = "hippocampus-mr-3d",
    size: int = 256,
    bounds_gb: tuple[float, ...] = (1.0, 2.0),
    compare_size: int = 128,
    compare_gb: float = 0.35,
) -> None:
    """Measure memory at the large size, differences at the smaller one.

    Args:
        model: Folder or name of a generator with an autoencoder in 3D.
        size: Voxels per axis of the large volume.
        bounds_gb: Memory bounds for it.
        compare_size: Voxels per axis where the whole decode fits.
        compare_gb: Memory bound there, small enough for several tiles.
    """
    large = []
    for precision in ("fp32", "bf16"):
        for bound in bounds_gb:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                large.append(pool.apply(decode_large, (model, size, bound, precision)))
            print(large[-1], flush=True)
    compared = [compare(model, compare_size, compare_gb, precision) for precision in ("fp32", "bf16")]
    table(
        [f"{size}³", "bound, GB", "increase, GB", "peak of process, GB", "seconds", "within bound"],
        [
            [r["precision"], r["bound_gb"], r["increase_gb"], r["peak_gb"], r["seconds"], verdict(r["within_bound"])]
            for r in large
        ],
    )
    exact = max(compared[0]["away"] or 0.0, compared[0]["beside_borders"], compared[0]["seam"]) <= GOAL
    shown = [
        [r["precision"], r["tiles"], *(f"{r[key] or 0:.1e}" for key in ("away", "beside_borders", "seam"))]
        for r in compared
    ]
    table([f"{compare_size}³, tiled - whole", "tiles", "away", "beside borders", "seam"], shown)
    print(f"\ngoal {GOAL:g} in fp32: {verdict(exact)}")
    save(
        "tiled_decode",
        what="Memory and time of a decode by tiles (increase: peak of the process minus what it held before, so the "
        "output counts), and the largest differences from the whole decode, values in [-1, 1]",
        n={"size": size, "compare_size": compare_size},
        seeds=[],
        model={"name": Path(model).name, "weights_hash": Generator.from_pretrained(model).weights_hash},
        goal=GOAL,
        reached={"difference": exact, "memory": all(row["within_bound"] for row in large)},
        large=large,
        compared=compared,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
