"""What a reader of a report has to know of the two sets before any score: labels, sizes, split, and how many scans."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from medgen.data.case import Dataset
from medgen.evaluation.scans import Scans
from medgen.evaluation.split import FEW, HALVES, Split

_FAR_SMALLER = 8  # times fewer voxels than the median scan, as a volume of half the size along each axis has


def shared_names(real: Dataset, synthetic: Dataset) -> dict[int, str]:
    """One name for each label value: the real set's, or the synthetic set's where the real one has only the number.

    Args:
        real: The real set.
        synthetic: The synthetic set.

    Returns:
        Names by label value, of the values that either set has.
    """
    own = {value: name for value, name in real.class_names.items() if name != f"class_{value}"}
    return {**real.class_names, **synthetic.class_names, **own}


def caveats(real: Scans, synthetic: Scans, split: Split) -> list[str]:
    """Warnings that concern the sets as a whole.

    Args:
        real: The measured real scans.
        synthetic: The measured synthetic scans.
        split: Of the real scans.

    Returns:
        The warnings, one sentence or a few each.
    """
    found = []
    if split.words == HALVES:
        found.append(
            "The real folder names no validation split and is too small to set one aside. A generator that was trained "
            "on this folder has learned from all of its scans, and looks better than it is. List scans that it has not "
            "seen in val.txt, and the others in train.txt."
        )
    elif len(split.train) < FEW <= min(len(split.val), len(synthetic.cases)):
        found.append(f"Only {len(split.train)} real training scans: the floors are uncertain.")
    if not synthetic.dataset.synthetic:
        name = synthetic.dataset.root.resolve().name
        found.append(f"{name} does not mark itself as synthetic. Check that the folders are not swapped.")
    return [*found, *_of_labels(real, synthetic), *_of_sizes(real, synthetic)]


def differing_names(real: Dataset, synthetic: Dataset) -> list[str]:
    """A warning where the sets name a label value differently; it may then mean two things.

    Args:
        real: The real set.
        synthetic: The synthetic set, with its own names.

    Returns:
        One warning, or none.
    """
    names = shared_names(real, synthetic)
    other = [
        f"{value} ({names[value]} in real, {name} in synthetic scans)"
        for value, name in sorted(synthetic.class_names.items())
        if value and name.lower() not in (names[value].lower(), f"class_{value}")
    ]
    if not other:
        return []
    return [
        f"The sets name label values differently: {', '.join(other)}. The names of the real set are shown. Check that "
        "the values mean the same."
    ]


def lift_shared(scores: dict[str, dict[str, Any]]) -> list[str]:
    """Take out of the scores what every one of them warns of, so that it is said once.

    Args:
        scores: ``scores`` of a report; their warnings are replaced.

    Returns:
        The shared warnings.
    """
    every = [score["warnings"] for score in scores.values()]
    shared = [warning for warning in every[0] if all(warning in warnings for warnings in every)] if every else []
    for score in scores.values():
        score["warnings"] = [warning for warning in score["warnings"] if warning not in shared]
    return shared


def _of_labels(real: Scans, synthetic: Scans) -> list[str]:
    found = []
    names = shared_names(real.dataset, synthetic.dataset)
    sets = {"real": real, "synthetic": synthetic}
    missing = {name: sum(label is None for label in scans.labels) for name, scans in sets.items()}
    if all(missing[name] == len(scans.cases) for name, scans in sets.items()):
        return []
    for name, other in (("real", "synthetic"), ("synthetic", "real")):
        if missing[name] == len(sets[name].cases):
            found.append(f"No {name} scan has a label map, but {other} ones have. Add those of the {name} set.")
            continue
        if missing[name]:
            found.append(f"{missing[name]} of {len(sets[name].cases)} {name} scans have no label map.")
        shown, wanted = (frozenset[int]().union(*sets[key].classes) for key in (name, other))
        if absent := sorted(wanted - shown):
            listed = ", ".join(names.get(value, f"class_{value}") for value in absent)
            found.append(
                f"No {name} label map shows {listed}, but {other} ones do: the sets differ in what they hold, and "
                "scores count that too. Add scans that show it, or remove the class from both sets."
            )
    return found


def _of_sizes(real: Scans, synthetic: Scans) -> list[str]:
    found = []
    for name, scans in (("real", real), ("synthetic", synthetic)):
        usual = _median(scans.shapes)
        small = [row for row, shape in enumerate(scans.shapes) if _is_far_smaller(shape, usual)]
        if small:
            first = small[0]
            many = "scan is" if len(small) == 1 else "scans are"
            found.append(
                f"{len(small)} {name} {many} far smaller than the others of the set, such as "
                f"{scans.cases[first].case} ({_size(scans.shapes[first])}; median {_size(usual)}). All scores count "
                "such scans, and MS-SSIM takes as many scales as the smallest allows. Look at them, and leave out what "
                "is cut off or a preview."
            )
    sizes = {"real": _median(real.shapes), "synthetic": _median(synthetic.shapes)}
    for name, other in (("real", "synthetic"), ("synthetic", "real")):
        if _is_far_smaller(sizes[name], sizes[other]):
            found.append(
                f"The {name} scans are far smaller than the {other} ones (median {_size(sizes[name])} against "
                f"{_size(sizes[other])}), so scores tell the sets apart by detail. Compare scans of one size."
            )
    return found


def _median(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(round(statistics.median(axis)) for axis in zip(*shapes, strict=True))


def _is_far_smaller(shape: tuple[int, ...], usual: tuple[int, ...]) -> bool:
    return _FAR_SMALLER * math.prod(shape) <= math.prod(usual)


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
