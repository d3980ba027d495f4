"""What RandSyntheticReplaced costs in a training loop: time of a step, memory over epochs, and whether runs repeat.

    python benchmarks/replacement_cost.py

Real volumes of the hippocampus, and a bank of the embedded model for their label maps. Time is that of one processor
core, so that other work on the machine does not count.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import torch
from common import WORKDIR, cores, data_folder, link_files, save, table, verdict
from jsonargparse import auto_cli
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import Compose, LoadImaged, Orientationd, ScaleIntensityRangePercentilesd, SpatialPadd
from monai.utils import set_determinism

from medgen import read_dataset, synthesize
from medgen.provenance import MANIFEST
from medgen.transforms import RandSyntheticReplaced, SyntheticBank
from medgen.transforms.synthetic_replace import Draw

# A share, and MB per epoch: less than one volume of this size in a byte per voxel.
MOST_TIME, MOST_GROWTH = 0.05, 0.1
KEYS = ("image", "label")
SIZE = (48, 64, 48)
BATCH = 2


class Timed(RandSyntheticReplaced):
    """Keeps the processor time of each call."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seconds: list[float] = []

    def __call__(self, data: Any, randomize: bool = True) -> Any:
        """Replace, and note the time."""
        start = time.thread_time()
        made = super().__call__(data, randomize)
        self.seconds.append(time.thread_time() - start)
        return made


def memory(kind: str) -> float:
    """MB of this process and its workers: `RssAnon` is its own, `VmRSS` counts the mapped file too."""
    pids = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    total = 0
    for pid in pids:
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        total += int(rows[kind].split()[0])
    return total / 1024


def step_seconds(loader: DataLoader, steps: int, classes: int) -> list[float]:
    """Processor seconds of training steps of a small U-Net, loading apart."""
    torch.manual_seed(0)
    network = UNet(3, 1, classes, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    seconds: list[float] = []
    while len(seconds) < steps:
        for batch in loader:
            image, label = (batch[key].as_tensor() for key in KEYS)
            start = time.process_time()
            loss = loss_function(network(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.process_time() - start)
            if len(seconds) == steps:
                break
    return seconds


def epochs_of(dataset: CacheDataset, workers: int, epochs: int) -> list[list[float]]:
    """Sums of the images of each epoch under one seed, which tell which pairs were drawn."""
    set_determinism(0)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers)
    sums = [[float(image.sum()) for batch in loader for image in batch["image"]] for _ in range(epochs)]
    set_determinism(None)
    return sums


def growth(dataset: CacheDataset, workers: int, epochs: int) -> dict[str, list[float]]:
    """Memory after each epoch."""
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
    after: dict[str, list[float]] = {"RssAnon": [], "VmRSS": []}
    for _ in range(epochs):
        for _ in loader:
            pass
        gc.collect()
        for kind, values in after.items():
            values.append(memory(kind))
    return after


def main(scans: int = 32, steps: int = 20, epochs: int = 10) -> None:
    """Measure time, memory and repetition.

    Args:
        scans: Real volumes, and as many synthetic ones.
        steps: Training steps that are timed.
        epochs: Epochs for the memory, at least 3.
    """
    torch.set_num_threads(1)
    data = data_folder("hippocampus3d")
    real = read_dataset(data)
    cases = [case for case in real.cases if case.split != "val" and case.label][:scans]
    files = [{"image": str(case.images[0]), "label": str(case.label)} for case in cases]
    folder = WORKDIR / f"replacement_cost_{scans}"
    if not (folder / MANIFEST).exists():
        labels = link_files([Path(each["label"]) for each in files], WORKDIR / "replacement_labels")
        # Its looks do not matter here.
        synthesize(folder, labels=labels, label_source="files", num_inference_steps=2)
    prepare = [
        LoadImaged(KEYS, ensure_channel_first=True),
        Orientationd(KEYS, "RAS", labels=None),
        ScaleIntensityRangePercentilesd("image", 1, 99, 0, 1, clip=True),
        SpatialPadd(KEYS, SIZE),
    ]
    start = time.process_time()
    bank = SyntheticBank(folder, preprocess=prepare)
    packing = time.process_time() - start
    times: dict[str, dict[str, float]] = {}
    for draw in get_args(Draw):
        replaced = Timed("image", "label", bank, prob=0.5, draw=draw, class_names=real.class_names)
        dataset = CacheDataset(files, Compose([*prepare, replaced]), num_workers=0, progress=False)
        loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=0)
        step = statistics.median(step_seconds(loader, steps, len(real.class_names)))
        first, *calls = replaced.seconds
        call = statistics.mean(calls)
        times[draw] = {
            "share_of_step": BATCH * call / step,
            "step_seconds": step,
            "call_seconds": call,
            "first_call_seconds": first,
        }

    dataset = CacheDataset(
        files, Compose([*prepare, RandSyntheticReplaced("image", "label", bank)]), num_workers=0, progress=False
    )
    after = {workers: growth(dataset, workers, epochs) for workers in (0, 2)}
    # The first epochs fill the allocator and touch what workers share.
    grown = {
        workers: (values["RssAnon"][-1] - values["RssAnon"][1]) / (epochs - 2) for workers, values in after.items()
    }
    repeats = {workers: epochs_of(dataset, workers, 3) == epochs_of(dataset, workers, 3) for workers in (0, 2)}
    frozen = len({tuple(sorted(epoch)) for epoch in epochs_of(dataset, 0, 3)}) == 1

    reached = {
        "time": all(each["share_of_step"] <= MOST_TIME for each in times.values()),
        "memory": max(grown.values()) <= MOST_GROWTH,
        "deterministic": all(repeats.values()),
        "not_frozen": not frozen,
    }
    rows: list[list[object]] = []
    for draw, each in times.items():
        share = each["share_of_step"]
        rows += [
            [f"time of replacing / of a training step, {draw}", share, f"<= {MOST_TIME}", verdict(share <= MOST_TIME)],
            [f"time of a training step [s], {draw}", each["step_seconds"], "", ""],
            [f"time of a call [ms], {draw}", 1000 * each["call_seconds"], "", ""],
            [f"time of the first call, with its checks [ms], {draw}", 1000 * each["first_call_seconds"], "", ""],
        ]
    rows.append(["time of packing a scan [ms]", 1000 * packing / scans, "", ""])
    for workers in (0, 2):
        name = f"{workers} workers"
        rows += [
            [
                f"growth of memory, epochs 3 to {epochs} [MB per epoch], {name}",
                grown[workers],
                f"<= {MOST_GROWTH}",
                verdict(grown[workers] <= MOST_GROWTH),
            ],
            [f"same pairs in a second run, {name}", repeats[workers], "True", verdict(repeats[workers])],
        ]
    rows.append(["other pairs in each epoch of a CacheDataset", not frozen, "True", verdict(not frozen)])
    table(["figure", "value", "goal", ""], rows)
    save(
        "replacement_cost",
        what="RandSyntheticReplaced in the loop of a small 3D U-Net on hippocampus volumes padded to 48x64x48: "
        "processor time of one core, memory of the process and its workers in MB, repetition under set_determinism",
        n={"scans": scans, "synthetic": len(bank), "batch": BATCH, "steps": steps, "epochs": epochs, "cores": cores()},
        seeds=[0],
        measured={
            "times_by_draw": times,
            "packing_seconds_per_scan": packing / scans,
            "memory_after_each_epoch_mb": {str(workers): values for workers, values in after.items()},
            "growth_mb_per_epoch": {str(workers): value for workers, value in grown.items()},
            "repeats": {str(workers): value for workers, value in repeats.items()},
        },
        goals={"share_of_step": MOST_TIME, "growth_mb_per_epoch": MOST_GROWTH},
        reached=reached,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
