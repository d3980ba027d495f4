"""Planted copies: how many of them are found, and how many scans that copy nothing are taken for copies.

Copies are real training scans, flipped, turned by 5 degrees, with noise of 5 % of the intensity range, at another
intensity scale, or all of that together; each is judged alone, so the shares hold for a synthetic set of which they are
5 %. Goal: at least 95 % found, for each kind, at no more than 1 % false alarms. Scans that copy nothing are real scans
of patients that the "training set" at hand lacks: the patients are dealt into folds, and each fold is judged against
the other folds, whose scans alone set the threshold. Files that are equal, byte for byte, to one of another patient are
copies, so they are counted apart. Scans of a generator can be judged as well, by ``--synthetic "[DATASET=FOLDER]"``;
what is found there may be copies, and scans drawn over the label map of a training scan share its anatomy. Harder
copies (10 degrees and twice the noise, a crop, a blur) have no goal. Writes ``benchmarks/results/memorization.json``
and, for the eye, ``runs/benchmarks/DATASET/closest_pairs.png``.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import WORKDIR, data_folder, save, table, verdict
from jsonargparse import auto_cli
from matplotlib import pyplot
from scipy.stats import binomtest

from medgen.data.case import RGB
from medgen.data.dataset import load_case, read_dataset, split_cases
from medgen.data.geometry import place, to_model
from medgen.data.intensity import Normalization
from medgen.metrics import CopySearch, Memorization, apply_pose, find_copies, summarize_pose
from medgen.metrics.descriptor import describe
from medgen.seeding import stream

MOST_MISSED = 0.05
MOST_FALSE_ALARMS = 0.01
FOLDS = 5


@dataclass
class Scan:
    """A scan in [0, 1], ``(C, *spatial)``, with its patient and a hash of its file."""

    case: str
    patient: str
    digest: str
    image: torch.Tensor


def normalize(image: torch.Tensor, *, colors: bool = False) -> torch.Tensor:
    """Percentiles 0.5 and 99.5 of each channel, or of all colors, to 0 and 1."""
    return (Normalization(per_channel=not colors).fit(image).forward(image) + 1) / 2


def read(folder: Path) -> tuple[list[Scan], list[Scan]]:
    """Training and validation scans of a folder, normalized as `medgen evaluate` does."""
    dataset = read_dataset(folder)

    def scan(case: Any) -> Scan:
        sample = load_case(case, dataset)
        if sample.image is None:
            raise ValueError(f"{case.case}: expected an image, got none")
        image = to_model(sample.image, place(sample.grid), mode="linear", padding="constant")
        digest = hashlib.sha256(b"".join(Path(path).read_bytes() for path in case.images)).hexdigest()
        return Scan(case.case, case.group or case.case, digest, normalize(image, colors=dataset.channel_names == RGB))

    if dataset.synthetic:
        return [scan(case) for case in dataset.cases], []
    train, val = split_cases(dataset)
    return [scan(case) for case in train], [scan(case) for case in val]


def flip(image: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Mirror along a random axis."""
    return image.flip(1 + int(torch.randint(image.ndim - 1, (1,), generator=random)))


def turn(image: torch.Tensor, random: torch.Generator, degrees: float = 5) -> torch.Tensor:
    """Turn voxels to either side, in 3D about a random axis; what comes in from outside is 0."""
    dims = image.ndim - 1
    if dims == 2:
        skew = torch.tensor([[0.0, -1.0], [1.0, 0.0]]) * (1 if torch.rand((), generator=random) < 0.5 else -1)
    else:
        x, y, z = torch.nn.functional.normalize(torch.randn(3, generator=random), dim=0).tolist()
        skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    matrix = torch.linalg.matrix_exp(math.radians(degrees) * skew.double())
    size = torch.tensor(image.shape[1:], dtype=torch.float64)
    pose = torch.cat([matrix * size / size[:, None], torch.zeros(dims, 1, dtype=torch.float64)], dim=1)
    return apply_pose(image[None], pose[None])[0]


def noise(image: torch.Tensor, random: torch.Generator, sigma: float = 0.05) -> torch.Tensor:
    """White Gaussian noise."""
    return image + sigma * torch.randn(image.shape, generator=random)


def rescale(image: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Contrast of 70 to 130 %, brightness moved by up to 10 % of the range."""
    contrast, brightness = torch.rand(2, generator=random).tolist()
    return image * (0.7 + 0.6 * contrast) + 0.2 * brightness - 0.1


def everything(image: torch.Tensor, random: torch.Generator, degrees: float = 5, sigma: float = 0.05) -> torch.Tensor:
    """All of them."""
    return noise(rescale(flip(turn(image, random, degrees), random), random), random, sigma)


def crop(image: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Central 85 % of each axis."""
    for axis, size in enumerate(image.shape[1:], start=1):
        margin = round(0.075 * size)
        image = image.narrow(axis, margin, size - 2 * margin)
    return image


def blur(image: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Mean over three voxels along each axis, as a lossy autoencoder might do."""
    pool = torch.nn.functional.avg_pool2d if image.ndim == 3 else torch.nn.functional.avg_pool3d
    return pool(image[None], 3, stride=1, padding=1, count_include_pad=False)[0]


KINDS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "flipped": flip,
    "turned by 5°": turn,
    "noise of 5 %": noise,
    "intensity scaled": rescale,
    "all of these": everything,
}
HARDER: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "all, 10° and noise of 10 %": lambda image, random: everything(image, random, 10, 0.1),
    "cropped to 85 %": crop,
    "blurred over 3 voxels": blur,
}


def share(count: int, n: int) -> dict[str, Any]:
    """A share with its exact (Clopper-Pearson) 95 % interval."""
    interval = binomtest(count, n).proportion_ci(confidence_level=0.95, method="exact")
    return {"count": count, "n": n, "share": count / n, "interval": [float(interval.low), float(interval.high)]}


def descriptors(scans: list[Scan]) -> torch.Tensor:
    """Descriptors as the metric keeps them."""
    return torch.cat([describe(scan.image[None]).half() for scan in scans])


def false_alarms(scans: list[Scan], seed: int) -> tuple[int, int]:
    """Scans of left-out patients that are taken for copies of scans of the others, and how many were judged."""
    patients = sorted({scan.patient for scan in scans})
    order = [patients[i] for i in torch.randperm(len(patients), generator=stream(seed, "folds")).tolist()]
    number = {patient: index for index, patient in enumerate(order)}
    everyone = descriptors(scans)
    groups = torch.tensor([number[scan.patient] for scan in scans])
    alarms = 0
    for fold in range(FOLDS):
        left_out = groups % FOLDS == fold
        found = find_copies(everyone[~left_out], everyone[left_out], groups=groups[~left_out])
        alarms += int(found.is_copy.sum())
    return alarms, len(scans)


def draw_pairs(found: CopySearch, scans: list[Scan], train: list[Scan], shown: list[int], path: Path) -> None:
    """Pairs for the eye: a judged scan, its closest real scan, and that one aligned with it."""
    _, axes = pyplot.subplots(len(shown), 3, figsize=(7, 2.4 * len(shown)), squeeze=False)
    for row, index in zip(axes, shown, strict=True):
        scan, real = scans[index], train[int(found.closest.index[index])]
        pose = found.closest.pose[index]
        aligned = apply_pose(real.image[None], pose[None], scan.image.shape[1:])[0]
        words = summarize_pose(pose, scan.image.shape[1:], real.image.shape[1:])
        titles = [
            f"{scan.case}\nsimilarity {float(found.closest.similarity[index]):.3f}, "
            + ("copy" if found.is_copy[index] else "no copy"),
            f"closest: {real.case}",
            f"aligned: flip {words.flipped}, {words.rotation:.1f}°",
        ]
        for axis, image, title in zip(row, (scan.image, real.image, aligned), titles, strict=True):
            plane = image[0] if image.ndim == 3 else image[0, :, :, image.shape[3] // 2]
            axis.imshow(plane.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=7)
            axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close()


def measure(name: str, synthetic: list[Path], n: int, seed: int, workdir: Path) -> dict[str, Any]:
    """All figures of one data set."""
    train, val = read(data_folder(name))
    owner = {scan.digest: scan.patient for scan in train}
    twins = [scan.case for scan in val if owner.get(scan.digest, scan.patient) != scan.patient]
    held_out = [scan for scan in val if scan.case not in twins]
    planted: list[Scan] = []
    for kind, change in (KINDS | HARDER).items():
        for i in range(n):
            source = train[i * len(train) // n]
            image = normalize(change(source.image, stream(seed, kind, i)))
            planted.append(Scan(f"{source.case}, {kind}", source.patient, source.case, image))
    made = {folder.name: read(folder)[0] for folder in synthetic}
    judged = [*planted, *val, *(scan for scans in made.values() for scan in scans)]
    metric = Memorization()
    for scan in train:
        metric.update(scan.image[None], real=True, groups=[scan.patient])
    for scan in judged:
        metric.update(scan.image[None], real=False)
    found = metric.search()
    recall = {}
    for position, kind in enumerate(KINDS | HARDER):
        rows = slice(position * n, (position + 1) * n)
        right = [
            train[int(i)].case == scan.digest for i, scan in zip(found.closest.index[rows], planted[rows], strict=True)
        ]
        recall[kind] = share(int(found.is_copy[rows].sum()), n) | {"right_scan": sum(right) / n}
    verdicts = dict(zip([scan.case for scan in val], found.is_copy[len(planted) :].tolist(), strict=False))
    generator, start = {}, len(planted) + len(val)
    for folder, scans in made.items():
        generator[folder] = share(int(found.is_copy[start : start + len(scans)].sum()), len(scans))
        start += len(scans)
    alarms, count = false_alarms([*train, *held_out], seed)
    times = descriptors([(train + val)[i % len(train + val)] for i in range(500)])
    begin = time.perf_counter(), time.process_time()
    find_copies(times, times, groups=torch.arange(500) % 20)
    seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    # The copies that were hardest to find, and what most resembles a training scan of all that copies nothing.
    position = list(KINDS).index("all of these") * n
    order = found.closest.similarity.argsort(descending=True).tolist()
    hardest = [i for i in order if position <= i < position + n][-4:]
    nearest = [i for i in order if i >= len(planted) and judged[i].case not in twins][:6]
    draw_pairs(found, judged, train, hardest + nearest, workdir / name / "closest_pairs.png")
    return {
        "threshold": found.threshold,
        "scans": {"train": len(train), "val": len(val), "planted_of_each_kind": n},
        "recall": recall,
        "false_alarms_left_out_patients": share(alarms, count) | {"folds": FOLDS},
        "false_alarms_val": share(sum(verdicts[scan.case] for scan in held_out), len(held_out)),
        "equal_files_of_two_patients": {"cases": twins, "found": sum(verdicts[case] for case in twins)},
        "generator": generator,
        "seconds_500_against_500": {"wall": seconds[0], "processor": seconds[1]},
    }


def report(name: str, result: dict[str, Any]) -> dict[str, bool]:
    """Print the figures of one data set; which goals they reach."""
    rows: list[list[object]] = []
    reached = {"recall": True, "false_alarms": True}

    def add(label: str, row: dict[str, Any], goal: str = "", good: bool = True) -> None:
        low, high = row["interval"]
        rows.append([label, row["share"], f"{low:.3f} to {high:.3f}", row["n"], goal, verdict(good) if goal else ""])

    for kind, row in result["recall"].items():
        good = row["share"] >= 1 - MOST_MISSED
        add(f"found: {kind}", row, f">= {1 - MOST_MISSED:g}" if kind in KINDS else "", good)
        reached["recall"] &= good or kind not in KINDS
    for key, label in (
        ("false_alarms_left_out_patients", "patients left out"),
        ("false_alarms_val", "validation scans"),
    ):
        good = result[key]["share"] <= MOST_FALSE_ALARMS
        add(f"false alarms: {label}", result[key], f"<= {MOST_FALSE_ALARMS:g}", good)
        reached["false_alarms"] &= good
    for folder, row in result["generator"].items():
        add(f"found among {folder}", row)
    for clock, seconds in result["seconds_500_against_500"].items():
        rows.append([f"{clock} seconds for 500 against 500", seconds, "", "", "", ""])
    twins = result["equal_files_of_two_patients"]
    print(f"\n{name}: threshold {result['threshold']:.3f}")
    print(
        f"{len(twins['cases'])} validation files equal a training file of another patient; {twins['found']} are found"
    )
    table(["figure", "share", "95 % interval", "n", "goal", ""], rows)
    return reached


def main(
    dataset: list[str] | None = None,
    synthetic: list[str] | None = None,
    n: int = 200,
    seed: int = 0,
    workdir: Path = WORKDIR,
) -> None:
    """Plant copies and look for them.

    Args:
        dataset: Real sets; cardiac_acdc and hippocampus3d by default.
        synthetic: Folders of a generator's scans, each as DATASET=FOLDER.
        n: Planted copies of each kind.
        seed: Of everything that is drawn.
        workdir: Keeps the pictures.
    """
    results = {}
    for name in dataset or ["cardiac_acdc", "hippocampus3d"]:
        folders = [Path(entry.partition("=")[2]) for entry in synthetic or [] if entry.partition("=")[0] == name]
        results[name] = measure(name, folders, n, seed, workdir)
        results[name]["reached"] = report(name, results[name])
    save(
        "memorization",
        what="Planted copies found by medgen.metrics.Memorization, and false alarms on real scans of other patients",
        n={name: result["scans"] for name, result in results.items()},
        seeds=[seed],
        goals={"recall": 1 - MOST_MISSED, "false_alarms": MOST_FALSE_ALARMS},
        data_sets=results,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
