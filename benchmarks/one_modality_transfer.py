"""Do pairs made for a modality without label maps teach a segmenter that modality? After MRGen, on nuclei.

    python benchmarks/one_modality.py --output runs/one_modality
    medgen train --config configs/mrgen_text_mask.yaml
    python benchmarks/one_modality_transfer.py --model runs/mrgen --data runs/one_modality

Only training scans of one modality (fluorescence) have label maps. The generator has seen the training scans of every
modality with their texts, and these label maps. It makes pairs of each other modality, the target, over cuts of the
same label maps; a generator that edges steer and masks do not makes them along the outlines of these, since edges are
seen in every modality without anybody's label. One small U-Net is trained on different scans, with the same steps and
seeds, and judged by its mean Dice on the real validation scans of the target:

- `real`: real annotated scans alone.
- `real_color`: the same, with random colors in place of black and white (inversion, hue and channel weights in one),
  what can be done about the gap without a generator.
- `real_and_synthetic`: half of each batch real annotated scans, half synthetic pairs of the target.
- `synthetic`: synthetic pairs of the target alone.
- `upper_bound`: real training scans of the target with their label maps, which in practice are not there.

Goal: 10 points of Dice above `real`. The training scans of the target are a second, larger test of all but the upper
bound: no label map of theirs was used, but the generator has learned from their images, so it is reported apart.

Nothing is tuned on the target's validation scans. The segmenter's recipe was fixed before there was any synthetic pair:
a usual one, with as many steps as one core does in two minutes; its Dice on validation scans of the annotated modality,
reported too, shows whether it learned its task. The synthesis settings are the model's own unless given. Label maps are
cut to the size of the generator's training scans, each around a voxel of a nucleus. Without ``--model`` only the three
arms without synthetic pairs are measured, and nothing but their scores is kept. Writes
``benchmarks/results/one_modality_transfer.json``; scores, pairs and a contact sheet of each target stay in the work
folder.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import WORKDIR, data_folder, describe_synthesis, save, table, verdict
from jsonargparse import auto_cli
from monai.data.meta_obj import set_track_meta
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, RandAdjustContrastd, RandAffined, RandFlipd, RandGaussianNoised, RandSpatialCropd

from medgen.data.dataset import Case, Dataset, load_cases, read_dataset
from medgen.data.intensity import Normalization
from medgen.data.io import read_label, write_label
from medgen.generator import Generator
from medgen.provenance import SampleRecord, sha256_array
from medgen.seeding import derive_seed, stream
from medgen.synthesis import synthesize
from medgen.types import Sample

Pair = dict[str, torch.Tensor]  # image (3, H, W) in [0, 1], label (1, H, W)
Scores = dict[str, dict[str, float]]  # set of scans -> scan -> Dice
GOAL = 10.0  # points
DATASET = "nuclei_dsb2018"
SYNTHETIC = ("real_and_synthetic", "synthetic")
ARMS = ("real", "real_color", "real_and_synthetic", "synthetic", "upper_bound")


@dataclass(frozen=True)
class Recipe:
    """How every segmenter is trained."""

    crop: int = 128
    features: tuple[int, ...] = (16, 16, 32, 64, 64, 16)
    steps: int = 250
    batch_size: int = 4
    learning_rate: float = 2e-3
    rotation: float = math.pi  # radians, either way
    scaling: float = 0.3  # largest relative change of length, per axis
    gamma: tuple[float, float] = (0.7, 1.4)
    noise: float = 0.1  # largest standard deviation
    plain: float = 0.2  # `real_color`: share of crops that keep their gray values


def prepare(sample: Sample) -> Pair:
    """One preprocessing for real and synthetic scans: percentiles of the scan, channels together, to [0, 1]."""
    if sample.image is None or sample.label is None:
        raise ValueError(f"{sample.case}: expected an image and a label, got only one of them")
    image = Normalization(per_channel=False).fit(sample.image).forward(sample.image)
    return {"image": (image + 1) / 2, "label": sample.label[None].long()}


def recolor(image: torch.Tensor, generator: torch.Generator, plain: float) -> torch.Tensor:
    """Two random colors in place of black and white, rescaled to [0, 1] as the preprocessing does."""
    if torch.rand(1, generator=generator) < plain:
        return image
    dark, bright = torch.rand(2, 3, 1, 1, generator=generator)
    image = dark + (bright - dark) * image
    return (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)


def augmentation(recipe: Recipe, seed: int) -> Compose:
    """A random crop, mirrored, turned, scaled, changed in brightness, with noise."""
    both = ("image", "label")
    changes = Compose(
        [
            RandSpatialCropd(both, recipe.crop, random_size=False),
            RandFlipd(both, prob=0.5, spatial_axis=0),
            RandFlipd(both, prob=0.5, spatial_axis=1),
            RandAffined(
                both,
                prob=1.0,
                rotate_range=recipe.rotation,
                scale_range=(recipe.scaling, recipe.scaling),
                mode=("bilinear", "nearest"),
                padding_mode="reflection",
            ),
            RandAdjustContrastd("image", prob=1.0, gamma=recipe.gamma),
            RandGaussianNoised("image", prob=1.0, std=recipe.noise),
        ]
    )
    changes.set_random_state(seed % 2**32)
    return changes


def train(sources: Sequence[Sequence[Pair]], recipe: Recipe, seed: int, *, color: bool, name: str) -> torch.nn.Module:
    """Train a segmenter on batches with an equal share of every source."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        network = BasicUNet(2, 3, 2, features=recipe.features)
    augment, generator = augmentation(recipe, derive_seed(seed, "augmentation")), stream(seed, "batches")
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1)
    criterion = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    orders: list[list[int]] = [[] for _ in sources]
    began = time.monotonic()
    for _ in range(recipe.steps):
        rows = []
        for pairs, order in zip(sources, orders, strict=True):
            for _ in range(recipe.batch_size // len(sources)):
                order.extend([] if order else torch.randperm(len(pairs), generator=generator).tolist())
                pair = pairs[order.pop()]
                image = recolor(pair["image"], generator, recipe.plain) if color else pair["image"]
                rows.append(augment({**pair, "image": image}))
        image, label = (torch.stack([row[key] for row in rows]) for key in ("image", "label"))
        # In float32: in bfloat16 on a CPU this network's transposed convolutions give NaN.
        loss = criterion(network(image), label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{name}, seed {seed}: loss {loss.item():.3f} after {time.monotonic() - began:.0f} s", flush=True)
    return network.eval()


@torch.inference_mode()
def judge(network: torch.nn.Module, tests: Mapping[str, Mapping[str, Pair]]) -> Scores:
    """Dice of every whole scan of every set."""

    def dice(pair: Pair) -> float:
        found, given = network(pair["image"][None]).argmax(1)[0], pair["label"][0]
        return float(2 * (found * given).sum() / (found.sum() + given.sum()))

    return {name: {case: round(dice(pair), 4) for case, pair in scans.items()} for name, scans in tests.items()}


def measure(
    arm: str,
    sources: Sequence[Sequence[Pair]],
    tests: Mapping[str, Mapping[str, Pair]],
    recipe: Recipe,
    seed: int,
    folder: Path,
    name: str,
) -> Scores:
    """Train and judge one segmenter, or read its scores where this very training was done before."""
    hashes = [sha256_array(tensor) for pairs in sources for pair in pairs for tensor in pair.values()]
    content = json.dumps([arm, seed, asdict(recipe), hashes, sorted(tests)])
    path = folder / "scores" / f"{name.replace(' ', '_')}-{seed}-{derive_seed(content):016x}.json"
    if not path.exists():
        scores = judge(train(sources, recipe, seed, color=arm == "real_color", name=name), tests)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores))
    return json.loads(path.read_text())


def cut_labels(files: Sequence[Path], size: Sequence[int], count: int, folder: Path, seed: int) -> Path:
    """Cuts of label maps, no larger than the scans that the generator was trained on, around a voxel of a nucleus."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for index in range(count):
        file = files[index * len(files) // count if count < len(files) else index % len(files)]
        label, grid = read_label(file)
        generator = stream(seed, "cut", index)
        inside = label.nonzero()
        center = inside[int(torch.randint(len(inside), (1,), generator=generator))].tolist()
        for axis, (voxel, length) in enumerate(zip(center, size, strict=True)):
            length = min(length, label.shape[axis])
            label = label.narrow(axis, min(max(voxel - length // 2, 0), label.shape[axis] - length), length)
        cut = type(grid)(tuple(label.shape), grid.affine, known=grid.known)
        write_label(folder / f"{file.stem}_{index:03d}.png", label.contiguous(), cut)
    return folder


def make_pairs(
    data: Dataset, target: str, model: str, pairs: int, workdir: Path, **settings: Any
) -> tuple[list[Pair], list[SampleRecord]]:
    """Synthetic pairs of a modality, by its text, over cuts of the known label maps, or along their outlines."""
    generator = Generator.from_pretrained(model)
    files = sorted(case.label for case in data.cases if case.label is not None)
    labels = cut_labels(files, generator.config.size, pairs, workdir / "labels", settings["seed"])
    (text,) = {case.text for case in data.cases if case.meta["site"] == target}
    output = workdir / f"{target}-{generator.weights_hash[:8]}"
    outlines = "mask" not in generator.conditions
    records = synthesize(
        output, model=model, prompts=text, labels=labels, label_outlines=outlines, overwrite=True, **settings
    )
    made = read_dataset(output)
    return [prepare(sample) for sample in load_cases(made, made.cases)], records


def interval(gains: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap over scans of the mean gain, 95 %."""
    values = torch.tensor(gains, dtype=torch.float64)
    draws = torch.randint(len(values), (10_000, len(values)), generator=stream(0, "bootstrap"))
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def scan_means(runs: Sequence[Scores], test: str) -> dict[str, float]:
    """Points of Dice of each scan, averaged over the seeds."""
    return {case: 100 * statistics.fmean(run[test][case] for run in runs) for case in runs[0][test]}


def summarize(arms: Mapping[str, Sequence[Scores]], test: str) -> dict[str, Any]:
    """Points of Dice of each arm on one set of scans, and points gained over the arms without a generator."""
    means = {arm: scan_means(runs, test) for arm, runs in arms.items() if test in runs[0]}
    gains = {}
    for arm in means.keys() & {*SYNTHETIC, "real_color", "upper_bound"}:
        for base in {"real", "real_color"} - {arm}:
            by_scan = [means[arm][case] - means[base][case] for case in means[base]]
            low, high = interval(by_scan)
            gains[f"{arm} over {base}"] = {"points": statistics.fmean(by_scan), "interval": [low, high]}
    return {
        "scans": len(means["real"]),
        "dice": {
            arm: {
                "mean": statistics.fmean(scans.values()),
                "seeds": [100 * statistics.fmean(run[test].values()) for run in arms[arm]],
                "by_scan": scans,
            }
            for arm, scans in means.items()
        },
        "gains": dict(sorted(gains.items())),
    }


def show(target: str, annotated: str, result: Mapping[str, Any]) -> None:
    """Print the tables of one target."""
    val, seen, own = result.values()
    rows: list[list[str]] = []
    for arm in (arm for arm in ARMS if arm in val["dice"]):
        values = val["dice"][arm]["seeds"]
        others = [f"{part['dice'][arm]['mean']:.1f}" if arm in part["dice"] else "" for part in (seen, own)]
        rows.append([arm, f"{val['dice'][arm]['mean']:.1f}", f"{min(values):.1f} to {max(values):.1f}", *others])
    head = [f"{target}: trained on", f"Dice, {val['scans']} val scans", "seeds"]
    table([*head, f"{seen['scans']} train scans, seen unlabelled", f"{annotated} val"], rows)
    rows = []
    for name, gain in val["gains"].items():
        other = seen["gains"].get(name)
        goal = verdict(gain["points"] >= GOAL) if name in {f"{arm} over real" for arm in SYNTHETIC} else ""
        figures = [f"{gain['points']:+.1f}", "{:+.1f} to {:+.1f}".format(*gain["interval"])]
        rows.append([name, *figures, f"{other['points']:+.1f}" if other else "", goal])
    table(["points gained", "val", "95 %, over scans", "train scans", f"goal {GOAL:g}"], rows)


def load(dataset: Dataset, cases: Iterable[Case]) -> dict[str, Pair]:
    """Prepared scans by name."""
    return {sample.case: prepare(sample) for sample in load_cases(dataset, cases)}


def main(
    model: str | None = None,
    data: Path = Path("runs/one_modality"),
    pairs: int = 80,
    label_source: Literal["files", "deform"] = "files",
    guidance_scale: float | dict[str, float] | None = None,
    temperature: float | None = None,
    num_inference_steps: int = 20,
    batch_size: int = 8,
    seed: int = 0,
    seeds: int = 3,
    steps: int | None = None,
    workdir: Path = WORKDIR,
) -> None:
    """Make the pairs, train the segmenters, compare.

    Args:
        model: Folder of the generator; None measures what needs none.
        data: List that one_modality.py wrote and the generator was trained on.
        pairs: Synthetic pairs of each target.
        label_source: `deform` also deforms the cuts of the label maps.
        guidance_scale: As for `medgen synthesize`; None is the model's own.
        temperature: As for `medgen synthesize`; None is the model's own.
        num_inference_steps: As for `medgen synthesize`.
        batch_size: As for `medgen synthesize`.
        seed: Of the cuts and the synthetic scans.
        seeds: Segmenters of each arm.
        steps: Shorter training of the segmenters, for a trial.
        workdir: Keeps scores, label maps and synthetic scans.
    """
    set_track_meta(False)
    if not (data / "metadata.csv").exists():
        sys.exit(f"{data}: expected the list of scans, got none. python benchmarks/one_modality.py --output {data}")
    recipe = Recipe() if steps is None else Recipe(steps=steps)
    known, real, folder = read_dataset(data), read_dataset(data_folder(DATASET)), workdir / "one_modality"
    given = {case.case for case in known.cases if case.label is not None}
    (annotated,) = {case.meta["site"] for case in known.cases if case.case in given}
    sites: dict[str, dict[str, dict[str, Pair]]] = {
        site: {
            split: load(real, [case for case in real.cases if case.meta["site"] == site and case.split == split])
            for split in ("train", "val")
        }
        for site in sorted({case.meta["site"] for case in real.cases})
    }
    targets = [site for site in sites if site != annotated]
    source = list(load(known, [case for case in known.cases if case.case in given]).values())
    tests = {f"{site} {split}": sites[site][split] for site in targets for split in ("val", "train")}
    tests[f"{annotated} val"] = sites[annotated]["val"]

    def runs(arm: str, name: str, sources: Sequence[Sequence[Pair]], used: Sequence[str]) -> list[Scores]:
        chosen = {test: tests[test] for test in used}
        return [measure(arm, sources, chosen, recipe, index, folder, name) for index in range(seeds)]

    shared = {arm: runs(arm, arm, [source], list(tests)) for arm in ("real", "real_color")}
    results, synthesis = {}, {}
    records: list[SampleRecord] = []
    for target in targets:
        arms = dict(shared)
        val, train_set, own = f"{target} val", f"{target} train", f"{annotated} val"
        if model is not None:
            made, records = make_pairs(
                known,
                target,
                model,
                pairs,
                folder,
                label_source=label_source,
                guidance_scale=guidance_scale,
                temperature=temperature,
                num_inference_steps=num_inference_steps,
                batch_size=batch_size,
                seed=seed,
            )
            first = records[0].conditions
            synthesis[target] = describe_synthesis(records) | {
                "prompt": first["text"],
                "label_outlines": first.get("label_outlines", False),
            }
            for arm, sources in (("real_and_synthetic", [source, made]), ("synthetic", [made])):
                arms[arm] = runs(arm, f"{arm} {target}", sources, [val, train_set, own])
        target_pairs = list(sites[target]["train"].values())
        arms["upper_bound"] = runs("upper_bound", f"upper_bound {target}", [target_pairs], [val, own])
        results[target] = {
            "val": summarize(arms, val),
            "train_scans_seen_unlabelled_by_the_generator": summarize(arms, train_set),
            f"{annotated}_val": summarize(arms, own),
        }
        show(target, annotated, results[target])
    if model is None:
        return
    gained = {
        target: {arm: result["val"]["gains"][f"{arm} over real"]["points"] for arm in SYNTHETIC}
        for target, result in results.items()
    }
    save(
        "one_modality_transfer",
        what="Dice in points, mean over scans and seeds, of a segmenter on real scans of a modality (the target) of "
        f"which no label map was used: trained on real {annotated} scans alone, on these with random colors, with "
        "synthetic pairs of the target, on those alone, and (upper bound) on real annotated scans of the target; gains "
        "with 95 % bootstrap intervals over scans",
        n={
            "annotated": len(source),
            "pairs": pairs,
            **{f"{site} {split}": len(scans) for site in targets for split, scans in sites[site].items()},
        },
        seeds=[seed, *range(seeds)],
        model={"name": records[0].model, "weights_hash": records[0].model_hash},
        synthesis={"label_source": label_source, "seed": seed, "targets": synthesis},
        segmenter=asdict(recipe),
        annotated=annotated,
        goal=GOAL,
        reached={target: {arm: points >= GOAL for arm, points in row.items()} for target, row in gained.items()},
        targets=results,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
