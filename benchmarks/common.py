"""What every benchmark shares: where the real scans are, a table, and the JSON that it leaves."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medgen.data.case import Case
    from medgen.provenance import SampleRecord

ROOT = Path(__file__).resolve().parent.parent
WORKDIR = ROOT / "runs" / "benchmarks"


def data_folder(dataset: str) -> Path:
    """Folder of a real data set, below ``MEDGEN_DATA`` or ``../shared/data``; ends the program where it is absent."""
    folder = Path(os.environ.get("MEDGEN_DATA") or ROOT.parent / "shared" / "data") / dataset
    if not folder.is_dir():
        sys.exit(f"{folder}: expected the real scans of {dataset}, got nothing there. Set MEDGEN_DATA to their folder.")
    return folder


def unseen(test: Sequence[Case], train: Sequence[Case]) -> list[Case]:
    """Without scans that are training scans too: six of ACDC's validation split are, under another patient number."""
    from medgen.provenance import sha256_scan

    known = {sha256_scan(case.images[0]) for case in train}
    return [case for case in test if sha256_scan(case.images[0]) not in known]


def link_files(files: Iterable[Path], folder: Path) -> Path:
    """A folder with these files alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for file in files:
        (folder / file.name).symlink_to(file.resolve())
    return folder


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "medgen", "benchmarks/*.py")
    return git("rev-parse", "HEAD") + ("-changed" if changed else "") or None


def _command() -> str:
    """The command line, with paths told from the repository's folder; where work is kept changes no figure."""
    script, *arguments = sys.argv
    if "--workdir" in arguments:
        del arguments[(at := arguments.index("--workdir")) : at + 2]
    words = [os.path.relpath(word, ROOT) if os.path.isabs(word) else word for word in arguments]
    return shlex.join(["python", os.path.relpath(Path(script).resolve(), ROOT), *words])


def measured_by(device: str | None = None) -> dict[str, Any]:
    """Command, commit, machine and versions, for the JSON; ``device`` where it was not the CPU."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "command": _command(),
        "commit": _commit(),
        "device": device
        or f"cpu, {platform.machine()}, {_cpu_name()}, {cores()} core(s), OMP_NUM_THREADS {threads or 'not set'}",
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("medgen", "torch", "monai", "diffusers", "numpy")},
        },
    }


def save(name: str, *, what: str, n: dict[str, Any], seeds: Sequence[int], device: str | None = None, **result: Any):
    """Write ``results/NAME.json``: what was measured, how, on what, and the figures."""
    content = {
        "what": what,
        **measured_by(device),
        "n": n,
        "seeds": list(seeds),
        **result,
    }
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


def describe_synthesis(records: Sequence[SampleRecord]) -> dict[str, Any]:
    """How a set of synthetic scans was sampled, for the JSON."""
    first = records[0]
    return {
        "guidance_scale": first.guidance_scale,
        "temperature": first.temperature,
        "sampler": first.sampler,
        "num_inference_steps": first.num_inference_steps,
        "precision": first.precision,
        "seed_of_each_scan": [record.seed for record in records],
    }


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table; floats with three digits."""
    print()
    for cells in (head, ["---"] * len(head), *rows):
        shown = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
        print(f"| {' | '.join(shown)} |")


def verdict(reached: bool) -> str:
    """Word for the last column of a table."""
    return "reached" if reached else "missed"
