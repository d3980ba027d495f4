"""The scans of a comparison: which are learned from, which are tested on, and that none is both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from medgen.data.case import Case, Dataset, unlike_classes
from medgen.data.dataset import read_dataset, split_cases
from medgen.data.origin import made_from
from medgen.filtering import seen_cases
from medgen.provenance import MANIFEST, read_manifest, require_accepted, sha256_array
from medgen.seeding import draw
from medgen.segmentation import Pair, Preparation, fit_preparation, load_pairs
from medgen.threads import side_by_side
from medgen.trial.task import Classification, Segmentation, Task
from medgen.types import BadInputError

FEWEST = 3  # labelled scans of a side


@dataclass(frozen=True)
class Material:
    """Prepared scans, each with its label map or the index of its class.

    Attributes:
        task: What is learned from them.
        train: Real training scans.
        train_groups: Patient of each.
        synthetic: Synthetic scans; empty where none are given.
        test: Real test scans.
        test_groups: Patient of each.
        notes: What was left out, and why.
    """

    task: Task
    train: list[Pair]
    train_groups: list[str]
    synthetic: list[Pair]
    test: list[Pair]
    test_groups: list[str]
    notes: list[str]

    def subset(self, num_patients: int, seed: int) -> list[Pair]:
        """Training scans of some patients; those of fewer patients lie within those of more.

        Args:
            num_patients: How many.
            seed: Chooses them.

        Returns:
            The scans.
        """
        names = list(dict.fromkeys(self.train_groups))
        chosen = set(draw(names, num_patients, seed, "utility", "patients"))
        return [pair for pair, group in zip(self.train, self.train_groups, strict=True) if group in chosen]


def load_material(real: Path, synthetic: Path | None, target: str | None, seed: int, device: torch.device) -> Material:
    """Read all scans of a comparison.

    Args:
        real: Folder of real scans.
        synthetic: Folder of synthetic scans, or None.
        target: Column of the metadata that a classifier is to tell; None takes label maps.
        seed: Of the scans that the grid is fitted on.
        device: Where networks are to run.

    Returns:
        The scans.

    Raises:
        BadInputError: If the sets do not fit together, a side has fewer than 3 labelled scans (test scans that are
            training scans, voxel for voxel, do not count), gates rejected a synthetic one or have seen test scans, or a
            scan cannot be used.
    """
    dataset = read_dataset(real)
    # As medgen train splits them, which has no use for scans without label maps.
    useful = [case for case in dataset.cases if target is not None or case.label is not None]
    parts = split_cases(replace(dataset, cases=useful))
    train, test = ([case for case in part if _is_labelled(case, target)] for part in parts)
    torn = {case.group for case in train if case.group} & {case.group for case in test if case.group}
    if torn:
        raise BadInputError(
            f"{dataset.root}: expected no patient in both training and test, got {len(torn)}, such as {min(torn)}: "
            "what is learned of them would be tested on them. Correct val.txt or the column split."
        )
    _require_scans(dataset, {"training": len(train), "test": len(test)}, target)
    reader = _Reader(fit_preparation(train, dataset, seed), target, _values(dataset, train, target))
    learned, tested = reader.load(train, dataset, "training"), reader.load(test, dataset, "test")
    known = {sha256_array(image) for image, _ in learned}
    fresh = [index for index, (image, _) in enumerate(tested) if sha256_array(image) not in known]
    notes = []
    if copies := len(test) - len(fresh):
        _require_scans(dataset, {"test": len(fresh)}, target, f" beside {copies} that are training scans too")
        notes.append(f"{copies} test scans are training scans, voxel for voxel; nothing tested on them.")
        test, tested = [test[index] for index in fresh], [tested[index] for index in fresh]
    made: list[Pair] = []
    if synthetic is not None:
        made, told = _load_synthetic(dataset, read_dataset(synthetic), test, tested, reader)
        notes += told
    classes, patch = tuple(reader.classes), reader.preparation.patch
    kind = Segmentation if target is None else Classification
    return Material(
        task=kind(classes, patch, device),
        train=learned,
        train_groups=_groups(train),
        synthetic=made,
        test=tested,
        test_groups=_groups(test),
        notes=notes,
    )


def _require_scans(dataset: Dataset, counts: dict[str, int], target: str | None, beside: str = "") -> None:
    what = "label maps" if target is None else f"{target!r}"
    for name, count in counts.items():
        if count < FEWEST:
            raise BadInputError(
                f"{dataset.root}: expected at least {FEWEST} {name} scans with {what}, got {count}{beside}. Add scans, "
                "or name the test scans in val.txt."
            )


def _is_labelled(case: Case, target: str | None) -> bool:
    return case.label is not None if target is None else bool(case.meta.get(target))


def _values(dataset: Dataset, train: Sequence[Case], target: str | None) -> list[str]:
    """Names of the classes that are scored."""
    if target is None:
        return [name for value, name in sorted(dataset.class_names.items()) if value]
    values = sorted({case.meta[target] for case in train})
    if len(values) < 2:
        raise BadInputError(
            f"target: expected at least two values of {target!r} among the training scans, got {values}. Name another "
            "column."
        )
    return values


@dataclass(frozen=True)
class _Reader:
    preparation: Preparation
    target: str | None
    classes: list[str]

    def load(self, cases: Sequence[Case], dataset: Dataset, name: str) -> list[Pair]:
        """Image, and label map or index of the class, of each scan."""
        if self.target is None:
            return load_pairs(cases, dataset, self.preparation, name)
        targets = [self._index(case, dataset) for case in cases]
        with side_by_side() as pool:
            images = pool.map(lambda case: self.preparation.image(case, dataset), cases)
            shown = tqdm(images, desc=f"{name} scans for classifiers", total=len(cases), unit="scan")
            return list(zip(shown, targets, strict=True))

    def _index(self, case: Case, dataset: Dataset) -> torch.Tensor:
        value = case.meta[str(self.target)]
        if value not in self.classes:
            raise BadInputError(
                f"{dataset.root}: case {case.case}: expected {self.target!r} to be one of {', '.join(self.classes)} as "
                f"in the real training scans, got {value!r}. Correct it, or leave the scan out."
            )
        return torch.tensor(self.classes.index(value), dtype=torch.uint8)


def _groups(cases: Sequence[Case]) -> list[str]:
    return [case.group or f"case {case.case}" for case in cases]


def _load_synthetic(
    real: Dataset, synthetic: Dataset, test: Sequence[Case], tested: Sequence[Pair], reader: _Reader
) -> tuple[list[Pair], list[str]]:
    wanted = {
        "dimensions": (real.spatial_dims, synthetic.spatial_dims),
        "channels": (len(real.channel_names), len(synthetic.channel_names)),
    }
    for name, (expected, got) in wanted.items():
        if expected != got:
            raise BadInputError(
                f"{synthetic.root}: expected {name} {expected} as in {real.root}, got {got}. Give sets of one task."
            )
    if reader.target is None and unlike_classes(real.class_names, synthetic.class_names):
        own, other = (_shown(dataset.class_names) for dataset in (real, synthetic))
        raise BadInputError(
            f"{synthetic.root}: expected the classes of {real.root} ({own}), got {other}. Give sets of one task, or "
            "name equal classes alike in dataset.json or classes.json."
        )
    if (synthetic.root / MANIFEST).is_file():
        require_accepted(synthetic.root, read_manifest(synthetic.root / MANIFEST))
    _require_blind_gates(synthetic.root, test)
    labelled = [case for case in synthetic.cases if _is_labelled(case, reader.target)]
    edited = made_from(synthetic, test)
    kept = [case for case in labelled if case.case not in edited]
    pairs = reader.load(kept, synthetic, "synthetic")
    fresh = pairs
    if reader.target is None:
        held_out = {sha256_array(label) for _, label in tested}
        fresh = [pair for pair in pairs if sha256_array(pair[1]) not in held_out]
    reasons = {
        "have no label map" if reader.target is None else f"have no {reader.target!r}": len(synthetic.cases)
        - len(labelled),
        "were made from a test scan or its label map": len(labelled) - len(kept),
        "have the label map of a test scan": len(pairs) - len(fresh),
    }
    told = [f"{count} synthetic scans {reason}" for reason, count in reasons.items() if count]
    if len(fresh) < FEWEST:
        why = f" ({'; '.join(told)})" if told else ""
        remedy = "Make more, from label maps of training scans."
        if len(labelled) < FEWEST and reader.target is not None:
            remedy = (
                f"Say the {reader.target!r} of each when it is made (medgen synthesize --attributes or --conditions, "
                "by a model that was trained with it), or leave --target out."
            )
        raise BadInputError(
            f"{synthetic.root}: expected at least {FEWEST} synthetic scans to learn from, got {len(fresh)}{why}. "
            + remedy
        )
    return fresh, [f"{words}; nothing learned from them." for words in told]


def _require_blind_gates(synthetic: Path, test: Sequence[Case]) -> None:
    """Refuse scans that were chosen by gates which have seen the test scans."""
    if known := seen_cases(synthetic, test):
        raise BadInputError(
            f"{synthetic}: expected scans chosen by gates that have not seen the test scans, got gates fitted on "
            f"{len(known)} of these {len(test)}, such as {known[0].case}. Name the test scans in val.txt, "
            "train the generator without them, and filter again."
        )


def _shown(class_names: Mapping[int, str]) -> str:
    return ", ".join(f"{value} {name}" for value, name in sorted(class_names.items()) if value)


def material_digest(pairs: Sequence[Pair]) -> str:
    """What some scans are, in their order, on which crops and rows of scores depend.

    Args:
        pairs: The scans.

    Returns:
        64 hexadecimal digits.
    """
    digests = [sha256_array(image) + sha256_array(target) for image, target in pairs]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
