"""Do rare scans come, and are they scans? Plain sampling against label maps drawn by rarity and minority guidance.

    python benchmarks/minority.py --dataset hippocampus3d --model hippocampus-mr-3d

Four sets of scans of equal number and seeds: label maps drawn at random from the training split, or by
``--label_sampling rare``; each without and with ``--minority_scale``. A scan is described by the volume of each class
and the brightness in it, and is rare by the distance to its fifth nearest real training scan of another patient. The
tail is the tenth of the real training scans that is rarest so; a synthetic scan is in it if it lies beyond the same
threshold, not beyond the rarest real scan, and a segmenter trained on real scans finds each class at least as well as
in the worst twentieth of the real validation scans. The volumes are also taken as the segmenter sees them, so that the
label map alone cannot fill the tail.

The goal is three times plain sampling's share, at pairs that are no worse. Small and odd anatomies have a lower Dice in
real scans too, so pairs are compared with the real scans of the same label maps: no worse means that the 95 % interval
of the difference to plain sampling's reaches 0. Dice itself stands beside it. Uses the segmenter of
``label_fidelity.py``. Writes ``benchmarks/results/minority_DATASET.json``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from common import WORKDIR, data_folder, describe_synthesis, link_files, save, table, verdict
from jsonargparse import auto_cli
from label_fidelity import RECIPES, judge, load_segmenter

from medgen.data.dataset import Case, Dataset, load_case, read_dataset, split_cases
from medgen.data.standard import normalize, read_scan
from medgen.generator import Generator
from medgen.metrics.rarity import describe_classes, find_tail
from medgen.provenance import MANIFEST, SampleRecord, read_manifest
from medgen.seeding import draw, stream
from medgen.synthesis import synthesize

GOAL = 3.0
RESAMPLES = 2000
SPACES = ("sizes and brightness", "sizes", "brightness", "sizes that the segmenter sees")


def describe(cases: list[Case], dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes and brightness of each scan ``(N, D)``, and the volume of a voxel ``(N,)``."""
    rows, volumes = [], []
    for case in cases:
        image, label, grid = read_scan(case, dataset)
        if label is None:
            raise SystemExit(f"{case.case}: expected a label map, got none")
        volumes.append(math.prod(grid.spacing))
        image = normalize(image, case, dataset)
        rows.append(describe_classes(label, len(dataset.class_names), image=image, voxel_volume=volumes[-1]))
    return torch.stack(rows), torch.tensor(volumes, dtype=torch.float64)


def seen_sizes(counts: torch.Tensor, volumes: torch.Tensor) -> torch.Tensor:
    """Sizes as :func:`describe_classes` gives them, of what the segmenter found."""
    found = counts[..., 1]
    size = torch.where(found > 0, (found * volumes[:, None]).log(), math.nan)
    return torch.cat([(found > 0).double(), size], dim=1)


def dice(counts: torch.Tensor) -> torch.Tensor:
    """Dice of each scan and class, NaN where the label map does not show it."""
    right, found, given = counts.unbind(-1)
    return torch.where(given > 0, 2 * right / (found + given).clamp(min=1), math.nan)


def interval(means: torch.Tensor) -> list[float]:
    """95 % interval of drawn means."""
    return means.quantile(means.new_tensor([0.025, 0.975])).tolist()


def bootstrap(values: torch.Tensor, patients: list[str], *key: int | str) -> torch.Tensor:
    """Means over patients drawn with all their scans."""
    names = sorted(set(patients))
    rows = torch.tensor([names.index(patient) for patient in patients])
    total = torch.zeros(len(names), dtype=torch.float64).index_add_(0, rows, values.double())
    count = torch.zeros(len(names), dtype=torch.float64).index_add_(
        0, rows, torch.ones_like(values, dtype=torch.float64)
    )
    drawn = torch.randint(len(names), (RESAMPLES, len(names)), generator=stream(*key, "bootstrap"))
    return total[drawn].sum(dim=1) / count[drawn].sum(dim=1)


def make(
    folder: Path, model: str, labels: Path, num_samples: int, batch_size: int, seed: int, **options: Any
) -> list[SampleRecord]:
    """The scans of one arm; a finished folder is taken as it is."""
    done = read_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else []
    if len(done) == num_samples:
        return done
    return synthesize(
        folder, model=model, labels=labels, num_samples=num_samples, batch_size=batch_size, seed=seed, **options
    )


def main(
    dataset: Literal["hippocampus3d", "cardiac_acdc"],
    model: str = "hippocampus-mr-3d",
    num_samples: int = 60,
    minority_scale: float = 0.5,
    batch_size: int = 4,
    seed: int = 0,
    workdir: Path = WORKDIR,
) -> None:
    """Make the four sets, describe them, count who is in the tail.

    Args:
        dataset: Which real scans.
        model: Folder or name of a generator that was trained on the training split.
        num_samples: Scans of each set.
        minority_scale: As for `medgen synthesize`; the default was chosen on seed 7.
        batch_size: As for `medgen synthesize`.
        seed: As for `medgen synthesize`; also of the label maps of plain sampling.
        workdir: Holds the segmenter, and keeps the synthetic scans.
    """
    data = read_dataset(data_folder(dataset))
    train, val = split_cases(data)
    classes = len(data.class_names)
    by_label = {case.label.name: case for case in train if case.label}
    home = workdir / dataset
    network, training = load_segmenter(home / "segmenter", data, RECIPES[dataset])
    on_real = dice(judge(network, (load_case(case, data) for case in val), classes))
    least = on_real.nanquantile(0.05, dim=0)
    generator = Generator.from_pretrained(model)
    files = [by_label[name].label for name in sorted(by_label)]
    some = [files[row] for row in draw(range(len(files)), num_samples, seed, "minority")]
    folders = {
        "in_turn": link_files(some, home / f"minority-labels-{num_samples}-{seed}"),
        "rare": link_files(files, home / "train_labels"),
    }
    real, _ = describe(train, data)
    patients = [case.group or case.case for case in train]
    sizes = slice(0, 2 * (classes - 1))
    columns = {SPACES[0]: slice(None), SPACES[1]: sizes, SPACES[2]: slice(sizes.stop, None)}
    arms: dict[str, Any] = {}
    kept: dict[str, torch.Tensor] = {}
    less: dict[str, torch.Tensor] = {}
    for sampling in ("in_turn", "rare"):
        for scale in (0.0, minority_scale):
            name = f"label_sampling {sampling}, minority_scale {scale:g}"
            output = home / f"minority-{generator.weights_hash[:8]}-{sampling}-w{scale:g}-n{num_samples}-s{seed}"
            options = {"label_sampling": sampling, "minority_scale": scale}
            records = make(output, model, folders[sampling], num_samples, batch_size, seed, **options)
            made = read_dataset(output)
            cases = {case.case: case for case in made.cases}
            ordered = [cases[record.case] for record in records]
            features, volumes = describe(ordered, made)
            counts = judge(network, (load_case(case, made) for case in ordered), classes)
            scans = dice(counts)
            sound = ((scans >= least) | scans.isnan()).all(dim=1)
            sources = [by_label[Path(record.label["file"]).name] for record in records]
            owners = [case.group or case.case for case in sources]
            kept[name] = scans.nanmean(dim=1)
            # The segmenter knows these very scans, so this is no measure of it, but of how hard their label maps are.
            of_real = dice(judge(network, (load_case(case, data) for case in sources), classes)).nanmean(dim=1)
            less[name] = bootstrap(kept[name] - of_real, owners, seed, sampling)
            arms[name] = {
                "folder": output.name,
                "synthesis": describe_synthesis(records),
                "network_evaluations": records[0].network_evaluations,
                "label_maps": len({case.case for case in sources}),
                "patients": len(set(owners)),
                "dice": float(kept[name].mean()),
                "dice_interval": interval(bootstrap(kept[name], owners, seed)),
                "dice_of_classes": scans.nanmean(dim=0).tolist(),
                "dice_of_real_scans_of_the_label_maps": float(of_real.mean()),
                "dice_less_real": float((kept[name] - of_real).mean()),
                "dice_less_real_interval": interval(less[name]),
                "sound": float(sound.double().mean()),
                "tail": {},
            }
            for space in SPACES:
                columns_used = columns.get(space, sizes)
                rows = features[:, columns_used] if space in columns else seen_sizes(counts, volumes)
                sets = {"groups": patients, "synthetic_groups": owners, "sound": sound}
                tail = find_tail(real[:, columns_used], rows, **sets)
                arms[name]["tail"][space] = {
                    "share": tail.share,
                    "interval": interval(bootstrap(tail.in_tail, owners, seed)),
                    "beyond_any_real_scan": float((tail.synthetic > tail.limit).double().mean()),
                    "threshold": tail.threshold,
                    "limit": tail.limit,
                    "rarity": [round(value, 4) for value in tail.synthetic.tolist()],
                }
            if scale:  # the same label maps and noise as without
                change = kept[name] - kept[f"label_sampling {sampling}, minority_scale 0"]
                arms[name]["dice_change"] = float(change.mean())
                arms[name]["dice_change_interval"] = interval(bootstrap(change, owners, seed))
    plain = next(iter(arms.values()))
    rows = []
    for name, arm in arms.items():
        for space, tail in arm["tail"].items():
            base = plain["tail"][space]["share"]
            tail["ratio"] = tail["share"] / base if base else None
        main_tail = arm["tail"][SPACES[0]]
        arm["dice_less_real_than_plain"] = arm["dice_less_real"] - plain["dice_less_real"]
        low, high = interval(less[name] - less[next(iter(arms))])
        arm["dice_less_real_than_plain_interval"] = [low, high]
        arm["reached"] = main_tail["ratio"] is not None and main_tail["ratio"] >= GOAL and high >= 0
        against = f"{arm['dice_less_real_than_plain']:+.3f} ({low:+.3f} to {high:+.3f})"
        shares = [f"{tail['share']:.2f}" for tail in arm["tail"].values()]
        low, high = main_tail["interval"]
        shown = "any" if main_tail["ratio"] is None else f"{main_tail['ratio']:.1f}"
        judged = [arm["dice"], arm["dice_of_real_scans_of_the_label_maps"], against, arm["sound"]]
        rows.append([name, *shares, f"{low:.2f} to {high:.2f}", shown, *judged, verdict(arm["reached"])])
    head = ["set", *(f"tail, {space}" for space in SPACES), "95 % interval of the first", "times plain"]
    head += ["Dice", "Dice of the real scans of these label maps", "difference of the two, less that of plain", "sound"]
    table([*head, "goal"], rows)
    save(
        f"minority_{dataset}",
        what="share of synthetic scans in the rarest tenth of the real training scans (by volume of and brightness in "
        "each class, fifth nearest scan of another patient), not beyond the rarest of them and found by a segmenter "
        "trained on real scans; intervals: 95 % bootstrap over patients",
        n={"real": len(train), "val": len(val), "each set": num_samples},
        seeds=[seed],
        model={"name": generator.config.name, "weights_hash": generator.weights_hash},
        segmenter=training,
        least_dice=least.tolist(),
        dice_real_validation=on_real.nanmean(dim=0).tolist(),
        goal=GOAL,
        sets=arms,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
