"""`medgen evaluate` on many pictures: wall time and peak memory, at two sizes of the sets.

python benchmarks/evaluate_speed.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import WORKDIR, cores, save, table, verdict
from jsonargparse import auto_cli
from PIL import Image
from scipy import ndimage

MOST_SECONDS = 90.0
MOST_GROWTH = 1.5  # of the memory above the interpreter's own, for five times the scans


def make_set(folder: Path, count: int, seed: int, blur: float, edge: int) -> Path:
    """Pictures of a bright blob on textured ground, half of them for validation.

    Args:
        folder: Where they go.
        count: Number of pictures.
        seed: Of the first.
        blur: Standard deviation of the texture in pixels.
        edge: Of a picture, in pixels.

    Returns:
        The folder.
    """
    images = folder / "images"
    if len(list(images.glob("*.png"))) == count:
        return folder
    images.mkdir(parents=True, exist_ok=True)
    grid = np.indices((edge, edge)) / edge - 0.5
    for index in range(count):
        source = np.random.default_rng([seed, index])
        center = source.uniform(-0.1, 0.1, size=(2, 1, 1))
        shape = np.exp(-((grid - center) ** 2).sum(0) * source.uniform(10, 30))
        texture = ndimage.gaussian_filter(source.normal(size=(edge, edge)), blur)
        picture = 120 * shape + 40 + 18 * texture / texture.std()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(images / f"case_{index:04d}.png")
    names = sorted(path.stem for path in images.iterdir())
    (folder / "train.txt").write_text("\n".join(names[: count // 2]) + "\n")
    (folder / "val.txt").write_text("\n".join(names[count // 2 :]) + "\n")
    return folder


def run(real: Path, synthetic: Path, output: Path) -> dict[str, float]:
    """Wall seconds and peak memory of one evaluation in a process of its own, with nothing cached."""
    subprocess.run(["rm", "-rf", str(output)], check=True)
    program = (
        "import json, resource, sys, time; start = time.perf_counter();"
        "from pathlib import Path; from medgen.evaluation import evaluate;"
        "imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "evaluate(*map(Path, sys.argv[1:4]));"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print('figures', json.dumps({'inside': time.perf_counter() - start, 'imported': imported, 'peak': peak}))"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, str(real), str(synthetic), str(output)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start
    figures = json.loads(re.search(r"figures (.*)", done.stdout)[1])  # type: ignore[index]
    unit = 1024**2  # ru_maxrss counts KiB on Linux
    return {"seconds": seconds, "peak_gb": figures["peak"] / unit, "imported_gb": figures["imported"] / unit}


def main(count: int = 500, edge: int = 256, seed: int = 0, workdir: Path = WORKDIR) -> None:
    """Time evaluations of sets of `count` and of a fifth of it.

    Args:
        count: Scans of each of the two sets.
        edge: Of a picture, in pixels.
        seed: Of the pictures.
        workdir: Keeps pictures and reports.
    """
    found = {}
    for size in (count // 5, count):
        real = make_set(workdir / "evaluate" / f"real-{size}-{edge}", size, seed, 1.5, edge)
        synthetic = make_set(workdir / "evaluate" / f"synthetic-{size}-{edge}", size, seed + 1, 1.8, edge)
        found[size] = run(real, synthetic, workdir / "evaluate" / f"report-{size}")
    large, small = found[count], found[count // 5]
    growth = (large["peak_gb"] - large["imported_gb"]) / (small["peak_gb"] - small["imported_gb"])
    reached = {"seconds": large["seconds"] <= MOST_SECONDS, "memory": growth <= MOST_GROWTH}
    rows = [
        [
            f"{count} + {count} pictures of {edge}², wall s",
            large["seconds"],
            f"<= {MOST_SECONDS:g}",
            verdict(reached["seconds"]),
        ],
        [f"{count // 5} + {count // 5} pictures, wall s", small["seconds"], "", ""],
        ["peak memory, GB", large["peak_gb"], "", ""],
        [
            f"memory above the imports, {count} against {count // 5}, times",
            growth,
            f"<= {MOST_GROWTH:g}",
            verdict(reached["memory"]),
        ],
    ]
    table(["figure", "value", "goal", ""], rows)
    save(
        "evaluate_speed",
        what="wall time and peak memory of `medgen evaluate` with default settings, nothing cached, kernels compiled",
        n={"scans_a_set": count, "edge": edge, "cores": cores()},
        seeds=[seed],
        measured={str(size): values for size, values in found.items()},
        memory_growth=growth,
        goals={"seconds": MOST_SECONDS, "memory_growth": MOST_GROWTH},
        reached=reached,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
