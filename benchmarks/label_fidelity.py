"""Do synthetic scans show what their label maps say? A segmenter trained on real scans is the judge.

    python benchmarks/label_fidelity.py --dataset hippocampus3d --model hippocampus-mr-3d

The segmenter learns from the real training scans. Its Dice on the real validation scans stands beside its Dice on
synthetic scans made for the label maps of the same validation scans; the goal is a ratio of at least 0.90 for every
class. The segmenter is trained once and kept in the work folder; ``--stage segmenter`` stops after that. Writes
``benchmarks/results/label_fidelity_DATASET.json``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import WORKDIR, cores, data_folder, describe_synthesis, link_files, save, table, verdict
from jsonargparse import auto_cli
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from torch.nn import functional as F

from medgen.data.dataset import Dataset, load_case, load_cases, read_dataset, split_cases
from medgen.data.geometry import place, to_model
from medgen.data.intensity import Normalization
from medgen.generator import Generator
from medgen.precision import memory_format
from medgen.seeding import stream
from medgen.synthesis import synthesize
from medgen.types import Sample

Pair = tuple[torch.Tensor, torch.Tensor]  # image (1, *spatial) in [-1, 1], label (*spatial)
GOAL = 0.90


@dataclass(frozen=True)
class Recipe:
    """How the judge is trained: every number that decides its weights."""

    crop: tuple[int, ...]
    features: tuple[int, ...]
    steps: int
    batch_size: int
    learning_rate: float = 2e-3
    rotation: float = 15.0  # degrees
    scaling: float = 0.15
    gamma: float = 0.3  # exponent e^-g to e^g
    noise: float = 0.1  # largest standard deviation
    seed: int = 0


RECIPES = {
    "hippocampus3d": Recipe((32, 48, 32), (16, 16, 32, 64, 64, 16), steps=800, batch_size=2),
    "cardiac_acdc": Recipe((128, 128), (16, 32, 64, 96, 128, 16), steps=1500, batch_size=8),
    "cxr_text": Recipe((256, 256), (8, 16, 32, 48, 64, 8), steps=300, batch_size=4),
}
DIVISOR = 16  # of the U-Net's four levels


def prepare(sample: Sample, least: tuple[int, ...] | int = 1) -> Pair:
    """One preprocessing for real and synthetic scans: percentiles to [-1, 1], RAS, padded with the darkest value."""
    if sample.image is None or sample.label is None:
        raise ValueError(f"{sample.case}: expected an image and a label, got only one of them")
    placement = place(sample.grid, min_size=least, divisor=DIVISOR if least == 1 else 1)
    image = Normalization().fit(sample.image).forward(sample.image)
    image = to_model(image, placement, mode="linear", padding="constant", value=-1.0)
    return image, to_model(sample.label, placement, mode="nearest", padding="constant").long()


def draw(pair: Pair, recipe: Recipe, generator: torch.Generator) -> Pair:
    """A random crop, slightly turned, scaled, and changed in brightness."""
    image, label = pair
    dims = label.ndim

    def uniform(bound: float, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound

    angles = uniform(math.radians(recipe.rotation), 3 if dims == 3 else 1)
    skew = torch.zeros(dims, dims)
    for angle, (i, j) in zip(angles, [(0, 1), (0, 2), (1, 2)], strict=False):
        skew[i, j], skew[j, i] = -angle, angle
    # Voxels of the scan per voxel of the crop, then to grid_sample's units and axis order.
    matrix = torch.linalg.matrix_exp(skew) * torch.exp(uniform(recipe.scaling, 1))
    size, crop = torch.tensor(label.shape), torch.tensor(recipe.crop)
    center = uniform(1.0, dims) * (1 - crop / size).clamp(min=0)
    theta = (matrix * crop / size[:, None]).flip(0, 1)
    affine = torch.cat([theta, center.flip(0)[:, None]], dim=1)[None]
    grid = F.affine_grid(affine, [1, 1, *recipe.crop], align_corners=False)
    image = F.grid_sample(image[None] + 1, grid, align_corners=False)[0]  # 0 outside
    label = F.grid_sample(label[None, None].float(), grid, mode="nearest", align_corners=False)[0, 0].long()
    image = (image / 2).clamp(0, 1) ** torch.exp(uniform(recipe.gamma, 1)) * 2 - 1
    spread = torch.rand(1, generator=generator) * recipe.noise
    return image + torch.randn(image.shape, generator=generator) * spread, label


def load_segmenter(folder: Path, dataset: Dataset, recipe: Recipe) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The judge, from its checkpoint or trained now (and then kept)."""
    dims, classes = dataset.spatial_dims, len(dataset.class_names)
    torch.manual_seed(recipe.seed)
    network = BasicUNet(dims, 1, classes, features=recipe.features).to(memory_format=memory_format(dims))
    path = folder / "segmenter.pt"
    settings = json.dumps({**asdict(recipe), "classes": classes})
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["settings"] != settings:
            raise SystemExit(f"{path}: expected a segmenter of this recipe, got another's. Remove it to train anew.")
        network.load_state_dict(kept["weights"])
        return network.eval(), kept["training"]
    cases, _ = split_cases(dataset)
    pairs = [prepare(sample, recipe.crop) for sample in load_cases(dataset, cases)]
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1)
    criterion = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    order: list[int] = []
    began, average = time.monotonic(), 0.0
    for step in range(recipe.steps):
        generator = stream(recipe.seed, "segmenter", step)
        if len(order) < recipe.batch_size:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        rows = [draw(pairs[order.pop(0)], recipe, generator) for _ in range(recipe.batch_size)]
        image, label = (torch.stack(column) for column in zip(*rows, strict=True))
        # In float32: in bfloat16 on a CPU this network (it has transposed convolutions) gave NaN within 150 steps.
        output = network(image.to(memory_format=memory_format(dims)))
        loss = criterion(output.float(), label[:, None])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        average += (loss.item() - average) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            print(
                f"segmenter {step + 1}/{recipe.steps}, loss {average:.4f}, {time.monotonic() - began:.0f} s", flush=True
            )
    training = {
        "recipe": asdict(recipe),
        "scans": len(pairs),
        "seconds": round(time.monotonic() - began),
        "precision": "fp32",
        "cores": cores(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save({"settings": settings, "weights": network.state_dict(), "training": training}, temporary)
    temporary.replace(path)
    return network.eval(), training


@torch.inference_mode()
def judge(network: torch.nn.Module, samples: Iterable[Sample], classes: int) -> torch.Tensor:
    """Per scan and foreground class: voxels found and right, found, and given; ``(N, K - 1, 3)``.

    The padding is no part of any count.
    """
    rows = []
    for sample in samples:
        image, label = prepare(sample)
        # In float32, so that the figure does not depend on the machine.
        found = network(image[None]).argmax(1)[0]
        placement = place(sample.grid, divisor=DIVISOR)
        inside = to_model(torch.ones(sample.grid.shape), placement, mode="nearest", padding="constant").bool()
        found, label = found[inside], label[inside]
        rows.append(
            [
                [int(((found == k) & (label == k)).sum()), int((found == k).sum()), int((label == k).sum())]
                for k in range(1, classes)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def dice(counts: torch.Tensor) -> dict[str, list[Any]]:
    """Per class: mean over the scans that have it, and pooled over the voxels of all scans."""
    right, found, given = counts.unbind(-1)
    scans = 2 * right / (found + given).clamp(min=1)
    has = given > 0
    return {
        "mean": ((scans * has).sum(0) / has.sum(0)).tolist(),
        "pooled": (2 * right.sum(0) / (found + given).sum(0)).tolist(),
        "n": has.sum(0).tolist(),
        "scans": [
            [round(value, 4) if given > 0 else None for value, given in zip(*row, strict=True)]
            for row in zip(scans.tolist(), given.tolist(), strict=True)
        ],
    }


def main(
    dataset: Literal["hippocampus3d", "cardiac_acdc"],
    model: str = "hippocampus-mr-3d",
    guidance_scale: float | None = None,
    temperature: float | None = None,
    num_inference_steps: int = 20,
    batch_size: int = 8,
    seed: int = 0,
    stage: Literal["all", "segmenter"] = "all",
    workdir: Path = WORKDIR,
    limit: int | None = None,
    segmenter_steps: int | None = None,
    suffix: str = "",
) -> None:
    """Train the judge, synthesize for the validation labels, compare.

    Args:
        dataset: Which real scans.
        model: Folder or name of the generator.
        guidance_scale: As for `medgen synthesize`; None is the model's own.
        temperature: As for `medgen synthesize`; None is the model's own.
        num_inference_steps: As for `medgen synthesize`.
        batch_size: As for `medgen synthesize`.
        seed: As for `medgen synthesize`.
        stage: `segmenter` trains the judge, shows its Dice on real scans, and stops.
        workdir: Keeps the segmenter and the synthetic scans.
        limit: Only the first validation scans, for a trial.
        segmenter_steps: Shorter training of the judge, for a trial.
        suffix: Added to the name of the result, such as `_control` for a model whose mask acts by a control branch.
    """
    real = read_dataset(data_folder(dataset))
    recipe = RECIPES[dataset]
    name = "segmenter"
    if segmenter_steps is not None:
        recipe, name = Recipe(**{**asdict(recipe), "steps": segmenter_steps}), f"segmenter-{segmenter_steps}"
    network, training = load_segmenter(workdir / dataset / name, real, recipe)
    # Cases in the order of their label files, which is the order of the synthetic scans.
    val = sorted(split_cases(real)[1], key=lambda case: case.label.name if case.label else "")[:limit]
    classes = [real.class_names[value] for value in sorted(real.class_names) if value]
    on_real = dice(judge(network, load_cases(real, val), len(classes) + 1))
    if stage == "segmenter":
        table(
            ["class", "Dice on real scans", "pooled"],
            list(zip(classes, on_real["mean"], on_real["pooled"], strict=True)),
        )
        return
    generator = Generator.from_pretrained(model)
    scale = generator.config.guidance_scale if guidance_scale is None else guidance_scale
    noise = generator.config.temperature if temperature is None else temperature
    settings = f"w{scale:g}-t{noise:g}-s{num_inference_steps}"
    output = workdir / dataset / f"synthetic-{generator.weights_hash[:8]}-{settings}-{seed}"
    records = synthesize(
        output,
        model=model,
        labels=link_files([case.label for case in val if case.label], workdir / dataset / "val_labels"),
        guidance_scale=guidance_scale,
        temperature=temperature,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        seed=seed,
        overwrite=True,
    )
    made = read_dataset(output)
    by_name = {case.case: case for case in made.cases}
    samples = [load_case(by_name[record.case], made) for record in records]
    for record, sample, case in zip(records, samples, val, strict=True):
        given = load_case(case, real).label
        if given is None or sample.label is None or not torch.equal(given, sample.label):
            raise SystemExit(f"{record.case}: expected the label map of {case.case}, got another one")
    on_synthetic = dice(judge(network, samples, len(classes) + 1))
    rows = []
    for index, name in enumerate(classes):
        before, after = on_real["mean"][index], on_synthetic["mean"][index]
        ratio, pooled = after / before, on_synthetic["pooled"][index] / on_real["pooled"][index]
        rows.append([name, before, after, ratio, pooled, verdict(ratio >= GOAL)])
    table(["class", "Dice real", "Dice synthetic", "ratio", "ratio, pooled", f"goal {GOAL:.2f}"], rows)
    save(
        f"label_fidelity_{dataset}{suffix}",
        what="Dice of a segmenter trained on real scans: on real validation scans, and on synthetic scans made for the "
        "same label maps; mean over the scans that have the class, and pooled over all voxels",
        n={"train": training["scans"], "val": len(val), "synthetic": len(samples)},
        seeds=[recipe.seed, seed],
        model={
            "name": generator.config.name,
            "weights_hash": generator.weights_hash,
            "controls": sorted(generator.controls),
        },
        synthesis=describe_synthesis(records) | {"seed": seed},
        segmenter=training,
        goal=GOAL,
        classes={
            row[0]: dict(zip(("real", "synthetic", "ratio", "ratio_pooled"), row[1:5], strict=True)) for row in rows
        },
        reached=all(row[3] >= GOAL for row in rows),
        dice_real=on_real,
        dice_synthetic=on_synthetic,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
