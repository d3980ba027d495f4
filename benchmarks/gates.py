"""Planted faults: how many of them the gates of `medgen filter` catch, and how many real pairs they reject.

Gates are fitted on the training split. The real validation pairs, which nothing was fitted on, are judged as they are
and with one fault each, written to disk and read as any other set:

- ``missing_in_label``: one class, drawn among those that the label shows, is erased from the label; the manifest says
  what the label map was made from.
- ``missing_in_image``: one class is painted over in the image with what surrounds it, and stays in the label.
- ``shifted_mask``: the label is moved by a quarter of the diameter of a ball (disk) as large as all its classes, along
  a random axis.
- ``swapped_mask``: the label of another patient, drawn at random, laid center on center; the classes of that label are
  the requested ones.
- ``inverted``: intensities upside down, ``min + max - x``.
- ``wrong_scale``: four times the contrast, cut off at the scan's maximum, as a wrong rescale slope does in files of
  limited range.
- ``wrong_spacing``: voxel edges in the header times 1.5; where files hold no spacing, image and label resampled to 1.5
  times as many pixels along each axis.

Validation scans that are voxel for voxel those of a training scan (ACDC has six) are left out and counted: to find them
is right, and no false alarm.

Without a goal, to show where the gates end: a shift by an eighth, image and label enlarged by 1.5 in the same frame
(``zoomed``), and intensities times four without a cut (``gain``), which percentiles take back and which only counts
where real scans compare in their units.

Goals: 95 % of each fault caught, at most 5 % of the real pairs rejected, no pair accepted with a missing class; copies
of training scans (as in ``memorization.py``) found to 95 % at no more than 1 % false alarms. Writes
``benchmarks/results/gates.json``.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import WORKDIR, data_folder, save, table, verdict
from jsonargparse import auto_cli
from memorization import everything, flip, noise, rescale, turn
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.stats import binomtest
from torch.nn import functional as F

from medgen.data.case import Case, Dataset
from medgen.data.dataset import load_case, read_dataset, split_cases
from medgen.data.export import file_ending
from medgen.data.io import read_image, stored_dtype, write_image, write_label
from medgen.data.standard import normalize, read_scan
from medgen.filtering import Gates, find_reference
from medgen.filtering.judging import judge_cases
from medgen.filtering.neighbors import similarity
from medgen.filtering.source import STEPS
from medgen.metrics.descriptor import describe
from medgen.precision import resolve_device
from medgen.provenance import sha256_array, sha256_file
from medgen.seeding import draw, stream
from medgen.types import Grid

GOALS = {"caught": 0.95, "real_rejected": 0.05, "copies_found": 0.95, "copy_false_alarms": 0.01}
CLASS_FAULTS = ("missing_in_label", "missing_in_image")


@dataclass
class Pair:
    """A scan and its label in their own grid: image ``(C, *spatial)``, label ``(*spatial)``."""

    image: torch.Tensor
    label: torch.Tensor
    grid: Grid


Fault = Callable[[Pair, Pair, torch.Generator], Pair]


def _one_class(pair: Pair, random: torch.Generator) -> int:
    shown = [value for value in pair.label.unique().tolist() if value]
    return shown[int(torch.randint(len(shown), (1,), generator=random))]


def missing_in_label(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """One class erased from the label."""
    value = _one_class(pair, random)
    return replace(pair, label=torch.where(pair.label == value, 0, pair.label))


def missing_in_image(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """One class painted over: the nearest voxels around it, blurred, with their grain."""
    inside = (pair.label == _one_class(pair, random)).numpy()
    nearest = distance_transform_edt(inside, return_distances=False, return_indices=True)
    image = pair.image.numpy().copy()
    for channel in image:
        filled = np.where(inside, channel[tuple(nearest)], channel)
        smooth = gaussian_filter(filled, 2.0)
        grain = channel - gaussian_filter(channel, 1.0)
        around = ~inside & (distance_transform_edt(~inside) < 4)
        drawn = np.random.default_rng(int(torch.randint(2**31, (1,), generator=random)))
        channel[inside] = smooth[inside] + drawn.choice(grain[around], int(inside.sum()))
    return replace(pair, image=torch.from_numpy(image))


def _shift(pair: Pair, random: torch.Generator, part: float) -> Pair:
    dims, volume = pair.label.ndim, int((pair.label > 0).sum())
    diameter = 2 * (math.sqrt(volume / math.pi) if dims == 2 else (3 * volume / (4 * math.pi)) ** (1 / 3))
    axis, sign = int(torch.randint(dims, (1,), generator=random)), 1 - 2 * int(torch.randint(2, (1,), generator=random))
    steps = sign * max(1, round(part * diameter))
    moved = torch.roll(pair.label, steps, dims=axis)
    edge = slice(0, steps) if steps > 0 else slice(steps, None)
    moved[(*[slice(None)] * axis, edge)] = 0
    return replace(pair, label=moved)


def shifted_mask(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """The label a quarter of the structure's diameter away."""
    return _shift(pair, random, 1 / 4)


def shifted_by_an_eighth(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """Half of that."""
    return _shift(pair, random, 1 / 8)


def _into(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Cut off or padded with 0 to a shape, center on center."""
    for axis, size in enumerate(shape, start=values.ndim - len(shape)):
        extra = values.shape[axis] - size
        if extra > 0:
            values = values.narrow(axis, extra // 2, size)
        elif extra < 0:
            pad = [0, 0] * (values.ndim - 1 - axis) + [-extra // 2, -extra - -extra // 2]
            values = F.pad(values, pad)
    return values


def swapped_mask(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """The label of another patient."""
    return replace(pair, label=_into(other.label, pair.grid.shape))


def inverted(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """Bright is dark."""
    return replace(pair, image=pair.image.min() + pair.image.max() - pair.image)


def wrong_scale(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """Four times the contrast, saturated."""
    low, high = pair.image.min(), pair.image.max()
    return replace(pair, image=(low + 4 * (pair.image - low)).clamp(max=high))


def gain(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """Four times the intensities, as floating numbers."""
    return replace(pair, image=4 * pair.image)


def _resize(pair: Pair, factor: float) -> Pair:
    shape = [round(factor * size) for size in pair.grid.shape]
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    image = F.interpolate(pair.image[None].float(), shape, mode=mode)[0]
    label = F.interpolate(pair.label[None, None].float(), shape, mode="nearest-exact")[0, 0].to(pair.label.dtype)
    return Pair(image, label, Grid(tuple(shape), pair.grid.affine, pair.grid.known))


def wrong_spacing(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """Voxel edges 1.5 times as long in the header; pixels 1.5 times as many where there is none."""
    if not pair.grid.known:
        return _resize(pair, 1.5)
    return replace(pair, grid=Grid(pair.grid.shape, pair.grid.affine @ np.diag([1.5, 1.5, 1.5, 1.0])))


def zoomed(pair: Pair, other: Pair, random: torch.Generator) -> Pair:
    """Everything 1.5 times as large in the same frame."""
    large = _resize(pair, 1.5)
    return Pair(_into(large.image, pair.grid.shape), _into(large.label, pair.grid.shape), pair.grid)


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        missing_in_label,
        missing_in_image,
        shifted_mask,
        swapped_mask,
        inverted,
        wrong_scale,
        wrong_spacing,
    )
}
HARDER: dict[str, Fault] = {fault.__name__: fault for fault in (shifted_by_an_eighth, zoomed, gain)}


def plant(
    name: str, fault: Fault, cases: Sequence[Case], dataset: Dataset, folder: Path, seed: int
) -> tuple[Dataset, dict[str, str]]:
    """Real pairs with one fault each, on disk, and the digest of the label map that each was made from."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    planted, origin = [], {}
    for case in cases:
        strangers = [other for other in cases if other.group != case.group]
        random = stream(seed, name, case.case)
        other = strangers[int(torch.randint(len(strangers), (1,), generator=random))]
        spoiled = fault(_read(case, dataset), _read(other, dataset), random)
        dtype = "float32" if name == "gain" else stored_dtype(case.images[0])
        ending = file_ending(spoiled.grid, dtype)
        paths = [folder / part / f"{case.case}{ending}" for part in ("images", "labels")]
        write_image(paths[0], spoiled.image, spoiled.grid, dtype=dtype)
        write_label(paths[1], spoiled.label, spoiled.grid)
        planted.append(Case(case.case, (paths[0],), paths[1], group=case.group))
        origin[case.case] = _digest(other if fault is swapped_mask else case)
    return replace(dataset, root=folder, cases=planted), origin


def _digest(case: Case) -> str:
    return sha256_file(case.label) if case.label else ""


def _voxels(case: Case) -> str:
    return sha256_array(read_image(case.images[0])[0])


def _read(case: Case, dataset: Dataset) -> Pair:
    sample = load_case(case, dataset)
    if sample.image is None or sample.label is None:
        raise ValueError(f"{case.case}: expected an image and a label")
    return Pair(sample.image, sample.label, sample.grid)


def judge(gates: Gates, dataset: Dataset, cases: Sequence[Case], labels: dict[str, str], name: str) -> dict[str, Any]:
    """Reasons and scores of each pair; `labels` are the digests of the label maps that they were made from."""
    records: Any = {case: SimpleNamespace(label={"sha256": digest}) for case, digest in labels.items()}
    judged = judge_cases(gates, cases, dataset, records, name)
    return {case.case: {"reasons": list(found.reasons), "scores": found.scores} for case, found in judged}


def share(count: int, n: int) -> dict[str, Any]:
    """A share with its 95 % interval (Clopper and Pearson)."""
    ends = binomtest(count, n).proportion_ci()
    return {"count": count, "n": n, "share": count / n, "interval": [float(ends.low), float(ends.high)]}


def copies(gates: Gates, train: Sequence[Case], dataset: Dataset, n: int, seed: int) -> dict[str, Any]:
    """Copies of training scans, changed in one way each, and how many are found."""
    chosen = draw(list(train), n, seed, "gates", "copies")
    found = {}
    for change in (flip, turn, noise, rescale, everything):
        images = []
        for case in chosen:
            image = normalize(read_scan(case, dataset)[0], case, dataset)
            images.append(describe(change(image, stream(seed, change.__name__, case.case))[None])[0])
        alike = similarity(torch.stack(images), gates.reference.descriptors)
        found[change.__name__] = share(int((alike > gates.reference.copy_threshold).sum()), len(chosen))
    return found


def measure(name: str, steps: int, n: int, seed: int) -> dict[str, Any]:
    """All figures of one set."""
    started, workdir = time.monotonic(), WORKDIR / "gates"
    workdir.mkdir(parents=True, exist_ok=True)
    dataset = read_dataset(data_folder(name))
    train, val = ([case for case in part if case.label is not None] for part in split_cases(dataset))
    source = find_reference(dataset.root, workdir / name, steps=steps, seed=seed)
    gates = source.fit(*source.choose(None, None), resolve_device("cpu"), overwrite=True)
    fitted = time.monotonic() - started
    known = {_voxels(case) for case in train}
    leaked = [case.case for case in val if _voxels(case) in known]
    val = [case for case in val if case.case not in leaked]
    labels = {case.case: _digest(case) for case in val}
    real = judge(gates, dataset, val, labels, "real val")
    chosen = sorted(draw(val, n, seed, "gates", name), key=lambda case: case.case)
    faults = {}
    for fault, make in {**FAULTS, **HARDER}.items():
        planted, origin = plant(fault, make, chosen, dataset, workdir / f"{name}_{fault}", seed)
        verdicts = judge(gates, planted, planted.cases, origin, fault)
        missed = [case for case, found in verdicts.items() if not found["reasons"]]
        good = [case for case in verdicts if not real[case]["reasons"]]
        faults[fault] = {
            **share(len(verdicts) - len(missed), len(verdicts)),
            "of_pairs_accepted_as_they_are": share(sum(case not in missed for case in good), len(good)),
            "reasons": dict(
                Counter(reason for found in verdicts.values() for reason in found["reasons"]).most_common()
            ),
            "missed": missed,
        }
    alarms = sum("copy" in found["reasons"] for found in real.values())
    rejected = sum(bool(found["reasons"]) for found in real.values())
    return {
        "real_rejected": share(rejected, len(real)),
        "real_reasons": dict(Counter(reason for found in real.values() for reason in found["reasons"]).most_common()),
        "real_rejected_by_case": {case: found["reasons"] for case, found in real.items() if found["reasons"]},
        "faults": faults,
        "copies": copies(gates, train, dataset, n, seed),
        "copy_false_alarms": share(alarms, len(real)),
        "fitted": gates.describe(),
        "seconds": {"fitting": fitted, "all": time.monotonic() - started},
        "train": len(gates.reference.cases),
        "val": len(real),
        "val_equal_to_training_scans": leaked,
    }


def report(name: str, result: dict[str, Any]) -> dict[str, bool]:
    """Print the figures of one set; which goals are reached."""
    reached = {f"{fault} caught": result["faults"][fault]["share"] >= GOALS["caught"] for fault in FAULTS}
    reached["real pairs rejected"] = result["real_rejected"]["share"] <= GOALS["real_rejected"]
    for fault in CLASS_FAULTS:
        reached[f"{fault} never accepted"] = not result["faults"][fault]["missed"]
    found = {f"copies found: {key}": value for key, value in result["copies"].items()}
    reached |= {key: value["share"] >= GOALS["copies_found"] for key, value in found.items()}
    reached["copies, false alarms"] = result["copy_false_alarms"]["share"] <= GOALS["copy_false_alarms"]
    figures = {
        **{f"{fault} caught": result["faults"][fault] for fault in (*FAULTS, *HARDER)},
        **found,
        "real pairs rejected": result["real_rejected"],
        "copies, false alarms": result["copy_false_alarms"],
    }
    rows = [
        [
            key,
            value["share"],
            f"{value['count']} of {value['n']}",
            verdict(reached[key]) if key in reached else "no goal",
        ]
        for key, value in figures.items()
    ]
    print(f"\n{name}")
    table(["", "share", "n", "goal"], rows)
    return reached


def main(
    datasets: tuple[str, ...] = ("hippocampus3d", "cardiac_acdc"), steps: int = STEPS, n: int = 60, seed: int = 0
) -> None:
    """Plant faults into real pairs and count.

    Args:
        datasets: Folders of real scans.
        steps: Of each segmenter.
        n: Most validation pairs that get each fault, and training scans that are copied.
        seed: Of the segmenters and of all that is planted.
    """
    results = {name: measure(name, steps, n, seed) for name in datasets}
    reached = {name: report(name, result) for name, result in results.items()}
    save(
        "gates",
        what=" ".join((__doc__ or "").split()),
        n={name: {"train": result["train"], "val": result["val"]} for name, result in results.items()},
        seeds=[seed],
        goals=GOALS,
        reached=reached,
        results=results,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
