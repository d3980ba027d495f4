"""Do synthetic X-rays show what their prompts say? Classifiers trained on real scans are the judges.

    python benchmarks/text_fidelity.py --model FOLDER

The judges are small networks that learn from the real training scans of cxr_text, several per fold of the patients. All
of them judge the validation and the synthetic scans; a training scan is judged by those that did not see its patient.
An AUROC is the share of rightly ordered pairs among pairs judged by the networks of one fold, with a 95 % interval by
the bootstrap over patients (real) or scans (synthetic). The questions:

- View: AP (supine too) against PA.
- Finding: one against all others. Nearly all AP scans show COVID-19, so a judge could answer by the view; therefore PA
  scans alone teach and test this. Scans with the finding `todo` are left out. Findings with at least 8 training scans
  of 5 patients are candidates, and the one is taken whose cross-validated AUROC on the training scans has the highest
  lower end of its interval. Neither validation nor synthetic scans have a say in this.

The real AUROC is that of the validation scans where both answers have at least 5 of them, else the cross-validated one
of the training scans. Synthetic scans are made for prompts of the model's own template, as many for each combination of
AP or PA with the finding or another one, the others as often as among the real scans. Goal: AUROC - 0.5 at least 0.80
times that of real scans. At last a text and a mask together: each validation label map with an AP and with a PA prompt.
The view must show as before, and the lungs must lie where the map says: the Dice of a segmenter at least 0.90 times its
Dice on the real scans, as in label_fidelity.py; what it finds against the map of another patient is chance. The judges
are trained once and kept in the work folder; ``--stage judges`` stops after that. Writes
``benchmarks/results/text_fidelity_cxr_text.json``.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from common import WORKDIR, data_folder, describe_synthesis, save, table, verdict
from edge_fidelity import shift_to_others
from jsonargparse import auto_cli
from label_fidelity import RECIPES, dice, judge, load_segmenter
from xray_judges import (
    JUDGE,
    VIEW,
    answer,
    answers,
    auroc,
    candidates,
    deal_folds,
    judge_real,
    load_judges,
    prepare_image,
    score,
)

from medgen.conditions.text import fill_template
from medgen.data.dataset import Case, Dataset, load_case, load_cases, read_dataset, split_cases
from medgen.generator import Generator
from medgen.provenance import SampleRecord
from medgen.synthesis import synthesize
from medgen.types import Sample

DATASET = "cxr_text"
GOAL_AUROC, GOAL_DICE = 0.80, 0.90


def factorial(train: Sequence[Case], finding: str, n: int) -> list[dict[str, str]]:
    """What the prompts are to say: `n` times AP and PA, each with the finding and with another one."""
    named = [case.meta["finding"] for case in train if answer(finding, case.meta) == 0]
    # A finding of a single scan may be no word that the model has learned.
    others = sorted(name for name in named if Counter(named)[name] > 1)
    return [
        {"view": view, "finding": name}
        for index in range(n)
        for view in ("AP", "PA")
        for name in (finding, others[index * len(others) // n])
    ]


def make_scans(
    generator: Generator, output: Path, rows: Sequence[Mapping[str, str]], **settings: Any
) -> tuple[list[Sample], list[SampleRecord]]:
    """Synthetic scans, one for each row's view, finding and (if it has one) label map."""
    if generator.config.text_template is None:
        raise SystemExit(f"{generator.config.name}: expected a model with a template of its texts, got one without")
    path = output.with_suffix(".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([fill_template(generator.config.text_template, row), row.get("label", "")] for row in rows)
    records = synthesize(output, conditions=path, overwrite=True, **settings)
    made = read_dataset(output)
    by_name = {case.case: case for case in made.cases}
    return [load_case(by_name[record.case], made) for record in records], records


def compare(name: str, real: Mapping[str, Any], synthetic: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the result: what of the real AUROC's distance from chance remains, where real scans can be told."""
    before = real[real["counts"]]
    told = before["interval"][0] > 0.5
    ratio = (synthetic["auroc"] - 0.5) / (before["auroc"] - 0.5)
    return {"name": name, "real": before, "real_on": real["counts"], "synthetic": synthetic, "ratio": ratio,
            "reached": told and ratio >= GOAL_AUROC}  # fmt: skip


def shown(row: Mapping[str, Any]) -> str:
    """An AUROC with its interval and counts."""
    low, high = row["interval"]
    return f"{row['auroc']:.3f} ({low:.3f} to {high:.3f}; {row['n'][0]} and {row['n'][1]})"


def labelled(dataset: Dataset) -> Dataset:
    """The scans that have a label map."""
    return replace(dataset, cases=[case for case in dataset.cases if case.label])


def main(
    model: str = "",
    guidance_scale: float | dict[str, float] | None = None,
    temperature: float | None = None,
    num_inference_steps: int = 20,
    samples: int = 30,
    batch_size: int = 8,
    seed: int = 0,
    stage: Literal["all", "judges"] = "all",
    limit: int | None = None,
    workdir: Path = WORKDIR,
) -> None:
    """Train the judges, synthesize, measure and print.

    Args:
        model: As for `medgen synthesize`; a model that texts and masks steer.
        guidance_scale: As for `medgen synthesize`; None is the model's own.
        temperature: As for `medgen synthesize`; None is the model's own.
        num_inference_steps: As for `medgen synthesize`.
        samples: Synthetic scans for each combination of view and finding.
        batch_size: As for `medgen synthesize`.
        seed: As for `medgen synthesize`.
        stage: `judges` trains the judges, shows what they do on real scans, and stops.
        limit: Only the first label maps, for a trial.
        workdir: Keeps the judges and the synthetic scans.
    """
    data = read_dataset(data_folder(DATASET))
    train, val = split_cases(data)
    images = {
        split: torch.stack([prepare_image(sample) for sample in load_cases(data, cases)])
        for split, cases in {"train": train, "val": val}.items()
    }
    findings = candidates(train)
    questions = [VIEW, *findings]
    folds = deal_folds(train, JUDGE.seed)
    wanted = answers(questions, [case.meta for case in train])
    networks, training = load_judges(workdir / DATASET, images["train"], wanted, folds, questions)
    real = judge_real(networks, (train, images["train"]), (val, images["val"]), folds, questions)
    finding = max(findings, key=lambda name: real[name]["train"]["interval"][0])
    segmenter, taught = load_segmenter(workdir / DATASET / "segmenter", labelled(data), RECIPES[DATASET])
    held_out = split_cases(labelled(data))[1][:limit]
    on_real = dice(judge(segmenter, load_cases(data, held_out), len(data.class_names)))
    table(
        ["question", "cross-validated AUROC, train", "AUROC, val", "counts"],
        [
            [
                f"**{name}**" if name in (VIEW, finding) else name,
                shown(row["train"]),
                shown(row["val"]) if "val" in row else "",
                row["counts"],
            ]
            for name, row in real.items()
        ],
    )
    print(f"\nsegmenter: Dice {on_real['mean'][0]:.3f} on {len(held_out)} real validation scans")
    if stage == "judges":
        return
    generator = Generator.from_pretrained(model)
    settings = {
        "model": model,
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "num_inference_steps": num_inference_steps,
        "batch_size": batch_size,
        "seed": seed,
    }
    folder = workdir / DATASET / f"text-{generator.weights_hash[:8]}-s{num_inference_steps}-{seed}"
    rows = factorial(train, finding, samples)
    made, records = make_scans(generator, folder / "prompts", rows, **settings)
    scores = score(networks, torch.stack([prepare_image(sample) for sample in made]))
    names, at = [record.case for record in records], questions.index(finding)
    judged = {view: answers(questions, rows, view) for view in ("PA", "AP")}
    results = [
        compare("view", real[VIEW], auroc(scores[..., 0], judged["PA"][:, 0], names)),
        compare(f"{finding}, PA prompts", real[finding], auroc(scores[..., at], judged["PA"][:, at], names)),
        compare(f"{finding}, AP prompts", real[finding], auroc(scores[..., at], judged["AP"][:, at], names)),
    ]
    # Text and mask: the finding is one that both views have.
    usual = Counter(case.meta["finding"] for case in train).most_common(1)[0][0]
    owners = [case for case in held_out for _ in range(2)]
    pairs = [
        {"view": view, "finding": usual, "label": str(case.label.resolve())}
        for case in held_out
        for view in ("AP", "PA")
        if case.label
    ]
    both, both_records = make_scans(generator, folder / "masks", pairs, **settings)
    both_scores = score(networks, torch.stack([prepare_image(sample) for sample in both]))
    patients = [case.group or case.case for case in owners]
    results.append(
        compare("view, beside a mask", real[VIEW], auroc(both_scores[..., 0], answers([VIEW], pairs)[:, 0], patients))
    )
    shift = shift_to_others(owners)
    swapped = [replace(sample, label=both[index - shift].label) for index, sample in enumerate(both)]
    on_synthetic = dice(judge(segmenter, both, len(data.class_names)))
    chance = dice(judge(segmenter, swapped, len(data.class_names)))
    ratio = on_synthetic["mean"][0] / on_real["mean"][0]
    table(
        ["AUROC of", "real", "on", "synthetic", "ratio above chance", f"goal {GOAL_AUROC:.2f}"],
        [
            [
                row["name"],
                shown(row["real"]),
                row["real_on"],
                shown(row["synthetic"]),
                row["ratio"],
                verdict(row["reached"]) if "AP prompts" not in row["name"] else "",
            ]
            for row in results
        ],
    )
    table(
        ["Dice of", "real", "synthetic", "map of another patient", "ratio", f"goal {GOAL_DICE:.2f}"],
        [["lungs", on_real["mean"][0], on_synthetic["mean"][0], chance["mean"][0], ratio, verdict(ratio >= GOAL_DICE)]],
    )
    save(
        f"text_fidelity_{DATASET}",
        what="AUROC of classifiers trained on real scans, on real scans and on synthetic scans by what their prompts "
        "say, alone and beside a label map; Dice of a segmenter trained on real scans on those with a label map",
        n={
            "train": len(train),
            "val": len(val),
            "synthetic": len(made),
            "train_with_map": taught["scans"],
            "val_with_map": len(held_out),
            "synthetic_with_map": len(both),
        },
        seeds=[JUDGE.seed, RECIPES[DATASET].seed, seed],
        model={"name": generator.config.name, "weights_hash": generator.weights_hash},
        synthesis=describe_synthesis(records) | {"template": generator.config.text_template},
        judges=training,
        segmenter=taught,
        candidates=real,
        finding=finding,
        goals={"auroc": GOAL_AUROC, "dice": GOAL_DICE},
        auroc=results,
        dice={
            "real": on_real,
            "synthetic": on_synthetic,
            "map_of_another_patient": chance,
            "ratio": ratio,
            "reached": ratio >= GOAL_DICE,
        },
        reached=all(row["reached"] for row in results if "AP prompts" not in row["name"]) and ratio >= GOAL_DICE,
        scans=[
            {**row, "logits": dict(zip(questions, values, strict=True))}
            for row, values in zip(rows, scores.mean(0).tolist(), strict=True)
        ],
        scans_with_map=[
            {
                "view": row["view"],
                "finding": usual,
                "label": Path(row["label"]).name,
                "seed": record.seed,
                "logit": logit,
            }
            for row, record, logit in zip(pairs, both_records, both_scores[..., 0].mean(0).tolist(), strict=True)
        ],
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
