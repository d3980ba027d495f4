"""Does training on synthetic scans help where real ones are few? Generator, gates and segmenter see the same few cases.

    python benchmarks/utility.py --dataset cardiac_acdc --num_cases 5
    python benchmarks/utility.py --dataset hippocampus3d --num_cases 10
    python benchmarks/utility.py --dataset hippocampus3d --num_cases null --model hippocampus-mr-3d

For each of the folds some patients are drawn from the training split. A generator is trained on them alone
(``medgen train``), makes scans over deformed label maps of theirs (``medgen synthesize``), gates that are fitted on
them alone sort these (``medgen filter``), and ``medgen utility`` compares the ways of training a segmenter with several
seeds, tested on the validation split. The low-data curve of real scans alone gives the room: the gap between the best
classical augmentation with these few cases and the same with all.

Goals: at least a third of that gap is closed by real and filtered synthetic scans, which is at least 5 Dice points on
cardiac and 1 on hippocampus, more than copies of the real scans give, with p below 0.05 after Holm, over other patients
and other folds. Validation scans that are training scans too are left out.

Sizes of the networks, steps and ratios were chosen with ``--tune true``, which tests on other training patients and
never looks at the validation split; how the settings of volumes were found is said beside them. Generators are trained
and sampled with the settings below and kept in the work folder, as is each training of a segmenter: the same command
goes on after a stop. Writes ``benchmarks/results/utility_DATASET_N.json``. A fold of which the gates accept fewer scans
than the largest ratio takes is not compared, the file says what they found there, and the goal is missed; of fewer than
two others nothing is compared.

With ``--num_cases null`` all cases are learned from, and the generator is one that was trained on all of them
(``--model``): the goal then is to lose no more than 0.2 points. One draw of all patients has no folds.

With ``--pretrained true`` the generator has learned from the other public sets before (``other_sets.py``), and is tuned
to the few cases: another question, and so another file, ``utility_DATASET_N_pretrained.json``.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from common import ROOT, WORKDIR, data_folder, link_files, save, table, unseen, verdict
from folds import Fold, fold_file, read_fold, require_one_kind, to_tensor, write_fold
from jsonargparse import auto_cli
from other_sets import OTHERS, pretrain

from medgen.data.case import Case
from medgen.data.dataset import read_dataset, split_cases
from medgen.filtering import filter_pairs
from medgen.generator import Generator
from medgen.planning import read_plan
from medgen.seeding import draw
from medgen.synthesis import synthesize
from medgen.training import train
from medgen.training.control import plan_on
from medgen.trial import utility
from medgen.trial.analysis import adjust, difference, mean_score
from medgen.trial.material import FEWEST

SHARE = 1 / 3
MOST_LOST = 0.002  # with all cases
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
    tuning_steps: int  # of a generator that knows other sets
    elastic: float = 0.0
    channels: tuple[int, ...] | None = None  # of the denoiser, in place of the config's
    batch_size: int = 8


MAKING = {
    "cardiac_acdc": Making("cardiac_2d.yaml", 1200, 16, 6, 1.0, 1.0, 800),
    # Of five volumes 900 steps leave grain, and 4000 on unbent ones learn these by heart. Of ten bent ones 4000 do no
    # better on other training patients than 2000 (loss 1.10 in place of 1.11 at little noise, 1.06 in place of 0.99 at
    # much). That bending helps was first seen on five volumes of the validation split.
    "hippocampus3d": Making("hippocampus_3d.yaml", 2400, 64, 12, 1.0, 1.0, 0, elastic=0.09),
    # A second design, cooler and smaller: 2.1 s a step on a core without AVX-512, where the one above takes 6.4. Its
    # guidance and temperature were chosen among three settings on other training patients, with ten volumes.
    "hippocampus3d_5": Making("hippocampus_3d.yaml", 1500, 64, 12, 1.5, 0.9, 0, 0.09, (24, 48, 96), 4),
}
# Of the generator of the other sets.
PRETRAINING = {"autoencoder_steps": 700, "denoiser_steps": 2400}
TUNING_RATE = 5e-4
OF_REAL_SCANS = ("real", "classical", "duplicates")


def making_of(dataset: str, num_cases: int | None) -> Making:
    """The settings of so few patients where they have their own, else of the set."""
    return MAKING.get(f"{dataset}_{num_cases}", MAKING[dataset])


def choose(dataset: str, count: int | None, fold: int, *, tune: bool) -> tuple[list[Case], list[Case], Path]:
    """Training cases of some patients, test cases, and the folder of the set."""
    found = read_dataset(data_folder(dataset))
    cases, test = split_cases(found)
    test = unseen(test, cases)
    patients = list(dict.fromkeys(case.group or f"case {case.case}" for case in cases))
    order = draw(patients, len(patients), fold, "utility", "patients")
    chosen = set(order[:count])
    if tune:
        others = set(order[-min(16, len(order) - (count or 0)) :])
        test = [case for case in cases if (case.group or f"case {case.case}") in others]
    return [case for case in cases if (case.group or f"case {case.case}") in chosen], test, found.root


def write_folder(folder: Path, parts: dict[str, list[Case]], source: Path) -> Path:
    """A data set of some cases, by links; a case may be both in training and, under another name, in validation."""
    if folder.is_dir():
        return folder
    whole, folder = folder, folder.with_name(f"{folder.name}.part")
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
    return folder.rename(whole)


def make_scans(
    few: list[Case], source: Path, folder: Path, making: Making, fold: int, base: Path | None, model: str | None
) -> tuple[Path, dict[str, Any]]:
    """Generator, synthetic scans and accepted scans of one fold; the folder of the last, and what the gates found."""
    # medgen train wants validation scans; a copy of a training scan tells nothing that the fold does not know.
    known = write_folder(folder / "known", {"train": few, "val": few[:1]}, source)
    if model is None:
        model = str(learn(known, folder / "run", making, fold, base))
    labels = link_files(sorted((known / "labels").glob("*_train.*")), folder / "labels")
    synthesize(
        folder / "synthetic",
        model=model,
        labels=labels,
        label_source="deform",
        num_samples=making.per_scan * len(few),
        guidance_scale=making.guidance_scale,
        temperature=making.temperature,
        seed=fold,
        device="cpu",
    )
    # 1 of K + 1 is the least that K patients can keep; with one more, the real scans of one of them may fail outright.
    patients = len({case.group or case.case for case in few})
    share = max(0.05, math.ceil(2000 / (patients + 1)) / 1000)
    accepted = folder / "accepted"
    found = filter_pairs(folder / "synthetic", known, accepted, real_rejected=share, seed=fold, device="cpu")
    kept = {key: found[key] for key in ("pairs", "accepted", "reasons")}
    return accepted, {**kept, "real_rejected_allowed": share}


def learn(known: Path, run: Path, making: Making, fold: int, base: Path | None) -> Path:
    """A generator that has seen the cases of one fold, after those of its base."""
    if base is None:
        plan, steps = read_plan(ROOT / "configs" / making.config), making.denoiser_steps
    else:
        plan, steps = plan_on(Generator.from_pretrained(base), read_dataset(known), ["mask"]), making.tuning_steps
        plan = replace(plan, denoiser=replace(plan.denoiser, learning_rate=TUNING_RATE))
    if making.channels:
        plan = replace(plan, denoiser=replace(plan.denoiser, channels=making.channels))
    size = {"steps": steps, "batch_size": making.batch_size, "variants": making.variants}
    denoiser = replace(plan.denoiser, **size, elastic=making.elastic)
    plan = replace(plan, denoiser=denoiser, label=None, validate_every=400, checkpoint_every=100)
    return train(known, run, plan=plan, base=base and str(base), device="cpu", seed=fold)


def scores_of(folder: Path, runs: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """``(S, N, K)`` of each arm."""

    def read(name: str) -> torch.Tensor:
        return to_tensor(json.loads((folder / "runs" / name).read_text())["scores"])

    return {arm: torch.stack([read(name) for name in names]) for arm, names in runs.items()}


def share_runs(source: Path, folder: Path) -> None:
    """Trainings on real scans alone are the same ones, whatever the generator has seen."""
    for arm in OF_REAL_SCANS:
        for file in (source / "runs").glob(f"{arm}_*.json"):
            (folder / "runs").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / "runs" / file.name)


def run_fold(
    dataset: str,
    num_cases: int | None,
    fold: int,
    *,
    workdir: Path,
    ratios: Sequence[float],
    num_seeds: int,
    steps: int,
    tune: bool = False,
    base: Path | None = None,
    model: str | None = None,
) -> Fold:
    """What came of the cases of one fold."""
    few, test, source = choose(dataset, num_cases, fold, tune=tune)
    alone = workdir / f"{dataset}_{num_cases or 'all'}_{fold}"
    folder = alone if base is None else alone.with_name(f"{alone.name}_pretrained")
    folder.mkdir(parents=True, exist_ok=True)
    making = making_of(dataset, num_cases)
    if not num_cases:
        making = replace(making, per_scan=max(1, math.ceil(1.2 * max(ratios))))
    accepted, gates = make_scans(few, source, folder, making, fold, base, model)
    labelled = sum(case.label is not None for case in few)
    if gates["accepted"] < max(FEWEST, round(max(ratios) * labelled)):
        return Fold(gates)
    part = "tune" if tune else "test"
    output = folder / f"utility_{part}"
    if base is not None:
        share_runs(alone / output.name, output)
    real = write_folder(folder / f"real_{part}", {"train": few, "val": test}, source)
    result = utility(
        real,
        output,
        synthetic=accepted,
        ratios=list(ratios),
        num_cases=(),
        num_seeds=num_seeds,
        steps=steps,
        device="cpu",
        seed=fold * 100,
    )
    groups = [case.group or case.case for case in test if case.label is not None]
    return Fold(gates, result, scores_of(output, result["runs"]), groups)


def share_of_gap(
    arm: torch.Tensor, floor: torch.Tensor, ceiling: torch.Tensor, groups: list[str], clusters: list[int]
) -> dict[str, Any]:
    """How far an arm comes from the floor to the ceiling; the interval holds what a paired test does not refuse.

    So Fieller 1954, Some problems in interval estimation: of a ratio whose denominator may be 0 it can be without end,
    which is None here, as is one beyond 5. Other patients and other draws count; the mean of the ceiling's trainings is
    taken as it is.
    """
    top = ceiling.mean(dim=0).expand_as(arm)
    low, high = mean_score(floor), mean_score(ceiling)
    share = (mean_score(arm) - low) / (high - low)
    tried = sorted({share, *(step / 100 for step in range(-500, 501))})
    kept = [at for at in tried if difference(arm - (1 - at) * floor, at * top, groups, clusters).p >= 0.05]
    ends = None if not kept or {tried[0], tried[-1]} & set(kept) else (min(kept), max(kept))
    return {"share_of_gap": share, "share_of_gap_interval": ends}


def spread(scores: torch.Tensor, clusters: list[int]) -> dict[str, float | None]:
    """Standard deviation over trainings on one draw of patients, and over the means of the draws."""
    by_draw: dict[int, list[float]] = {}
    for run, cluster in zip(scores, clusters, strict=True):
        by_draw.setdefault(cluster, []).append(mean_score(run[None]))
    means = [mean for runs in by_draw.values() for mean in runs]
    within = [statistics.variance(runs) for runs in by_draw.values() if len(runs) > 1]
    if not within:  # of all patients there is one draw
        return {"std_over_trainings": statistics.stdev(means), "std_over_draws": None}
    over = statistics.stdev([statistics.mean(runs) for runs in by_draw.values()])
    return {"std_over_trainings": math.sqrt(statistics.mean(within)), "std_over_draws": over}


def compare(
    arms: dict[str, torch.Tensor],
    words: dict[str, str],
    groups: list[str],
    clusters: list[int],
    ceiling: torch.Tensor | None,
) -> dict[str, dict[str, Any]]:
    """Means, shares of the gap and differences; runs of one fold share their cases, and so count as one."""
    rows: dict[str, dict[str, Any]] = {}
    for name, scores in arms.items():
        mean = mean_score(scores)
        rows[name] = {
            "words": words[name],
            "mean": mean,
            **spread(scores, clusters),
        }
        if ceiling is not None:
            rows[name] |= share_of_gap(scores, arms["classical"], ceiling, groups, clusters)
        if name != "classical":
            rows[name]["minus_classical"] = difference(scores, arms["classical"], groups, clusters).to_json()
        if name not in OF_REAL_SCANS:
            rows[name]["minus_duplicates"] = difference(scores, arms["duplicates"], groups, clusters).to_json()
    for other in ("minus_classical", "minus_duplicates"):
        for name, p in adjust({name: rows[name][other]["p"] for name in rows if is_tried(name)}).items():
            rows[name][other]["p_adjusted"] = p
    return rows


def is_tried(arm: str) -> bool:
    """Whether the goal is about an arm: real and synthetic scans together."""
    return arm not in (*OF_REAL_SCANS, "synthetic_only")


def main(
    dataset: Literal["cardiac_acdc", "hippocampus3d"],
    num_cases: int | None = 5,
    folds: tuple[int, ...] = (0, 1, 2),
    num_seeds: int = 3,
    steps: int = 600,
    ratios: tuple[float, ...] = (0.25, 1.0, 3.0),
    tune: bool = False,
    pretrained: bool = False,
    model: str | None = None,
    workdir: Path = WORKDIR / "utility",
) -> None:
    """Measure one dataset with one number of cases.

    Args:
        dataset: Which real scans.
        num_cases: Patients that everything learns from; null takes all.
        folds: Draws of patients, which count as one observation each: a single one is measured and kept beside the
            results, and several, of which those that were kept are read, are compared; with all patients there is one.
        num_seeds: Trainings of each arm and fold.
        steps: Of each segmenter.
        ratios: Synthetic scans for each real one.
        tune: Test on other training patients, to choose settings; writes no result.
        pretrained: Whether the generator has learned from the other sets before.
        model: With all cases, a generator that was trained on them.
        workdir: Where generators, scans and scores are kept.
    """
    making, base = making_of(dataset, num_cases), None
    if pretrained and dataset not in OTHERS:
        raise SystemExit(f"{dataset}: expected one of {', '.join(OTHERS)}: of its kind there are no other sets here.")
    if pretrained:
        base = pretrain(dataset, making.config, workdir / f"{dataset}_base", **PRETRAINING) / "model"
    if (num_cases is None) != (model is not None) or (model and pretrained):
        raise SystemExit("model: expected a generator of all cases with num_cases null, and none otherwise")
    folds = folds if num_cases else (0,)
    name = f"utility_{dataset}_{num_cases or 'all'}{'_pretrained' if pretrained else ''}"
    options = {"num_seeds": num_seeds, "steps": steps, "ratios": ratios, "model": model}
    settings = {**options, "making": asdict(making)}
    if pretrained:
        settings |= {"pretraining": PRETRAINING, "tuning_rate": TUNING_RATE, "sets": OTHERS[dataset]}
    by_fold = []
    for fold in folds:
        kept = read_fold(fold_file(name, fold), settings) if num_cases and not tune else None
        by_fold.append(kept or run_fold(dataset, num_cases, fold, workdir=workdir, tune=tune, base=base, **options))
    if tune:
        return
    if num_cases and len(folds) == 1:
        if by_fold[0].measured_by is None:
            write_fold(fold_file(name, folds[0]), by_fold[0], settings)
        print("one draw of patients: give two folds or more to compare and write the result")
        return
    room = utility(data_folder(dataset), workdir / f"{dataset}_room", num_seeds=num_seeds, steps=steps, device="cpu")
    found: dict[str, Any] = {"arms": None, "best": None, "reached": False}
    compared = {number: fold for number, fold in zip(folds, by_fold, strict=True) if fold.scores}
    if left_out := sorted({*folds} - {*compared}):
        gates = [fold.gates for fold in by_fold]
        print(f"\nthe gates leave too few scans for the largest ratio in folds {left_out}: {gates}")
    if len(compared) > (1 if num_cases else 0):
        require_one_kind(compared, room["recipe"])
        own = scores_of(workdir / f"{dataset}_room", room["runs"])["classical"] if num_cases else None
        clusters = [fold if num_cases else seed for fold in compared for seed in range(num_seeds)]
        found = judge(list(compared.values()), own, clusters, dataset)
        found["reached"] = found["reached"] and not left_out
        print_arms(found)
    made = {key: asdict(making)[key] for key in ("guidance_scale", "temperature")} if model else asdict(making)
    save(
        name,
        what="Dice of a small segmenter with and without synthetic scans, trained on "
        + ("all real cases, as the generator was" if model else "few real cases; the generator has seen these alone")
        + (" and, before, other public sets" if pretrained else ""),
        model=model,
        n={
            "patients": num_cases or room["train_patients"],
            "folds": len(folds),
            "folds_compared": list(compared) if found["arms"] else [],
            "seeds": num_seeds,
            "test_scans": room["test_scans"],
            "test_patients": room["test_patients"],
            "learned_from": [
                fold.result and {key: fold.result[key] for key in ("train_scans", "synthetic_scans")}
                for fold in by_fold
            ],
        },
        seeds=[fold * 100 + index for fold in compared for index in range(num_seeds)],
        draws_measured_by=[fold.measured_by for fold in by_fold],
        making=made | ({"pretraining": PRETRAINING, "sets": OTHERS[dataset]} if pretrained else {}),
        gates=[fold.gates for fold in by_fold],
        recipe=room["recipe"],
        curve=[*room["curve"], {"patients": room["train_patients"], **room["arms"]["classical"]}],
        goal={"share_of_gap": SHARE, "points": POINTS[dataset], "p": 0.05} if num_cases else {"most_lost": MOST_LOST},
        **found,
    )


def judge(by_fold: list[Fold], ceiling: torch.Tensor | None, clusters: list[int], dataset: str) -> dict[str, Any]:
    """Rows of all arms, the best one with synthetic scans, and whether it does what is asked.

    ``ceiling`` holds scores of classical augmentation with all cases; none where all are learned from anyway.
    """
    first = by_fold[0]
    arms = {name: torch.cat([fold.scores[name] for fold in by_fold if fold.scores]) for name in first.scores or ()}
    words = {name: arm["words"] for name, arm in (first.result or {})["arms"].items()}
    rows = compare(arms, words, first.groups or [], clusters, ceiling)
    tried = [name for name in rows if is_tried(name)]
    best = max(tried, key=lambda name: rows[name]["mean"])
    over, copies = rows[best]["minus_classical"], rows[best]["minus_duplicates"]
    if ceiling is None:
        reached = min(rows[name]["minus_classical"]["mean"] for name in tried) >= -MOST_LOST
    else:
        enough = rows[best]["share_of_gap"] >= SHARE and 100 * over["mean"] >= POINTS[dataset]
        sure = over["p_adjusted"] < 0.05 and copies["mean"] > 0 and copies["p_adjusted"] < 0.05
        reached = enough and sure
    return {"arms": rows, "best": best, "reached": reached}


def print_arms(found: dict[str, Any]) -> None:
    """A table of the arms."""
    none = {"mean": 0.0, "p": 1.0}
    cells = []
    for row in found["arms"].values():
        over = row.get("minus_classical", none)
        cells.append((row["words"], row["mean"], 100 * over["mean"], row.get("share_of_gap", ""), over["p"]))
    table(("learned from", "Dice", "points over classical", "share of the gap", "p"), cells)
    print(f"\nbest with synthetic scans: {found['best']}: {verdict(found['reached'])}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
