"""How close synthetic scans come to real ones, and how much they differ among themselves: `medgen evaluate` in figures.

    python benchmarks/realism.py --dataset hippocampus3d --model hippocampus-mr-3d
    python benchmarks/realism.py --dataset hippocampus3d --synthetic FOLDER

Without a folder of synthetic scans it makes one: two scans for each of as many label maps as there are validation
scans (with fewer, the synthetic side would show fewer anatomies than the real one), of the training split, because
scans drawn over the very label maps of the validation scans would be compared with their own anatomy. Goals: Fréchet
distance to the validation scans at most twice that of the training scans at equal n, and MS-SSIM among scans of one
label map within 0.05 of that among real scans. Real scans whose labels agree are alike around them too: how much, pairs
of each validation scan and the training scan of another patient with the most similar label map show beside it.
``--split val`` makes the scans for the validation label maps, of which the model remembers nothing: their diversity
beside that of the training label maps tells memory from faithfulness. Writes
``benchmarks/results/realism_DATASET.json``, or ``realism_DATASET_val_labels.json``.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Literal

import torch
from common import WORKDIR, data_folder, link_files, save, table, verdict
from jsonargparse import auto_cli

from medgen.data.dataset import Case, Dataset, load_case, read_dataset, split_cases
from medgen.data.geometry import place, to_model
from medgen.data.intensity import Normalization
from medgen.evaluation import evaluate
from medgen.generator import Generator
from medgen.metrics.ms_ssim import ms_ssim
from medgen.provenance import MANIFEST, SampleRecord, read_manifest
from medgen.synthesis import synthesize

MOST_RATIO = 2.0
MOST_DIFFERENCE = 0.05


def make_scans(
    dataset: str,
    workdir: Path,
    *,
    model: str,
    split: Literal["train", "val"],
    labels: int | None,
    per_label: int,
    guidance_scale: float | None,
    temperature: float | None,
    batch_size: int,
    seed: int,
) -> Path:
    """Synthesize several scans for each of some label maps, evenly spread over the split."""
    train, val = split_cases(read_dataset(data_folder(dataset)))
    files = sorted(case.label for case in (train if split == "train" else val) if case.label)
    labels = min(labels or len(val), len(files))
    chosen = [files[index * len(files) // labels] for index in range(labels)]
    generator = Generator.from_pretrained(model)
    config = generator.config
    scale = config.guidance_scale if guidance_scale is None else guidance_scale
    noise = config.temperature if temperature is None else temperature
    name = f"{generator.weights_hash[:8]}-w{scale:g}-t{noise:g}-{split}{labels}x{per_label}-{seed}"
    output = workdir / dataset / f"realism-{name}"
    synthesize(
        output,
        model=model,
        labels=link_files(chosen, workdir / dataset / f"labels-{split}{labels}"),
        num_samples=labels * per_label,
        guidance_scale=guidance_scale,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        overwrite=True,
    )
    return output


def center(tensor: torch.Tensor, box: list[int]) -> torch.Tensor:
    """Middle of the last axes."""
    for axis, size in enumerate(box, start=tensor.ndim - len(box)):
        tensor = tensor.narrow(axis, (tensor.shape[axis] - size) // 2, size)
    return tensor


def mean_dice(first: torch.Tensor, second: torch.Tensor) -> float:
    """Dice score over the classes that either map has."""
    classes = sorted({int(value) for value in torch.cat([first.unique(), second.unique()])} - {0})
    pairs = [((first == value), (second == value)) for value in classes]
    return statistics.fmean(float(2 * (a & b).sum() / (a.sum() + b.sum())) for a, b in pairs)


def real_pairs_of_similar_labels(dataset: Dataset, scales: int) -> dict[str, Any]:
    """MS-SSIM of every validation scan and the training scan of another patient whose label map is closest to its own.

    Args:
        dataset: Real scans with labels.
        scales: As `medgen evaluate` took them.

    Returns:
        Mean MS-SSIM, number of pairs, and the mean Dice score of their label maps.
    """

    def read(case: Case) -> tuple[str, torch.Tensor, torch.Tensor]:
        sample = load_case(case, dataset)
        if sample.image is None or sample.label is None:
            raise ValueError(f"{case.case}: expected image and label, got one of them")
        here = place(sample.grid)
        image = to_model(sample.image, here, mode="linear", padding="constant")
        label = to_model(sample.label, here, mode="nearest", padding="constant")
        return case.group or case.case, (Normalization().fit(image).forward(image) + 1) / 2, label

    def common(first: torch.Tensor, second: torch.Tensor, dims: int) -> list[int]:
        return [min(pair) for pair in zip(first.shape[-dims:], second.shape[-dims:], strict=True)]

    train, val = ([read(case) for case in side] for side in split_cases(dataset))
    dices, values = [], []
    for patient, image, label in val:
        candidates = []
        for other, other_image, other_label in train:
            if other != patient:
                box = common(label, other_label, label.ndim)
                candidates.append((mean_dice(center(label, box), center(other_label, box)), other_image))
        dice, closest = max(candidates, key=lambda row: row[0])
        box = common(image, closest, label.ndim)
        dices.append(dice)
        values.append(ms_ssim(center(image, box)[None], center(closest, box)[None], scales=scales).item())
    return {"mean": statistics.fmean(values), "pairs": len(values), "label_dice": statistics.fmean(dices)}


def _settings(record: SampleRecord) -> tuple[tuple[str, Any], ...]:
    names = ("model_hash", "sampler", "num_inference_steps", "guidance_scale", "temperature", "precision")
    return tuple((name, getattr(record, name)) for name in names)


def main(
    dataset: Literal["hippocampus3d", "cardiac_acdc"],
    synthetic: Path | None = None,
    model: str = "hippocampus-mr-3d",
    split: Literal["train", "val"] = "train",
    labels: int | None = None,
    per_label: int = 2,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    batch_size: int = 8,
    num_pairs: int = 200,
    seed: int = 0,
    workdir: Path = WORKDIR,
) -> None:
    """Evaluate synthetic scans against the real ones.

    Args:
        dataset: Which real scans.
        synthetic: Folder of synthetic scans; None makes them.
        model: Folder or name of the generator that makes them.
        split: Whose label maps it makes them for.
        labels: For how many label maps; None is as many as there are validation scans.
        per_label: How many scans for each.
        guidance_scale: As for `medgen synthesize`; None is the model's own.
        temperature: As for `medgen synthesize`; None is the model's own.
        batch_size: As for `medgen synthesize`.
        num_pairs: As for `medgen evaluate`.
        seed: Of synthesis and evaluation.
        workdir: Keeps the scans and the report.
    """
    folder = synthetic or make_scans(
        dataset,
        workdir,
        model=model,
        split=split,
        labels=labels,
        per_label=per_label,
        guidance_scale=guidance_scale,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )
    report = evaluate(
        data_folder(dataset),
        folder,
        workdir / dataset / "report",
        num_pairs=num_pairs,
        seed=seed,
        overwrite=True,
    )
    records = read_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else []
    frechet, diversity = report["scores"]["frechet"], report["ms_ssim"]
    similar = real_pairs_of_similar_labels(read_dataset(data_folder(dataset)), diversity["scales"])
    diversity = diversity | {"real_similar_labels": similar}
    ratio = frechet["value_at_floor_n"] / frechet["floor"]
    reached = {"frechet": ratio <= MOST_RATIO}
    rows = [
        ["Fréchet distance, train to val (floor)", frechet["floor"], "", ""],
        ["Fréchet distance, synthetic to val", frechet["value_at_floor_n"], "", ""],
        ["ratio to the floor", ratio, f"<= {MOST_RATIO:g}", verdict(reached["frechet"])],
        ["MS-SSIM, real pairs", diversity["real"]["mean"], "", ""],
        ["MS-SSIM, synthetic pairs", diversity["synthetic"]["mean"], "", ""],
    ]
    one_label = diversity["synthetic_one_label"]
    if one_label:
        reached["diversity"] = abs(one_label["minus_real"]) <= MOST_DIFFERENCE
        rows += [
            ["MS-SSIM, synthetic pairs of one label", one_label["mean"], "", ""],
            ["minus real", one_label["minus_real"], f"+-{MOST_DIFFERENCE}", verdict(reached["diversity"])],
            [f"MS-SSIM, real pairs of similar labels (Dice {similar['label_dice']:.2f})", similar["mean"], "", ""],
            ["one label minus those", one_label["mean"] - similar["mean"], "", ""],
        ]
    radiomic, copies = report["frd"]["frd-robust"], report["memorization"]
    rows += [
        ["FRD (frd-robust), synthetic to val", radiomic["value"], "", ""],
        ["FRD (frd-robust), train to val (floor)", radiomic["floor"]["value"], "", ""],
        [f"copies of training scans among {report['synthetic']['scans']}", copies["copies"], "", ""],
    ]
    table(["figure", "value", "goal", ""], rows)
    save(
        f"realism_{dataset}" + ("_val_labels" if split == "val" else ""),
        what="Fréchet distance to val beside that of train at the same n, and MS-SSIM of pairs, as `medgen evaluate`",
        n={name: report[side][name] for side, name in (("real", "train"), ("real", "val"), ("synthetic", "scans"))}
        | {"of_the_floor": frechet["floor_n"], "labels": len({record.label.get("sha256") for record in records})},
        seeds=[seed],
        synthesis=[dict(values) for values in dict.fromkeys(map(_settings, records))],
        scans=[{"label": record.label.get("file", ""), "seed": record.seed} for record in records],
        label_split=None if synthetic else split,
        extractor=report["extractor"],
        frechet_distance=frechet,
        ratio_to_floor=ratio,
        frd=radiomic,
        memorization=copies,
        ms_ssim=diversity,
        warnings=[text.replace(str(folder), folder.name) for text in report["warnings"]],
        goals={"ratio_to_floor": MOST_RATIO, "ms_ssim_difference": MOST_DIFFERENCE},
        reached=reached,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
