"""A generator that has learned from other public sets, for those who have few scans of their own.

Pictures of the other sets' training splits become a data set of the shape and the classes of the wanted one: gray, of
its size, the k-th class of a set as its k-th class. What they show is not what is wanted; what an edge, a texture and a
label map are can be learned from them all the same.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import ROOT, data_folder
from PIL import Image
from torch.nn import functional as F

from medgen.data.case import Case, Dataset
from medgen.data.dataset import read_dataset, split_cases
from medgen.data.standard import normalize, read_scan
from medgen.planning import read_plan
from medgen.training import train

OTHERS = {"cardiac_acdc": ("hippocampus3d", "nuclei_dsb2018", "cxr_text")}
Picture = tuple[torch.Tensor, torch.Tensor]  # (H, W) in [0, 1], (H, W) class indices


def pictures(case: Case, dataset: Dataset) -> Iterator[Picture]:
    """A picture as it is, in gray; of a volume the slice of each axis that shows most of the labels."""
    image, label, _ = read_scan(case, dataset)
    if label is None:
        return
    gray = normalize(image, case, dataset).clamp(0, 1).mean(dim=0)
    if label.ndim == 2:
        yield gray, label
        return
    for axis in range(3):
        rest = [other for other in range(3) if other != axis]
        best = int((label > 0).sum(dim=rest).argmax())
        yield gray.select(axis, best), label.select(axis, best)


def write_others(target: str, folder: Path, size: tuple[int, ...]) -> Path:
    """The other sets in the shape of `target`; a finished folder is taken as it is."""
    if (folder / "metadata.csv").is_file():
        return folder
    classes = read_dataset(data_folder(target)).class_names
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)
    rows = []
    for name in OTHERS[target]:
        dataset = read_dataset(data_folder(name))
        for case in split_cases(dataset)[0]:
            for number, (gray, label) in enumerate(pictures(case, dataset)):
                if int(label.max()) >= len(classes):
                    raise ValueError(
                        f"{case.case}: expected at most {len(classes) - 1} classes, got {int(label.max())}"
                    )
                file = f"{name}_{case.case}_{number}.png"
                mode = {"mode": "area"} if gray.shape[0] > size[0] else {"mode": "bicubic"}
                small = F.interpolate(gray[None, None], size, **mode)[0, 0].clamp(0, 1)
                map_ = F.interpolate(label[None, None].float(), size, mode="nearest-exact")[0, 0]
                Image.fromarray((small * 255).round().numpy().astype(np.uint8)).save(folder / "images" / file)
                Image.fromarray(map_.numpy().astype(np.uint8)).save(folder / "labels" / file)
                group = f"{name} {case.group or case.case}"
                rows.append({"image": f"images/{file}", "label": f"labels/{file}", "patient": group, "split": "train"})
    # A validation scan is wanted; nothing is chosen by it.
    copy = {key: rows[0][key].replace("/", "/val_") for key in ("image", "label")}
    for key, file in copy.items():
        shutil.copy(folder / rows[0][key], folder / file)
    rows.append({**rows[0], **copy, "split": "val"})
    (folder / "classes.json").write_text(json.dumps({str(value): name for value, name in classes.items()}))
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def pretrain(target: str, config: str, folder: Path, *, autoencoder_steps: int, denoiser_steps: int) -> Path:
    """The run of a generator that has seen the other sets alone; a finished one is taken as it is."""
    plan = read_plan(ROOT / "configs" / config)
    if plan.autoencoder is None:
        raise ValueError(f"{config}: expected an autoencoder")
    plan = replace(
        plan,
        name="other-sets",
        class_names=read_dataset(data_folder(target)).class_names,
        autoencoder=replace(plan.autoencoder, steps=autoencoder_steps),
        denoiser=replace(plan.denoiser, steps=denoiser_steps, batch_size=8, variants=2),
        label=None,
        checkpoint_every=100,
    )
    data = write_others(target, folder / "others", plan.size)
    return train(data, folder / "run", plan=plan, device="cpu")
