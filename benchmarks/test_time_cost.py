"""What generative views cost, how exactly a scan comes back, and what memory they take.

    python benchmarks/test_time_cost.py

On validation scans of the hippocampus, with the embedded model and a segmenter that is trained on the training split:

- the way back without randomness against the model's own decode of the same latents, for every inversion, in float32;
- views inside a mask: voxels outside that differ from the scan (none may);
- denoiser rows and seconds of ten views at five steps, without and with guidance, against the published method
  (``null_text``, which is always guided) in one run, alternating: with the 100 iterations after which its optimization
  may stop at the earliest (its cheapest), and with all 1000 (its demonstration). A backward pass counts as two rows;
- peak memory of processes that make 4 and 64 views of a scan of 80 x 80 x 80 voxels.

Goals: 60 dB; no voxel; at most 11 rows a view; a quarter of the cheapest published setting and a twentieth of the
demonstration, by views that are not guided, which is the default (guided ones stand beside);
memory within 5 %. Writes ``benchmarks/results/test_time_cost.json``.
"""

from __future__ import annotations

import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import WORKDIR, save, table, verdict
from jsonargparse import auto_cli
from monai.data import MetaTensor
from test_time import Task, read_corrupted, read_task, segmenter_of

from medgen.data.case import Case
from medgen.diffusion.inversion import METHODS, invert, vary
from medgen.generator import Generator
from medgen.seeding import stream
from medgen.synthesis.editing import steered_scan
from medgen.synthesis.steering import batch_condition
from medgen.test_time import GenerativeTTA, GenerativeViews, ViewSettings
from medgen.test_time.null_text import NullTextSettings, NullTextViews

GOALS = {"psnr": 60.0, "rows_a_view": 11.0, "cheapest": 4.0, "demonstration": 20.0, "memory": 0.05}
MODEL = "hippocampus-mr-3d"


def views_of(case: Case, task: Task, generator: Generator, kind: type[GenerativeViews], **settings: Any) -> Any:
    """Views of a scan, steered by its label map, which stands for a prediction."""
    image, label, grid = read_corrupted(case, task, "clean")
    item = steered_scan(generator, grid, generator.index_to_label(label.contiguous()))
    fitted = generator.config.normalization.fit(image)
    published = settings.pop("published", None)
    extra = {} if published is None else {"published": published}
    condition = batch_condition(generator, [item])
    return kind(generator, image, item.placement, fitted, condition, ViewSettings(**settings), seed=0, **extra)


def exactness(task: Task, generator: Generator, count: int) -> dict[str, float]:
    """Least PSNR in dB of the way back against the decode of the latents, by inversion."""
    worst = dict.fromkeys(METHODS, math.inf)
    for case in task.test["clean"][:count]:
        views = views_of(case, task, generator, GenerativeViews)
        shape = (5, 1, *views.latents.shape[1:])
        noise, other = (torch.randn(shape, generator=stream(case.case, name)) for name in ("there", "back"))
        for method in METHODS:
            options = {"objective": generator.config.objective, "method": method, "noise": noise}
            trajectory = invert(views._denoise, views.latents, **options)
            latents = vary(views._denoise, trajectory, other, randomness=0.0)
            error = (views.decode(latents) - views.decode(views.latents)).double().square().mean()
            worst[method] = min(worst[method], 10 * math.log10(4 / max(float(error), 1e-30)))
    return worst


def outside(task: Task, generator: Generator, count: int) -> int:
    """Voxels outside a mask in which views differ from the scan."""
    differ = 0
    for case in task.test["clean"][:count]:
        image, label, grid = read_corrupted(case, task, "clean")
        scan = MetaTensor(image, affine=torch.from_numpy(grid.affine))
        mask = label > 0
        predict = GenerativeTTA(lambda x: torch.cat([x, -x], dim=1), generator, precision="fp32")
        differ += sum(int((view != image)[0][~mask].sum()) for view in predict.views(scan, 4, mask=mask))
    return differ


def costs(task: Task, generator: Generator, count: int, num_views: int) -> dict[str, dict[str, float]]:
    """Rows and seconds of ten views, alternating between the methods; medians over scans."""
    ways: dict[str, tuple[type[GenerativeViews], dict[str, Any]]] = {
        "generative": (GenerativeViews, {}),
        "generative, guided": (GenerativeViews, {"guidance_scale": 2.0}),
        "null_text, cheapest": (NullTextViews, {"published": NullTextSettings(inversion_steps=30, max_iterations=100)}),
        "null_text, demonstration": (NullTextViews, {"published": NullTextSettings(patience=1000)}),
    }
    rows: dict[str, list[tuple[int, float]]] = {name: [] for name in ways}
    for case in task.test["clean"][:count]:
        for name, (kind, settings) in ways.items():
            started = time.perf_counter()
            views = views_of(case, task, generator, kind, precision="bf16", **settings)
            for start in range(1, num_views + 1, 5):
                numbers = list(range(start, min(start + 5, num_views + 1)))
                views.make(numbers, [None] * len(numbers))
            rows[name].append((views.evaluations, time.perf_counter() - started))
            print(f"{case.case} {name}: {views.evaluations} rows, {rows[name][-1][1]:.1f} s", flush=True)
    return {
        name: {
            "rows": statistics.median(row for row, _ in found),
            "rows_a_view": statistics.median(row for row, _ in found) / num_views,
            "seconds": statistics.median(seconds for _, seconds in found),
        }
        for name, found in rows.items()
    }


def peak(num_views: int, steps: int, workdir: Path) -> float:
    """Peak memory in MiB of a process that makes so many views."""
    options = {"only_views": num_views, "steps": steps, "workdir": workdir}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(
    scans: int = 5, num_views: int = 10, steps: int = 1500, only_views: int = 0, workdir: Path = WORKDIR / "test_time"
) -> None:
    """Measure.

    Args:
        scans: Validation scans.
        num_views: Views of each.
        steps: Of the segmenter.
        only_views: Make so many views of one scan and print the peak memory; measures nothing else.
        workdir: Where the segmenter is kept.
    """
    task, generator = read_task("hippocampus3d", tune=False), Generator.from_pretrained(MODEL)
    if only_views:
        network = segmenter_of(task, "geometric", 0, steps, workdir / "hippocampus3d")
        image, _, _ = read_corrupted(task.test["clean"][0], task, "clean")
        scan = torch.nn.functional.interpolate(image[None], (80, 80, 80), mode="trilinear")[0]
        GenerativeTTA(network, generator, num_views=only_views, check_familiarity=False)(scan)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    segmenter_of(task, "geometric", 0, steps, workdir / "hippocampus3d")
    memory = {count: peak(count, steps, workdir) for count in (4, 64)}
    psnr, differ, found = exactness(task, generator, scans), outside(task, generator, scans), {}
    found = costs(task, generator, scans, num_views)
    ours, guided = found["generative"], found["generative, guided"]
    ratios = {
        name: {
            f"{key}{' guided' if row is guided else ''}": found[f"null_text, {name}"][key] / row[key]
            for row in (ours, guided)
            for key in ("rows", "seconds")
        }
        for name in ("cheapest", "demonstration")
    }
    growth = memory[64] / memory[4] - 1
    exact = min(psnr[name] for name in ("edit_friendly", "o_belm", "edict"))
    reached = {
        "way back": psnr["edit_friendly"] >= GOALS["psnr"],
        "outside the mask": differ == 0,
        "rows a view": max(ours["rows_a_view"], guided["rows_a_view"]) <= GOALS["rows_a_view"],
        **{name: ratios[name]["rows"] >= GOALS[name] for name in ratios},
        "memory": growth <= GOALS["memory"],
    }
    table(("way back", "dB at least"), list(psnr.items()))
    table(("", "rows", "rows a view", "seconds"), [[name, *row.values()] for name, row in found.items()])
    print(f"rows of the published method over ours: {ratios}; memory {memory[4]:.0f} and {memory[64]:.0f} MiB")
    for name, value in reached.items():
        print(f"{name}: {verdict(value)}")
    save(
        "test_time_cost",
        what=" ".join((__doc__ or "").split()),
        n={"scans": scans, "views": num_views},
        seeds=[0],
        model=MODEL,
        psnr=psnr,
        least_of_exact=exact,
        voxels_outside=differ,
        ways=found,
        ratios=ratios,
        memory_mib={str(key): value for key, value in memory.items()},
        memory_growth=growth,
        goals=GOALS,
        reached=reached,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
