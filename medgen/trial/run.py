"""``medgen utility``: does training on synthetic scans help, and more than what costs nothing?"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medgen.precision import resolve_device
from medgen.provenance import runtime_info, write_text
from medgen.segmentation import CLASSICAL, Pair, Recipe
from medgen.trial.analysis import adjust, difference, mean_score
from medgen.trial.arms import BASELINE, DUPLICATES, Arm, count_synthetic, plan_arms, train_arm
from medgen.trial.material import Material, load_material, material_digest
from medgen.trial.words import draw_curve, to_markdown, verdict
from medgen.types import BadInputError

_RESULT = "utility.json"
_RATIOS = (0.25, 1.0, 3.0)
_FORMAT = 3  # raise when equal settings give other scores


def utility(
    real: Path,
    output: Path,
    *,
    synthetic: Path | None = None,
    ratios: list[float] | None = None,
    target: str | None = None,
    num_cases: tuple[int, ...] = (5, 10, 20, 50),
    num_seeds: int = 3,
    steps: int = 600,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train one small network in several ways and test each on real scans: do synthetic scans help?

    A network learns from the real training scans unchanged; with classical augmentation; with as many copies of them as
    the largest ratio adds synthetic scans; with synthetic scans at several ratios; from synthetic scans first and real
    ones then; and from synthetic scans alone. Each takes as many steps from the same first weights. All are tested on
    the real validation scans, which nothing else may have seen: not the generator, not its label maps, not the gates.
    Where the folder names none, ``medgen train`` and the gates hold out the same ones as this. Test scans that are
    training scans, voxel for voxel, are left out.
    Differences are paired by patient and training, with an interval for other patients and other trainings, and p
    values are corrected for the number of ways (Holm). The verdict can be that it does not help.

    The low-data curve trains on fewer patients, without synthetic scans: a generator that has learned from more would
    tell of the others. To compare with few cases, train a generator on those alone and give their folder as `real`.

    Each training is kept as it is finished: the same command goes on after a stop.

    Args:
        real: Folder of real scans with label maps, or facts to tell. Validation scans are named in val.txt, or held out
            as ``medgen train`` does.
        output: Folder for utility.json, utility.md, curve.png and the scores of each training.
        synthetic: Folder of labelled synthetic scans, such as the output of ``medgen filter``; without it the real ones
            alone tell what room more data would have.
        ratios: Synthetic scans for each real one; by default those of 0.25, 1 and 3 for which there are enough.
        target: Column of the metadata, such as `view`, that a classifier is to tell; by default a segmenter learns the
            label maps.
        num_cases: Patients of the low-data curve; those that are not fewer than all are left out.
        num_seeds: Trainings of each way, at least 2, with other first weights, crops and patients of the curve.
        steps: Optimizer steps of each training.
        device: ``auto``, ``cpu``, ``cuda`` or another torch device.
        seed: Root of all draws.
        overwrite: Replace the results of other data or settings that the folder holds.

    Returns:
        What ``utility.json`` holds.

    Raises:
        BadInputError: If the sets do not fit together, a side has too few labelled scans, gates rejected a synthetic
            one, there are fewer synthetic scans than a ratio asks for, or the output folder holds other results.
        DivergedError: If a training came to no finite loss; what was finished is kept.
    """
    for name, value, least in (
        ("num_seeds", num_seeds, 2),
        ("steps", steps, 2),
        *(("num_cases", n, 1) for n in num_cases),
    ):
        if value < least:
            raise BadInputError(f"{name}: expected at least {least}, got {value}.")
    output, chosen = Path(output), resolve_device(device)
    material = load_material(Path(real), None if synthetic is None else Path(synthetic), target, seed, chosen)
    task = material.task
    notes = list(material.notes)
    arms = plan_arms(_choose_ratios(ratios, material, notes))
    batch_size = 8 if target is not None else 4 if len(task.patch) == 2 else 2
    recipe = Recipe(steps, batch_size, augmentation=CLASSICAL[len(task.patch)])
    patients = len(set(material.train_groups))
    counts = sorted({count for count in num_cases if count < patients})
    names = {"real": Path(real).resolve().name, "synthetic": synthetic and Path(synthetic).resolve().name}
    identity = _digest(
        [
            _FORMAT,
            target,
            task.classes,
            task.patch,
            asdict(recipe),
            [asdict(arm) for arm in arms],
            counts,
            num_seeds,
            seed,
        ]
        + [material_digest(part) for part in (material.train, material.synthetic, material.test)]
        + [material.train_groups, material.test_groups]
    )
    _claim(output, identity, overwrite=overwrite)
    scorer = _Scorer(output / "runs", material, recipe)
    seeds = [seed + index for index in range(num_seeds)]
    scores: dict[str, list[torch.Tensor]] = {arm.name: [] for arm in arms}
    curve: dict[int, list[torch.Tensor]] = {count: [] for count in counts}
    sizes: dict[int, list[int]] = {count: [] for count in counts}
    baseline = next(arm for arm in arms if arm.name == BASELINE)
    with tqdm(total=num_seeds * (len(arms) + len(counts)), desc="trainings", unit="training") as bar:
        for one in seeds:
            for arm in arms:
                scores[arm.name].append(scorer.score(arm, material.train, one))
                bar.update()
            for count in counts:
                pairs = material.subset(count, one)
                sizes[count].append(len(pairs))
                curve[count].append(scorer.score(baseline, pairs, one))
                bar.update()
    result: dict[str, Any] = {
        "format": "medgen-utility/2",
        "identity": identity,
        **names,
        "target": target,
        "metric": task.metric,
        "classes": list(task.classes),
        "train_scans": len(material.train),
        "train_patients": patients,
        "synthetic_scans": len(material.synthetic),
        "test_scans": len(material.test),
        "test_patients": len(set(material.test_groups)),
        "seeds": seeds,
        "recipe": {**asdict(recipe), "patch": list(task.patch), "network": task.network},
        "arms": _summarize(arms, {name: torch.stack(runs) for name, runs in scores.items()}, material),
        "curve": [
            {"patients": count, "scans": statistics.mean(sizes[count]), **_spread(torch.stack(curve[count]))}
            for count in counts
        ],
        "runs": {arm.name: [scorer.file(arm, material.train, one).name for one in seeds] for arm in arms},
        "notes": notes,
        "runtime": runtime_info(chosen),
    }
    result["verdict"] = verdict(result)
    write_text(output / "utility.md", to_markdown(result))
    draw_curve(result, output / "curve.png")
    write_text(output / _RESULT, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    print(to_markdown(result))
    return result


def _choose_ratios(ratios: Sequence[float] | None, material: Material, notes: list[str]) -> list[float]:
    if not material.synthetic:
        if ratios:
            raise BadInputError("ratios: expected none without synthetic scans. Give --synthetic FOLDER.")
        return []
    most = len(material.synthetic) / len(material.train)
    if ratios is not None:
        for ratio in ratios:
            wanted = round(ratio * len(material.train))
            if not ratio > 0 or not 1 <= wanted <= len(material.synthetic):
                raise BadInputError(
                    f"ratios: expected above 0 and at most {most:.2f}, which the {len(material.synthetic)} synthetic "
                    f"for {len(material.train)} real scans allow, got {ratio:g}. Make more scans, or lower it."
                )
        return sorted(set(ratios))
    found = [ratio for ratio in _RATIOS if 1 <= round(ratio * len(material.train)) <= len(material.synthetic)]
    if left := [f"{ratio:g}" for ratio in _RATIOS if ratio not in found]:
        notes.append(
            f"Not tried: {', '.join(left)} synthetic scans for each of the {len(material.train)} real ones; there are "
            f"only {len(material.synthetic)}."
        )
    return found or [most]


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _claim(output: Path, identity: str, *, overwrite: bool) -> None:
    """Refuse to replace other results; trainings that are kept are found by what they learned from, whoever asks."""
    result = output / _RESULT
    try:
        output.mkdir(parents=True, exist_ok=True)
        found = json.loads(result.read_text(encoding="utf-8")).get("identity") if result.exists() else identity
    except (OSError, ValueError, AttributeError) as error:
        raise BadInputError(
            f"{output}: expected a folder to write to, got: {error}. Choose another output folder."
        ) from error
    if found != identity and not overwrite:
        raise BadInputError(
            f"{output}: expected a folder without the results of other data or settings, got {_RESULT}. "
            "Choose another output folder, or pass --overwrite."
        )


@dataclass(frozen=True)
class _Scorer:
    """Trains and tests, or finds what an earlier command has measured."""

    folder: Path
    material: Material
    recipe: Recipe

    def file(self, arm: Arm, real: Sequence[Pair], seed: int) -> Path:
        """Where the scores of a training are kept: its name tells all that they depend on."""
        material, task = self.material, self.material.task
        parts = [material_digest(pairs) for pairs in (real, self._synthetic(arm), material.test)]
        settings = {**asdict(arm), "words": "", "metric": task.metric, "device": task.device.type}
        key = _digest([_FORMAT, settings, asdict(self.recipe), task.patch, task.classes, seed, *parts])
        return self.folder / f"{arm.name}_{len(real)}_{seed}_{key[:12]}.json"

    def _synthetic(self, arm: Arm) -> Sequence[Pair]:
        return self.material.synthetic if arm.uses_synthetic else []

    def score(self, arm: Arm, real: Sequence[Pair], seed: int) -> torch.Tensor:
        """``(N, K)`` scores of the test scans."""
        task, file = self.material.task, self.file(arm, real, seed)
        if file.is_file():
            rows = json.loads(file.read_text(encoding="utf-8"))["scores"]
        else:
            network = train_arm(arm, task, real, self._synthetic(arm), self.recipe, seed)
            found = task.score(network, self.material.test)
            rows = [[None if value != value else value for value in row] for row in found.tolist()]
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"arm": arm.name, "seed": seed, "scores": rows}) + "\n")
        filled = [[float("nan") if value is None else value for value in row] for row in rows]
        return torch.tensor(filled, dtype=torch.float64)


def _spread(runs: torch.Tensor) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    each = [mean_score(run[None]) for run in runs]
    return {"mean": mean_score(runs), "std": statistics.stdev(each) if len(each) > 1 else 0.0}


def _summarize(arms: Sequence[Arm], scores: dict[str, torch.Tensor], material: Material) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for arm in arms:
        runs = scores[arm.name]
        added = count_synthetic(arm, len(material.train), len(material.synthetic))
        by_class = runs.mean(dim=0).nanmean(dim=0).tolist()
        result[arm.name] = {
            "words": arm.words,
            "scans": (len(material.train) if arm.real else 0) + added,
            **_spread(runs),
            "by_class": [None if value != value else value for value in by_class],
        }
    for name, other in _comparisons(arms):
        found = difference(scores[name], scores[other], material.test_groups)
        result[name][f"minus_{'baseline' if other == BASELINE else 'duplicates'}"] = found.to_json()
    tried = [arm.name for arm in arms if arm.uses_synthetic]
    for than in ("minus_baseline", "minus_duplicates"):
        for name, p in adjust({name: result[name][than]["p"] for name in tried}).items():
            result[name][than]["p_adjusted"] = p
    return result


def _comparisons(arms: Sequence[Arm]) -> Iterator[tuple[str, str]]:
    for arm in arms:
        if arm.name != BASELINE:
            yield arm.name, BASELINE
        if arm.uses_synthetic:
            yield arm.name, DUPLICATES
