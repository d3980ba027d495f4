"""Fréchet radiomic distances of two sets, their floors, and which features have shifted most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from medgen.evaluation.scans import Region, Scans
from medgen.evaluation.split import Split
from medgen.metrics.protocols import PROTOCOLS
from medgen.metrics.radiomic_distance import RadiomicDistance
from medgen.metrics.resampling import group_rows, relabel
from medgen.seeding import draw, stream
from medgen.types import BadInputError

_SHOWN = 10  # features that differ most
_ALIKE = 0.95  # correlation from which on a feature tells what one before it told
_RELABELINGS = 199
_ALPHA = 0.05


def column_names(protocol: str, scans: Scans) -> tuple[str, ...]:
    """Names of the columns of ``scans.radiomics``.

    Args:
        protocol: Name of the protocol.
        scans: Measured scans.

    Returns:
        The names, once per channel where channels are measured one by one.
    """
    names = PROTOCOLS[protocol].columns(scans.dataset.spatial_dims)
    count = scans.radiomics[protocol].shape[1] // len(names)
    return names if count == 1 else tuple(f"channel{c}_{name}" for c in range(count) for name in names)


def radiomic_distances(
    real: Scans, synthetic: Scans, split: Split, region: Region, seed: int
) -> dict[str, dict[str, Any]]:
    """Each protocol's distance of synthetic to real validation scans, and of real training scans to them.

    Protocols that are biased for few scans compare equal numbers of scans.

    Args:
        real: The measured real scans.
        synthetic: The measured synthetic scans.
        split: Of the real scans.
        region: Where features were taken.
        seed: Of the draws.

    Returns:
        For each protocol the section of the report.

    Raises:
        BadInputError: If fewer than two scans of a set have features.
    """
    found = {}
    for name in real.radiomics:
        protocol = PROTOCOLS[name]
        columns = column_names(name, real)
        made = _with_features(synthetic, list(range(len(synthetic.cases))), name, "synthetic")
        val = _with_features(real, split.val, name, "real")
        train = _with_features(real, split.train, name, "real") if split.apart else val
        if not split.apart:
            train, val_of_floor = _halves(val, real.groups, seed)
        else:
            val_of_floor = val
        halved = min(len(train), len(val_of_floor)) >= 2
        if name != "frd-robust":
            size = min(len(side) for side in (made, val, *((train, val_of_floor) if halved else ())))
            made, val = draw(made, size, seed, name, "synthetic"), draw(val, size, seed, name, "val")
            train, val_of_floor = draw(train, size, seed, name, "train"), draw(val_of_floor, size, seed, name, "val")
        value = _plain(_distance(protocol, (real, val), (synthetic, made), columns, seed))
        patients = [len({scans.groups[row] for row in rows}) for scans, rows in ((real, val), (synthetic, made))]
        floor = None
        if halved:
            whole = _plain(_distance(protocol, (real, val_of_floor), (real, train), columns, seed))
            floor = {key: whole[key] for key in ("value", "squared", "interval", "p_value", "n_real", "n_synthetic")}
        else:
            value["warnings"].append(
                "no floor: the real scans cannot be halved, patient by patient, with 2 on each side"
            )
        if name != "frd-robust":
            value["warnings"].append(f"biased for few scans, so {len(made)} scans of each side are compared, at random")
            if floor and floor["squared"] > value["squared"]:
                value["warnings"].append(
                    "real scans lie further from real ones than synthetic scans do: single features that hardly vary "
                    "in the first set rule this protocol; read frd-robust"
                )
        found[name] = {
            **value,
            "groups_real": patients[0],
            "groups_synthetic": patients[1],
            "permutations": None if value["p_value"] is None else _RELABELINGS,
            "unit": protocol.unit,
            "floor": floor,
            "excluded": {"real": real.excluded[name], "synthetic": synthetic.excluded[name]},
            "region": "whole scans" if region == "whole" else "labelled region",
        }
    return found


def radiomic_shift(real: Scans, synthetic: Scans, split: Split, protocol: str, seed: int) -> dict[str, Any]:
    """The features whose means differ most, one of each bunch that goes together, and which differ beyond chance.

    Each p-value is the share of relabelings of the scans, whole patients together, in which any feature differs as much
    as this one does: it is corrected for the number of features (Westfall and Young 1993, max statistic).

    Args:
        real: The measured real scans.
        synthetic: The measured synthetic scans.
        split: Of the real scans.
        protocol: Whose features.
        seed: Of the relabelings.

    Returns:
        `features` that were tested, how many differ `beyond_chance`, `relabelings`, and as `largest` up to ten features
        with the difference of their means in standard deviations, its p-value, and mean and deviation of both sets.
    """
    sides = [
        (scans, [row for row in rows if not np.isnan(scans.radiomics[protocol][row]).all()])
        for scans, rows in ((real, split.val), (synthetic, range(len(synthetic.cases))))
    ]
    x, y = (scans.radiomics[protocol][rows] for scans, rows in sides)
    columns = column_names(protocol, real)
    used = [index for index, name in enumerate(columns) if not name.startswith("diagnostics")]
    defined = [index for index in used if np.isfinite(x[:, index]).all() and np.isfinite(y[:, index]).all()]
    both = np.concatenate([x, y])[:, defined]
    # A spread of rounding errors is no spread; such columns hold one value.
    within = np.sqrt((x[:, defined].var(axis=0) + y[:, defined].var(axis=0)) / 2)
    varies = within > 1e-6 * np.abs(both).max(axis=0)
    names = [columns[index] for index, keep in zip(defined, varies, strict=True) if keep]
    both, first = both[:, varies], np.arange(len(both)) < len(x)
    # In units of each feature, so that sums of squares keep their digits.
    scaled = (both - both.mean(axis=0)) / both.std(axis=0)
    effect = _effects(scaled, first[None])[0]
    groups = [f"{kind} {scans.groups[row]}" for kind, (scans, rows) in zip("rs", sides, strict=True) for row in rows]
    chance = np.abs(_effects(scaled, _relabeled(groups, len(x), seed))).max(axis=1, initial=0.0)
    p_values = (1 + (chance[:, None] >= np.abs(effect) * (1 - 1e-9)).sum(axis=0)) / (_RELABELINGS + 1)
    residuals = np.concatenate([part - part.mean(axis=0) for part in (scaled[first], scaled[~first])])
    directions = residuals / np.linalg.norm(residuals, axis=0)
    chosen: list[int] = []
    for index in np.argsort(-np.abs(effect), kind="stable").tolist():
        alike = [abs(float(directions[:, index] @ directions[:, other])) for other in chosen]
        if max(alike, default=0.0) < _ALIKE:
            chosen.append(index)
        if len(chosen) == _SHOWN:
            break
    return {
        "features": len(names),
        "beyond_chance": int((p_values < _ALPHA).sum()),
        "relabelings": _RELABELINGS,
        "largest": [
            {
                "feature": names[index],
                "effect": float(effect[index]),
                "p_value": float(p_values[index]),
                **{
                    name: {"mean": float(both[side, index].mean()), "std": float(both[side, index].std())}
                    for name, side in (("real", first), ("synthetic", ~first))
                },
            }
            for index in chosen
        ],
    }


def _effects(table: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Mean of the second set less that of the first, in standard deviations within the sets, for each labeling.

    Takes ``(N, F)`` features and ``(L, N)`` labelings, True for the first set; gives ``(L, F)``.
    """
    means, variances = [], []
    for side in (first, ~first):
        count = side.sum(axis=1, keepdims=True)
        means.append(side @ table / count)
        variances.append((side @ table**2 / count - means[-1] ** 2).clip(min=0))
    spread = np.sqrt((variances[0] + variances[1]) / 2)
    return (means[1] - means[0]) / np.maximum(spread, 1e-9)


def _relabeled(groups: Sequence[str], size: int, seed: int) -> np.ndarray:
    """Random labelings ``(L, N)`` in which the scans of a patient stay together."""
    rows = group_rows(groups, len(groups), name="groups")
    labelings = np.zeros((_RELABELINGS, len(groups)), dtype=bool)
    for index, labeling in enumerate(labelings):
        labeling[relabel(rows, size, stream(seed, "radiomic shift", index))[0].numpy()] = True
    return labelings


def _with_features(scans: Scans, rows: list[int], protocol: str, name: str) -> list[int]:
    kept = [row for row in rows if not np.isnan(scans.radiomics[protocol][row]).all()]
    if len(kept) < 2:
        reasons = "; ".join(f"{count}x {reason}" for reason, count in scans.excluded[protocol].items())
        raise BadInputError(
            f"{scans.dataset.root}: expected at least 2 {name} scans with radiomic features ({protocol}), got "
            f"{len(kept)} of {len(rows)} ({reasons}). Choose another region, or leave the protocol out."
        )
    return kept


def _halves(rows: list[int], groups: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Random halves, patient by patient."""
    by_group: dict[str, list[int]] = {}
    for row in rows:
        by_group.setdefault(groups[row], []).append(row)
    names = list(by_group)
    halves: tuple[list[int], list[int]] = ([], [])
    for index in draw(range(len(names)), len(names), seed, "radiomic halves"):
        min(halves, key=len).extend(by_group[names[index]])
    return halves


def _distance(
    protocol: Any, real: tuple[Scans, list[int]], other: tuple[Scans, list[int]], columns: Sequence[str], seed: int
) -> RadiomicDistance:
    (x, x_rows), (y, y_rows) = real, other
    options: dict[str, Any] = {}
    if protocol.name == "frd-robust":
        # Patients of the two folders are told apart even where they share a name.
        groups = (
            [f"real {x.groups[row]}" for row in x_rows],
            [f"{'real' if y is x else 'synthetic'} {y.groups[row]}" for row in y_rows],
        )
        options = {"groups": groups, "permutations": _RELABELINGS, "seed": seed}
    try:
        result: RadiomicDistance = protocol.distance(
            x.radiomics[protocol.name][x_rows], y.radiomics[protocol.name][y_rows], columns, **options
        )
    except ValueError as error:
        raise BadInputError(f"{y.dataset.root}: {protocol.name}: {error} Or choose other protocols.") from error
    return result


def _plain(distance: RadiomicDistance) -> dict[str, Any]:
    """The distance in plain types; what JSON cannot hold becomes None, with a warning that says so."""
    content = {name: list(entry) if isinstance(entry, tuple) else entry for name, entry in asdict(distance).items()}
    if not math.isfinite(distance.value):
        content["value"] = None
        content["warnings"].append("the value is minus infinity: the sets are identical, or too few scans vary")
    return content
