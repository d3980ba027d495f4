"""Does training on synthetic scans help where real ones are few? Generator, gates and segmenter see the same few cases.

    python benchmarks/utility.py --dataset cardiac_acdc --num_cases 5
    python benchmarks/utility.py --dataset hippocampus3d --num_cases 10

For each of the folds some patients are drawn from the training split. A generator is trained on them alone
(``medgen train``), makes scans over deformed label maps of theirs (``medgen synthesize``), gates that are fitted on
them alone sort these (``medgen filter``), and ``medgen utility`` compares the ways of training a segmenter with several
seeds, tested on the validation split. The low-data curve of real scans alone gives the room: the gap between the best
classical augmentation with these few cases and the same with all.

Goals: at least a third of that gap is closed by real and filtered synthetic scans, which is at least 5 Dice points on
cardiac and 1 on hippocampus, more than copies of the real scans give, with p below 0.05.

Every choice (sizes of the networks, steps, ratios) was made with ``--tune``, which tests on other training patients and
never looks at the validation split. Generators are trained and sampled with the settings below and kept in the work
folder, as is each training of a segmenter: the same command goes on after a stop. Writes
``benchmarks/results/utility_DATASET_N.json``.
"""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from common import ROOT, WORKDIR, data_folder, save, table, verdict
from jsonargparse import auto_cli

from medgen.data.case import Case
from medgen.data.dataset import read_dataset, split_cases
from medgen.filtering import filter_pairs
from medgen.planning import read_plan
from medgen.seeding import draw
from medgen.synthesis import synthesize
from medgen.training import train
from medgen.trial import utility
from medgen.trial.analysis import difference, mean_score

SHARE = 1 / 3
POINTS = {"cardiac_acdc": 5.0, "hippocampus3d": 1.0}


@dataclass(frozen=True)
class Making:
    """How scans are made from few cases."""

    config: str
    denoiser_steps: int
    variants: int
    per_scan: int  # synthetic scans for each real one, before the gates
    guidance_scale: float
    temperature: float


MAKING = {
    "cardiac_acdc": Making("cardiac_2d.yaml", 1200, 16, 6, 1.0, 1.0),
    "hippocampus3d": Making("hippocampus_3d.yaml", 900, 16, 12, 1.0, 1.0),
}


def choose(dataset: str, count: int, fold: int, *, tune: bool) -> tuple[list[Case], list[Case], Path]:
    """Training cases of some patients, test cases, and the folder of the set."""
    found = read_dataset(data_folder(dataset))
    cases, test = split_cases(found)
    patients = list(dict.fromkeys(case.group or f"case {case.case}" for case in cases))
    order = draw(patients, len(patients), fold, "utility", "patients")
    chosen = set(order[:count])
    if tune:
        others = set(order[-min(16, len(order) - count) :])
        test = [case for case in cases if (case.group or f"case {case.case}") in others]
    return [case for case in cases if (case.group or f"case {case.case}") in chosen], test, found.root


def write_folder(folder: Path, parts: dict[str, list[Case]], source: Path) -> Path:
    """A data set of some cases, by links; a case may be both in training and, under another name, in validation."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    rows = []
    for part, cases in parts.items():
        for case in cases:
            if case.label is None:
                continue
            row = {"id": f"{case.case}_{part}", "split": part, "patient": case.group or case.case}
            for name, file in (("image", case.images[0]), ("label", case.label)):
                link = folder / f"{name}s" / f"{row['id']}{''.join(file.suffixes)}"
                link.symlink_to(file.resolve())
                row[name] = str(link.relative_to(folder))
            rows.append(row)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if (source / "classes.json").is_file():
        shutil.copy(source / "classes.json", folder / "classes.json")
    return folder


def make_scans(few: list[Case], source: Path, folder: Path, making: Making, fold: int) -> dict[str, Path]:
    """Generator, synthetic scans and accepted scans of one fold."""
    # medgen train wants validation scans; a copy of a training scan tells nothing that the fold does not know.
    known = folder / "known"
    if not known.is_dir():
        write_folder(known, {"train": few, "val": few[:1]}, source)
    plan = read_plan(ROOT / "configs" / making.config)
    denoiser = replace(plan.denoiser, steps=making.denoiser_steps, batch_size=8, variants=making.variants)
    plan = replace(plan, denoiser=denoiser, label=None, validate_every=400, checkpoint_every=100)
    train(known, folder / "run", plan=plan, device="cpu", seed=fold)
    labels = folder / "labels"
    if not labels.is_dir():
        labels.mkdir()
        for file in sorted((known / "labels").glob("*_train.*")):
            (labels / file.name).symlink_to(file.resolve())
    synthesize(
        folder / "synthetic",
        model=str(folder / "run"),
        labels=labels,
        label_source="deform",
        num_samples=making.per_scan * len(few),
        guidance_scale=making.guidance_scale,
        temperature=making.temperature,
        seed=fold,
        device="cpu",
    )
    filter_pairs(folder / "synthetic", known, folder / "accepted", seed=fold, device="cpu")
    return {"synthetic": folder / "synthetic", "accepted": folder / "accepted"}


def scores_of(folder: Path, arms: dict[str, Any]) -> dict[str, torch.Tensor]:
    """``(S, N, K)`` of each arm."""
    found: dict[str, list[Any]] = {name: [] for name in arms}
    for file in sorted((folder / "runs").glob("*.json")):
        content = json.loads(file.read_text())
        if content["arm"] in found:
            rows = [[float("nan") if value is None else value for value in row] for row in content["scores"]]
            found[content["arm"]].append((content["seed"], rows))
    return {name: torch.tensor([rows for _, rows in sorted(runs)]) for name, runs in found.items()}


def main(
    dataset: Literal["cardiac_acdc", "hippocampus3d"],
    num_cases: int = 5,
    folds: tuple[int, ...] = (0, 1, 2),
    num_seeds: int = 3,
    steps: int = 600,
    ratios: tuple[float, ...] = (0.25, 1.0, 3.0),
    tune: bool = False,
    workdir: Path = WORKDIR / "utility",
) -> None:
    """Measure one dataset with one number of cases.

    Args:
        dataset: Which real scans.
        num_cases: Patients that everything learns from.
        folds: Draws of patients.
        num_seeds: Trainings of each arm and fold.
        steps: Of each segmenter.
        ratios: Synthetic scans for each real one.
        tune: Test on other training patients, to choose settings; writes no result.
        workdir: Where generators, scans and scores are kept.
    """
    making = MAKING[dataset]
    by_fold, groups = [], []
    for fold in folds:
        few, test, source = choose(dataset, num_cases, fold, tune=tune)
        folder = workdir / f"{dataset}_{num_cases}_{fold}"
        folder.mkdir(parents=True, exist_ok=True)
        made = make_scans(few, source, folder, making, fold)
        name = "tune" if tune else "test"
        real = folder / f"real_{name}"
        if not real.is_dir():
            write_folder(real, {"train": few, "val": test}, source)
        result = utility(
            real,
            made["accepted"],
            folder / f"utility_{name}",
            ratios=list(ratios),
            num_cases=(),
            num_seeds=num_seeds,
            steps=steps,
            device="cpu",
            seed=fold * 100,
        )
        by_fold.append((result, scores_of(folder / f"utility_{name}", result["arms"])))
        groups = [case.group or case.case for case in test if case.label is not None]
    if tune:
        return
    room = utility(
        data_folder(dataset), None, workdir / f"{dataset}_room", num_seeds=num_seeds, steps=steps, device="cpu"
    )
    ceiling = room["arms"]["classical"]["mean"]
    arms = {name: torch.cat([scores[name] for _, scores in by_fold]) for name in by_fold[0][1]}
    base = mean_score(arms["classical"])
    rows = {}
    for name, scores in arms.items():
        mean = mean_score(scores)
        rows[name] = {
            "words": by_fold[0][0]["arms"][name]["words"],
            "mean": mean,
            "std_over_runs": statistics.stdev([mean_score(run[None]) for run in scores]),
            "share_of_gap": (mean - base) / (ceiling - base),
        }
        if name != "classical":
            rows[name]["minus_classical"] = difference(scores, arms["classical"], groups).to_json()
        if name not in ("real", "classical", "duplicates"):
            rows[name]["minus_duplicates"] = difference(scores, arms["duplicates"], groups).to_json()
    tried = {name: row for name, row in rows.items() if "minus_duplicates" in row}
    best = max(tried, key=lambda name: tried[name]["mean"])
    row = tried[best]
    gain = 100 * row["minus_classical"]["mean"]
    reached = (
        row["share_of_gap"] >= SHARE
        and gain >= POINTS[dataset]
        and row["minus_classical"]["p"] < 0.05
        and row["minus_duplicates"]["mean"] > 0
        and row["minus_duplicates"]["p"] < 0.05
    )
    table(
        ("learned from", "Dice", "points over classical", "share of the gap", "p"),
        [
            (
                row["words"],
                row["mean"],
                100 * row.get("minus_classical", {"mean": 0.0})["mean"],
                row["share_of_gap"],
                row.get("minus_classical", {"p": 1.0})["p"],
            )
            for row in rows.values()
        ],
    )
    print(f"\nall cases, classical: {ceiling:.3f}; best with synthetic scans: {best}: {verdict(reached)}")
    save(
        f"utility_{dataset}_{num_cases}",
        what="Dice of a small segmenter trained on few real cases with and without synthetic scans of a generator that "
        "has seen these cases alone",
        n={
            "patients": num_cases,
            "folds": len(folds),
            "seeds": num_seeds,
            "test_scans": room["test_scans"],
            "test_patients": room["test_patients"],
            "accepted": [result["synthetic_scans"] for result, _ in by_fold],
            "train_scans": [result["train_scans"] for result, _ in by_fold],
        },
        seeds=list(folds),
        making=making.__dict__,
        recipe=room["recipe"],
        all_cases=ceiling,
        curve=room["curve"],
        arms=rows,
        goal={"share_of_gap": SHARE, "points": POINTS[dataset], "p": 0.05},
        best=best,
        reached=reached,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
