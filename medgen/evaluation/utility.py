"""What synthetic scans are good for: a small segmenter learns from them and is tested on real ones, and the reverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.nn import functional as F

from medgen.data.case import Dataset
from medgen.data.origin import made_from
from medgen.evaluation.caveats import shared_names
from medgen.evaluation.scans import Scans
from medgen.evaluation.split import Split
from medgen.seeding import draw, stream
from medgen.segmentation import Recipe, fit_preparation, load_pairs, score_segmenter, train_segmenter
from medgen.types import BadInputError

FEWEST = 5  # labelled scans of a set, below which a segmenter learns nothing
STEPS = 300
_MEMORY = 512 * 2**20  # bytes of prepared scans, for each set
_MOST = 1000  # scans of each set
_RESAMPLES = 1000
_TAILS = (0.025, 0.975)


def measure_utility(
    real: Scans,
    synthetic: Scans,
    split: Split,
    *,
    device: torch.device | str = "cpu",
    steps: int | None = None,
    seed: int = 0,
    equal_counts: bool = True,
) -> dict[str, Any]:
    """Train one small segmenter on real scans, one on synthetic scans and one on both; test all on real scans.

    The three start from the same weights and take the same number of steps with the same schedule, so that the one
    that learns from both sees each scan half as often, not more scans in all. Where synthetic and real scans are equal
    in number, a difference between the first two is due to the scans. Nothing is mirrored in training: many labels
    tell left from right. The first segmenter also judges adherence: whether synthetic scans show what their labels say.

    Synthetic scans that were made from a validation scan, or have its label map, are not learned from. Scans are
    compared at no more than 128² pixels or, with 3D scans, about 96 voxels along the longest axis, in the median
    spacing of the real scans. Intervals speak of other validation patients, not of another training.

    Args:
        real: The measured real scans.
        synthetic: The measured synthetic scans, of the same classes.
        split: Of the real scans; the segmenter learns from the training scans and is tested on the others.
        device: Where the segmenters run.
        steps: Steps of each training; None takes 300.
        seed: Of the first weights, the scans that are taken, the crops and the resampled patients.
        equal_counts: Learn from as many distinct real as synthetic scans, a random part of the larger set. Otherwise
            from all.

    Returns:
        ``utility`` of a report: per class `dice` (mean over the validation scans that show the class) by what was
        learned from, `differences` to the segmenter that learned from real scans, `adherence`, and for each of them
        95 % bootstrap `intervals` over patients; None where no scan or fewer than two patients show the class.

    Raises:
        BadInputError: If the real scans are not split, the sets differ in their number of classes, or a side has fewer
            than 5 labelled scans.
        DivergedError: If a training came to no finite loss.
    """
    if not split.apart:
        raise BadInputError("Utility: expected a split of the real scans, got none. List test scans in val.txt.")
    classes = _classes(real.dataset, synthetic.dataset)
    recipe = Recipe(STEPS if steps is None else steps, 4 if real.dataset.spatial_dims == 2 else 2)
    rows = {"training": split.train, "validation": split.val, "synthetic": list(range(len(synthetic.cases)))}
    sets = {"training": real, "validation": real, "synthetic": synthetic}
    labelled = {name: [row for row in rows[name] if sets[name].cases[row].label is not None] for name in rows}
    held_out = {real.labels[row] for row in labelled["validation"]}
    edited = made_from(synthetic.dataset, [real.cases[row] for row in rows["validation"]])
    learnable = [
        row
        for row in labelled["synthetic"]
        if synthetic.labels[row] not in held_out and synthetic.cases[row].case not in edited
    ]
    for name, found in {**labelled, "synthetic": learnable}.items():
        if len(found) < FEWEST:
            owned = ", made from neither validation scans nor their label maps" if name == "synthetic" else ""
            raise BadInputError(
                f"Utility: expected at least {FEWEST} labelled {name} scans{owned}, got {len(found)}. Add scans."
            )
    preparation = fit_preparation([real.cases[row] for row in labelled["training"]], real.dataset, seed)
    patch, most = preparation.patch, min(_MOST, max(FEWEST, _MEMORY // preparation.bytes_per_scan))
    chosen = {name: draw(found, most, seed, "utility", name) for name, found in labelled.items()}
    pairs = {
        name: load_pairs([sets[name].cases[row] for row in found], sets[name].dataset, preparation, name)
        for name, found in chosen.items()
    }
    real_pairs = pairs["training"]
    made_pairs = [p for p, row in zip(pairs["synthetic"], chosen["synthetic"], strict=True) if row in set(learnable)]
    if equal_counts:
        count = min(len(real_pairs), len(made_pairs))
        real_pairs, made_pairs = real_pairs[:count], made_pairs[:count]
    material = {"real": real_pairs, "synthetic": made_pairs, "real_and_synthetic": real_pairs + made_pairs}
    groups = [real.groups[row] for row in chosen["validation"]]
    tested: dict[str, torch.Tensor] = {}
    for name, learned in material.items():
        network = train_segmenter(learned, recipe, patch, len(classes) + 1, seed, torch.device(device), name)
        tested[name] = score_segmenter(network, pairs["validation"], patch, len(classes))
        if name == "real":
            adherence = score_segmenter(network, pairs["synthetic"], patch, len(classes))
    # Scans made from one label map are no more independent than scans of one patient.
    made_groups = [synthetic.cases[row].group or str(synthetic.labels[row]) for row in chosen["synthetic"]]
    scores = {name: _summarize(dice, groups, seed) for name, dice in tested.items()}
    fit = _summarize(adherence, made_groups, seed)
    gains = {name: _summarize(tested[name] - tested["real"], groups, seed) for name in list(material)[1:]}
    left_out = len(labelled["synthetic"]) - len(learnable)
    shared = f"{left_out} synthetic scans were made from a validation scan or its label map; nothing learned from them."
    return {
        "steps": recipe.steps,
        "classes": classes,
        "dice": {name: values for name, (values, _) in scores.items()},
        "adherence": fit[0],
        "intervals": {**{name: ends for name, (_, ends) in scores.items()}, "adherence": fit[1]},
        "differences": {name: {"values": values, "intervals": ends} for name, (values, ends) in gains.items()},
        "n": {
            **{name: len(learned) for name, learned in material.items()},
            "validation": len(chosen["validation"]),
            "validation_patients": len(set(groups)),
            "adherence": len(chosen["synthetic"]),
        },
        "without_label": {name: len(rows[name]) - len(found) for name, found in labelled.items()},
        "recipe": {**asdict(recipe), "patch": list(patch), "precision": "fp32"},
        "notes": [shared] if left_out else [],
    }


def _classes(real: Dataset, synthetic: Dataset) -> list[str]:
    """Names of the classes but the background."""
    if len(real.class_names) != len(synthetic.class_names):
        raise BadInputError(
            f"Utility: expected {len(real.class_names) - 1} classes in {synthetic.root.resolve().name} as in "
            f"{real.root.resolve().name}, got {len(synthetic.class_names) - 1}. Give both sets the same classes."
        )
    return [name for value, name in sorted(shared_names(real, synthetic).items()) if value]


def _summarize(
    dice: torch.Tensor, groups: Sequence[str], seed: int
) -> tuple[list[float | None], list[list[float] | None]]:
    """Per class the mean over scans, and its interval over resampled patients."""
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    member = F.one_hot(torch.tensor([names[group] for group in groups]), len(names)).double().T
    sums, counts = member @ dice.nan_to_num(0.0), member @ (~dice.isnan()).double()
    drawn = torch.randint(len(names), (_RESAMPLES, len(names)), generator=stream(seed, "utility", "patients"))
    weights = torch.zeros(_RESAMPLES, len(names), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn).double()
    )
    ends = torch.nanquantile((weights @ sums) / (weights @ counts), torch.tensor(_TAILS, dtype=torch.float64), dim=0)
    means = dice.nanmean(dim=0).tolist()
    enough = ((counts > 0).sum(dim=0) >= 2).tolist()
    return (
        [mean if math.isfinite(mean) else None for mean in means],
        [pair if known else None for pair, known in zip(ends.T.tolist(), enough, strict=True)],
    )
