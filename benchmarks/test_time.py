"""Do generative views help a segmenter on scans of another quality, and does it know where it is wrong?

    python benchmarks/test_time.py --dataset hippocampus3d --model hippocampus-mr-3d
    python benchmarks/test_time.py --dataset cardiac_acdc --model runs/cardiac
    python benchmarks/test_time.py --dataset nuclei_dsb2018 --model runs/nuclei

Segmenters are trained on the clean training split, with mirror images, and tested on the validation split as it is and
with acquisition corruptions of severity 3 (noise, bias field, blur, contrast, motion), which neither segmenters nor
generator have seen. Each scan is segmented

- once (``single``);
- with all its mirror images (``flips``), and with as many geometric views as the generative ones take passes of the
  segmenter (``geometric``: mirror images, and beyond these small turns and scales too);
- with as many changes of gamma, contrast, brightness and noise (``intensity``);
- after minimizing its own entropy over the affine parameters of the norms (``tent``, Wang et al. 2021,
  arXiv:2006.10726: 10 steps of Adam from the trained weights, each scan anew);
- with all its mirror images and ten generative views, which are turned and scaled too: by the defaults of GenerativeTTA
  (``generative``), and with more noise, steered by the prediction for the scan (``conditioned``).

Goals: over all corruptions the generative views give 0.5 Dice points more than the better geometric peer at as many
passes, the 95 % bootstrap interval over patients above 0; on clean scans no more than 0.1 below the better one;
foreground ECE at most 0.8 times that of the single prediction; AURC (confidence: Dice between views; risk: 1 - Dice) no
worse, and the Dice of uncertain with wrong voxels no less than those of the better geometric peer. The threshold of
uncertainty is chosen for each way by the scans of other patients, in two folds.

Of nuclei, segmenters learn from fluorescence (in random colors) and are tested on the two other sites; the generator
has been tuned to unlabelled scans of all sites, these among them, as a user would who has a folder of them.

``--tune`` serves to choose settings: it trains segmenters on two thirds of the training patients and tests on the
others, with severity 2 and other corruptions beside these (ghosting, Gibbs rings); the validation split is not looked
at. (The generator has seen these patients.) All ways that average predictions leave outliers out by the same rule.
Scores of each scan are kept in
the work folder: the same command goes on after a stop, and several can run at once on other corruptions or segmenters.
Writes ``benchmarks/results/test_time_DATASET.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import WORKDIR, data_folder, save, table, unseen, verdict
from jsonargparse import auto_cli
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from one_modality_transfer import recolor
from torch import nn
from torch.nn import functional as F

from medgen.data.case import Case, Dataset
from medgen.data.dataset import read_dataset, split_cases
from medgen.data.intensity import Normalization
from medgen.data.standard import normalize, read_scan
from medgen.generator import Generator
from medgen.metrics.uncertainty import aurc, calibration_error, error_map_auc, error_map_dice
from medgen.provenance import write_text
from medgen.seeding import derive_seed, draw
from medgen.segmentation import CLASSICAL, Augmentation, Pair, Recipe, augment, fit_network, load_pairs
from medgen.segmentation.preparation import Preparation
from medgen.test_time import Consensus, GenerativeTTA, Pose, Segmenter, change_intensities, flips, random_pose
from medgen.transforms import Corruption
from medgen.types import Grid

CORRUPTIONS = ("clean", "noise", "bias_field", "blur", "contrast", "motion")
TUNED_ON = ("clean", "noise", "bias_field", "blur", "contrast", "ghosting", "gibbs")
SEVERITY, TUNED_SEVERITY = 3, 2
VERSION = 2  # raise when equal settings give other scores
OUTLIERS = 0.5  # of GenerativeTTA, for all
MODALITY = {"hippocampus3d": "mri", "cardiac_acdc": "mri"}
SITES = {"nuclei_dsb2018": ("fluorescence", "histology", "brightfield")}  # the first is learned from
AUGMENTATIONS = {
    "geometric": Augmentation(gamma=0.0, noise=0.0),
    "classical": None,
    "colors": Augmentation(noise=0.1),  # and random colors
}
# Axes along which scans are mirrored. Front and back are how the two classes of a hippocampus differ.
MIRRORS = {"hippocampus3d": (0,), "cardiac_acdc": (0, 1), "nuclei_dsb2018": (0, 1)}
PEERS = ("flips", "geometric")
GOALS = {"points": 0.5, "clean": -0.1, "ece": 0.8}
# Generative views by the defaults of GenerativeTTA, and steered by the prediction; chosen with `--tune`.
# `generative` is what the goals are about; `conditioned` stands beside it.
GENERATIVE: dict[str, dict[str, Any]] = {
    "generative": {"strength": 0.3, "randomness": 0.5, "mask": "uncertainty"},
    "conditioned": {"strength": 0.7, "randomness": 0.5, "mask": "uncertainty", "condition_on_prediction": True},
}
OF_VIEWS: dict[str, Any] = {
    "num_views": 10,
    "num_inference_steps": 5,
    "detail": 0.0,
    "rotation": 10.0,
    "scaling": 0.1,
    "outlier_dice": OUTLIERS,
}
SEEDS, STEPS = (0,), 1500
WAYS = ("single", "flips", "geometric", "intensity", "tent", *GENERATIVE)
# Where the prediction does not steer: on hippocampi it lost 0.2 to 0.9 points with `--tune`; the generator of nuclei
# knows no classes.
NOT_STEERED = ("hippocampus3d", "nuclei_dsb2018")


@dataclass(frozen=True)
class Task:
    """What is segmented.

    Attributes:
        name: Of the data set.
        dataset: The real scans.
        train: Those that segmenters learn from.
        test: Those that they are tested on, by what is done to them: ``clean``, a corruption, or another site.
        classes: With the background.
    """

    name: str
    dataset: Dataset
    train: list[Case]
    test: dict[str, list[Case]]
    classes: int

    @property
    def dims(self) -> int:
        """2 or 3."""
        return self.dataset.spatial_dims


def read_task(name: str, *, tune: bool) -> Task:
    """Training and test scans; with `tune` both of the training split, and other patients."""
    dataset = read_dataset(data_folder(name))
    train, test = ([case for case in part if case.label is not None] for part in split_cases(dataset))
    if name in SITES:
        if tune:
            raise SystemExit(f"{name}: expected no tuning, for which its other sites are too few")
        own, *others = SITES[name]
        site = {place: [case for case in train + test if case.meta["site"] == place] for place in others}
        train, clean = ([case for case in part if case.meta["site"] == own] for part in (train, test))
        shifts = {"clean": clean, **site}
        return Task(name, dataset, train, {key: unseen(cases, train) for key, cases in shifts.items()}, 2)
    if tune:
        patients = list(dict.fromkeys(case.group or case.case for case in train))
        held = set(draw(patients, len(patients) // 3, 0, "test time", "tune"))
        test = [case for case in train if (case.group or case.case) in held]
        train = [case for case in train if (case.group or case.case) not in held]
    corruptions = dict.fromkeys(TUNED_ON if tune else CORRUPTIONS, unseen(test, train))
    return Task(name, dataset, train, corruptions, len(dataset.class_names))


class Padded(nn.Module):
    """A U-Net for scans of any size."""

    def __init__(self, dims: int, channels: int, classes: int) -> None:
        super().__init__()
        norm = ("instance", {"affine": True})
        self.network = UNet(dims, channels, classes, (16, 32, 64, 128), (2, 2, 2), num_res_units=2, norm=norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of scans."""
        pad = [amount for length in reversed(x.shape[2:]) for amount in (0, -length % 8)]
        out = self.network(F.pad(x, pad, mode="replicate") if any(pad) else x)
        return out[(..., *(slice(length) for length in x.shape[2:]))]


def digest(known: Any) -> str:
    """Name of what a result depends on."""
    return f"{derive_seed(0, json.dumps(known, sort_keys=True)) % 16**8:08x}"


def segmenter_of(task: Task, kind: str, seed: int, steps: int, folder: Path) -> Padded:
    """Train a segmenter, or take the one that was trained."""
    torch.manual_seed(derive_seed(seed, "test time", "weights"))
    network = Padded(task.dims, len(task.dataset.channel_names), task.classes)
    change = AUGMENTATIONS[kind] or CLASSICAL[task.dims]
    recipe = Recipe(steps, 4 if task.dims == 2 else 2)
    known = [VERSION, kind, seed, repr(change), repr(recipe), MIRRORS[task.name], [case.case for case in task.train]]
    path = folder / f"segmenter_{kind}_{seed}_{digest(known)}.pt"
    if path.is_file():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    patch = (128, 128) if task.dims == 2 else (32, 48, 32)
    own = Preparation((1.0,) * task.dims, (1.0,) * task.dims, patch, 1)
    pairs = load_pairs(task.train, task.dataset, own, "training")

    def example(index: int, generator: torch.Generator) -> Pair:
        image, label = augment(pairs[index], change, patch, generator)
        if kind == "colors":
            image = recolor(image, generator, 0.2)
        axes = [axis + 1 for axis in MIRRORS[task.name] if torch.rand((), generator=generator) < 0.5]
        return image.flip(axes), label.flip(axes)

    loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    fit_network(network, len(pairs), example, loss, recipe, seed=seed, device=torch.device("cpu"), name=kind)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return network.eval()


def read_corrupted(
    case: Case, task: Task, corruption: str, severity: int = SEVERITY
) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    """Image in [0, 1] as segmenters take it, its label and their grid."""
    image, label, grid = read_scan(case, task.dataset)
    if label is None:
        raise ValueError(f"{case.case}: expected a label")
    image = torch.as_tensor(image).float()
    if corruption in TUNED_ON + CORRUPTIONS and corruption != "clean":
        seed = derive_seed(0, "test time", corruption, case.case) % 2**31
        image = torch.as_tensor(Corruption(corruption, severity, MODALITY[task.name], seed)(image)).float()
    return normalize(image, case, task.dataset).clamp(0, 1), label, grid


def geometric_poses(grid: Grid, options: dict[str, Any], passes: int) -> list[Pose]:
    """Mirror images, and beyond them turned and scaled ones, as generative views are too."""
    mirrors = flips(grid.spatial_dims, options["geometric"])
    turns = {name: options[name] for name in ("rotation", "scaling")}
    return [Pose(mirror) for mirror in mirrors] + [
        random_pose(mirrors[number % len(mirrors)], grid.spacing, seed=0, number=number, **turns)
        for number in range(1, 1 + passes - len(mirrors))
    ]


def tent(network: Padded, image: torch.Tensor, *, steps: int = 10, rate: float = 1e-3) -> torch.Tensor:
    """Probabilities after the entropy of the scan was minimized over the affine parameters of the norms."""
    own = {name: value.clone() for name, value in network.state_dict().items()}
    norms = [m for m in network.modules() if isinstance(m, (nn.InstanceNorm2d, nn.InstanceNorm3d))]
    optimizer = torch.optim.Adam([p for m in norms for p in (m.weight, m.bias)], lr=rate)
    for _ in range(steps):
        p = network(image[None]).softmax(dim=1)
        loss = -(p * p.clamp(min=1e-8).log()).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = network(image[None]).softmax(dim=1)[0]
    network.load_state_dict(own)
    return found


def consensus_of(probabilities: Iterator[torch.Tensor]) -> Any:
    """All predictions together."""
    together = Consensus(outlier_dice=OUTLIERS)
    for probability in probabilities:
        together.add(probability)
    return together.result()


def window_of(generator: Generator, case: Case, task: Task) -> tuple[float, float] | None:
    """What the ends of the generator's window, where it has one, become in a picture as segmenters take it."""
    own = generator.config.normalization
    if own.method != "window":
        return None
    if task.name not in SITES:
        raise SystemExit("model: expected one that normalizes each scan, since corruptions move intensities")
    fitted = Normalization(per_channel=False).fit(read_scan(case, task.dataset)[0], source=case.images[0])
    low, high = ((end * fitted.scale[0] + fitted.shift[0] + 1) / 2 for end in (own.low, own.high))
    return low, high


def predict(
    way: str,
    network: Padded,
    generator: Generator,
    image: torch.Tensor,
    grid: Grid,
    options: dict[str, Any],
    window: tuple[float, float] | None,
) -> Any:
    """What one way says of a scan."""
    segmenter = Segmenter(network)
    mirrors = 2 ** len(options["geometric"])
    passes = mirrors + options["num_views"]
    if way == "tent":
        return consensus_of(iter([tent(network, image)]))
    with torch.no_grad():
        if way == "single":
            return consensus_of(iter([segmenter(image)]))
        if way in PEERS:
            poses, first = geometric_poses(grid, options, mirrors if way == "flips" else passes), segmenter(image)
            return consensus_of(pose.back(segmenter(pose.there(image)), first) for pose in poses)
        if way == "intensity":
            return consensus_of(segmenter(change_intensities(image, seed=0, number=n)) for n in range(passes))
        scan = MetaTensor(image, affine=torch.from_numpy(grid.affine)) if grid.known else image
        return GenerativeTTA(segmenter, generator, **options, scaled_window=window)(scan)


THRESHOLDS = tuple(np.round(np.linspace(0.05, 0.65, 13), 2).tolist())


def score(found: Any, label: torch.Tensor, classes: int) -> dict[str, Any]:
    """All figures of one prediction."""
    dice, vote = ([_dice(shown, label, k) for k in range(1, classes)] for shown in (found.label, found.vote))
    error = found.label != label
    entropy = found.entropy / math.log(classes)
    agreement = found.pairwise_dice[~found.pairwise_dice.isnan()]
    row: dict[str, Any] = {
        "dice": dice,
        "dice_of_vote": vote,
        "ece": calibration_error(found.probability, label),
        "ace": calibration_error(found.probability, label, kind="average"),
        "auc": error_map_auc(entropy, error),
        "error_dice": [error_map_dice(entropy, error, threshold) for threshold in THRESHOLDS],
        "confidence": float(agreement.mean()) if len(agreement) else None,
        "certainty": 1 - float(entropy[(found.label > 0) | (entropy > 0.05)].mean().nan_to_num()),
        "dropped": found.dropped,
    }
    for name in ("evaluations", "segmentations", "fallback", "familiarity"):
        if hasattr(found, name):
            row[name] = getattr(found, name)
    return row


def _dice(shown: torch.Tensor, label: torch.Tensor, k: int) -> float:
    if not bool((label == k).any()):
        return math.nan
    return 2 * int(((shown == k) & (label == k)).sum()) / int((shown == k).sum() + (label == k).sum())


def options_of(dataset: str, way: str, views: dict[str, Any]) -> dict[str, Any]:
    """All that a way depends on, beside the segmenter and the generator."""
    own = {**GENERATIVE[way], **views} if way in GENERATIVE else {}
    return {**OF_VIEWS, "geometric": MIRRORS[dataset], **own}


def measure(
    task: Task,
    kinds: Sequence[str],
    seeds: Sequence[int],
    corruptions: Sequence[str],
    ways: Sequence[str],
    *,
    model: str,
    views: dict[str, Any],
    steps: int,
    limit: int | None,
    severity: int,
    folder: Path,
) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """Scores of each scan by segmenter and corruption; finished ones are read."""
    generator = Generator.from_pretrained(model)
    options = {way: options_of(task.name, way, views) for way in ways}
    scores: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for kind in kinds:
        for seed in seeds:
            network = segmenter_of(task, kind, seed, steps, folder)
            weights = sha256(b"".join(value.numpy().tobytes() for value in network.state_dict().values())).hexdigest()
            known = [VERSION, weights, severity]
            marks = {
                way: f"{way}_{digest([known, options[way], generator.weights_hash if way in GENERATIVE else None])}"
                for way in ways
            }
            for corruption in corruptions:
                rows, cases = scores.setdefault((kind, seed, corruption), []), task.test[corruption][:limit]
                for number, case in enumerate(cases):
                    path = folder / "scores" / f"{kind}_{seed}_{corruption}_{case.case}.json"
                    found = json.loads(path.read_text()) if path.is_file() else {}
                    if missing := [way for way in ways if marks[way] not in found]:
                        image, label, grid = read_corrupted(case, task, corruption, severity)
                        window = window_of(generator, case, task)
                        for way in missing:
                            made = predict(way, network, generator, image, grid, options[way], window)
                            found[marks[way]] = score(made, label, task.classes)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_text(path, json.dumps(found))
                        found = json.loads(path.read_text())
                    row = {"case": case.case, "patient": case.group or case.case}
                    rows.append({**row, "ways": {way: found[marks[way]] for way in ways}})
                    if missing:
                        shown = " ".join(f"{way} {np.nanmean(_numbers(found[marks[way]]['dice'])):.3f}" for way in ways)
                        print(f"{kind} {seed} {corruption} {number + 1}/{len(cases)}: {shown}", flush=True)
    return scores


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def by_patient(rows: Sequence[dict[str, Any]], way: str, name: str) -> dict[str, float]:
    """Mean of a figure over the scans of each patient."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = row["ways"][way][name]
        value = np.nanmean(_numbers(value)) if isinstance(value, list) else value
        if value is not None and value == value:
            found.setdefault(row["patient"], []).append(float(value))
    return {patient: float(np.mean(values)) for patient, values in found.items()}


def difference(
    scores: dict[Any, list[dict[str, Any]]], way: str, other: str, name: str = "dice", *, draws: int = 2000
) -> dict[str, float]:
    """Mean difference over patients, segmenters and shifts, with its bootstrap interval over patients.

    A patient that is drawn is drawn with all its scans, under all shifts. Sites have other patients: each is drawn from
    for itself, and counts alike.
    """
    random = np.random.default_rng(0)
    by_patients: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for rows in scores.values():
        first, second = by_patient(rows, way, name), by_patient(rows, other, name)
        gaps = {patient: first[patient] - second[patient] for patient in sorted(first.keys() & second.keys())}
        by_patients.setdefault(tuple(gaps), []).append(gaps)
    means, drawn = [], []
    for patients, several in by_patients.items():
        table = np.array([list(gaps.values()) for gaps in several])
        chosen = random.integers(0, len(patients), (draws, len(patients)))
        means += table.mean(axis=1).tolist()
        drawn += list(table[:, chosen].mean(axis=2))
    spread = np.mean(drawn, axis=0)
    return {
        "mean": float(np.mean(means)),
        "low": float(np.quantile(spread, 0.025)),
        "high": float(np.quantile(spread, 0.975)),
    }


def mean_of(scores: dict[Any, list[dict[str, Any]]], way: str, name: str) -> float:
    """Mean over patients, segmenters and corruptions."""
    return float(np.mean([np.mean(list(by_patient(rows, way, name).values())) for rows in scores.values()]))


def area_of(scores: dict[Any, list[dict[str, Any]]], way: str) -> float:
    """AURC over all scans; confidence is the Dice between views, of one prediction its certainty."""
    rows = [row["ways"][way] for group in scores.values() for row in group]
    rows = [row for row in rows if not np.isnan(_numbers(row["dice"])).all()]  # a scan without a class has no Dice
    if way in ("single", "tent"):
        confidence = [row["certainty"] for row in rows]
    else:  # views that all see nothing agree
        confidence = [1.0 if row["confidence"] is None else row["confidence"] for row in rows]
    return aurc(torch.tensor(confidence), torch.tensor([1 - float(np.nanmean(_numbers(row["dice"]))) for row in rows]))


def error_dice(scores: dict[Any, list[dict[str, Any]]], way: str) -> float:
    """Dice of uncertain with wrong voxels, at the threshold that is best on the other half of the patients."""
    rows = [row for group in scores.values() for row in group]
    half = {row["patient"]: derive_seed(0, "half", row["patient"]) % 2 for row in rows}
    if len(set(half.values())) < 2:
        return math.nan
    values: list[float] = []
    for part in (0, 1):
        tables = [
            np.array(
                [
                    [math.nan if v is None else v for v in row["ways"][way]["error_dice"]]
                    for row in rows
                    if half[row["patient"]] == side
                ]
            )
            for side in (1 - part, part)
        ]
        best = int(np.nanargmax(np.nanmean(tables[0].astype(float), axis=0)))
        values += tables[1].astype(float)[:, best].tolist()
    return float(np.nanmean(values))


def figures_of(clean: dict[Any, Any], shifted: dict[Any, Any], way: str) -> dict[str, Any]:
    """All figures of one way."""
    both = {**clean, **shifted}
    return {
        "dice_shifted": mean_of(shifted, way, "dice"),
        "dice_clean": mean_of(clean, way, "dice"),
        "dice_of_vote_shifted": mean_of(shifted, way, "dice_of_vote"),
        "ece": mean_of(shifted, way, "ece"),
        "ace": mean_of(shifted, way, "ace"),
        "aurc": area_of(shifted, way),
        "error_dice": error_dice(shifted, way),
        "error_auc": mean_of(shifted, way, "auc"),
        "dice_by_shift": {
            name: mean_of({key: rows for key, rows in both.items() if key[2] == name}, way, "dice")
            for name in dict.fromkeys(key[2] for key in both)
        },
        "fallbacks": sum(bool(row["ways"][way].get("fallback")) for rows in both.values() for row in rows),
    }


def compare(
    clean: dict[Any, Any], shifted: dict[Any, Any], figures: dict[str, dict[str, Any]], way: str
) -> dict[str, Any]:
    """Generative views beside the better geometric peer, and whether the goals are reached."""
    best, best_clean = (max(PEERS, key=lambda peer: figures[peer][name]) for name in ("dice_shifted", "dice_clean"))
    ours, single = figures[way], figures["single"]
    gain, kept = difference(shifted, way, best), difference(clean, way, best_clean)
    parts = {
        f"{name}: {value}": difference({key: rows for key, rows in shifted.items() if key[at] == value}, way, best)
        for at, name in ((0, "segmenter"), (2, "shift"))
        for value in dict.fromkeys(key[at] for key in shifted)
    }
    reached = {
        "dice, shifted": 100 * gain["mean"] >= GOALS["points"] and gain["low"] > 0,
        "dice, clean": 100 * kept["mean"] >= GOALS["clean"],
        "ece": ours["ece"] <= GOALS["ece"] * single["ece"],
        "aurc": ours["aurc"] <= min(figures[peer]["aurc"] for peer in PEERS),
        "error dice": ours["error_dice"] >= max(figures[peer]["error_dice"] for peer in PEERS),
    }
    for name, part in (("shifted", gain), ("clean", kept), *parts.items()):
        low, mean, high = (f"{100 * part[key]:+.2f}" for key in ("low", "mean", "high"))
        print(f"{way} - {best_clean if name == 'clean' else best}, {name}: {mean} ({low} to {high})")
    for name, value in reached.items():
        print(f"{way}, {name}: {verdict(value)}")
    peers = {"shifted": best, "clean": best_clean}
    return {"peer": peers, "shifted": gain, "clean": kept, "parts": parts, "reached": reached}


def main(
    dataset: Literal["hippocampus3d", "cardiac_acdc", "nuclei_dsb2018"],
    model: str,
    kinds: tuple[str, ...] | None = None,
    seeds: tuple[int, ...] = SEEDS,
    corruptions: tuple[str, ...] | None = None,
    steps: int = STEPS,
    limit: int | None = None,
    ways: tuple[str, ...] | None = None,
    views: dict[str, Any] | None = None,
    tune: bool = False,
    workdir: Path = WORKDIR / "test_time",
) -> None:
    """Measure one data set.

    Args:
        dataset: ``hippocampus3d``, ``cardiac_acdc`` or ``nuclei_dsb2018``.
        model: Generator that was trained on the training split.
        kinds: Augmentations of the segmenters: ``geometric`` alone, and ``classical`` with intensities too; of nuclei
            ``colors``, without which nothing is found at other sites.
        seeds: Of the segmenters.
        corruptions: Which, by default all; the result is written with all.
        steps: Of each segmenter.
        limit: Most test scans.
        ways: Which, by default all (``conditioned`` on cardiac alone); the result is written with all.
        views: Settings of the generative views beside those chosen, to try others; writes no result.
        tune: Test on other training patients; writes no result.
        workdir: Where segmenters and scores are kept.
    """
    task = read_task(dataset, tune=tune)
    folder = workdir / f"{dataset}{'_tune' if tune else ''}"
    corruptions = corruptions or tuple(task.test)
    all_kinds = ("colors",) if dataset in SITES else ("geometric", "classical")
    kinds = kinds or all_kinds
    all_ways = tuple(way for way in WAYS if way != "conditioned" or dataset not in NOT_STEERED)
    ways = ways or all_ways
    for name, given, known in (
        ("corruptions", corruptions, task.test),
        ("kinds", kinds, AUGMENTATIONS),
        ("ways", ways, WAYS),
    ):
        if unknown := set(given) - set(known):
            raise SystemExit(f"{name}: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    scores = measure(
        task,
        kinds,
        seeds,
        corruptions,
        ways,
        model=model,
        views=views or {},
        steps=steps,
        limit=limit,
        severity=TUNED_SEVERITY if tune else SEVERITY,
        folder=folder,
    )
    clean = {key: rows for key, rows in scores.items() if key[2] == "clean"}
    shifted = {key: rows for key, rows in scores.items() if key[2] != "clean"}
    lines = []
    for way in ways:
        parts = [{key: rows for key, rows in scores.items() if key[2] == name} for name in corruptions]
        lines.append([way, *(100 * mean_of(part, way, "dice") for part in parts)])
    table(("Dice", *corruptions), lines)
    if not (clean and shifted and set(PEERS) <= set(ways)):
        return
    figures: dict[str, dict[str, Any]] = {way: figures_of(clean, shifted, way) for way in ways}
    names = ("dice_shifted", "dice_clean", "ece", "aurc", "error_dice", "fallbacks")
    table(("", *names), [[way, *(figures[way][name] for name in names)] for way in ways])
    verdicts = {way: compare(clean, shifted, figures, way) for way in ways if way in GENERATIVE}
    asked = (set(corruptions), set(ways), set(kinds), seeds, steps)
    if tune or limit or views or asked != (set(task.test), set(all_ways), set(all_kinds), SEEDS, STEPS):
        return
    save(
        f"test_time_{dataset}",
        what=" ".join((__doc__ or "").split()),
        n={
            shift: {"scans": len(cases), "patients": len({case.group or case.case for case in cases})}
            for shift, cases in task.test.items()
        },
        seeds=list(seeds),
        kinds=list(kinds),
        steps=steps,
        model=Generator.from_pretrained(model).config.name,
        views={way: options_of(dataset, way, {}) for way in ways if way in GENERATIVE},
        ways=figures,
        beside_peers=verdicts,
        goals=GOALS,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
