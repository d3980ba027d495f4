"""Whether a scan shows what its label says: segmenters that are trained on other patients' real scans draw it again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from medgen.data.case import Case, Dataset
from medgen.filtering.tolerance import Kind
from medgen.provenance import write_bytes
from medgen.seeding import derive_seed
from medgen.segmentation import (
    Augmentation,
    Pair,
    Preparation,
    Recipe,
    build_segmenter,
    fit_preparation,
    load_pairs,
    train_segmenter,
)

VERSION = 2  # raise when equal scans give other segmenters
FOLDS = 3
KINDS = {"consistency": Kind("logit", "low")}
# Slices are stored turned and enlarged in more ways than volumes, whose orientation and spacing are known; and a real
# scan that the judge has no eye for costs all others some of their tolerance. Segmenters of volumes have seen classes
# painted out, and find them no more where they are not: measured on hippocampus. On cardiac slices, where the judge
# learns less in as many steps, it catches no more by that.
_AUGMENTATION = {2: Augmentation(rotation=90.0, scaling=0.35), 3: Augmentation(erasing=0.3)}
TOGETHER = "all classes"


@dataclass(frozen=True, eq=False)
class Segmenters:
    """One segmenter for each fold of the reference; none has seen the patients of its own fold.

    Attributes:
        preparation: The grid at which they see scans.
        networks: F segmenters.
        folds: Fold of each patient.
        digest: Of all that their weights depend on.
    """

    preparation: Preparation
    networks: tuple[nn.Module, ...]
    folds: dict[str, int]
    digest: str

    def agreement(self, pair: Pair, patient: str | None = None) -> torch.Tensor:
        """Voxels that segmenters and label map have in common.

        Args:
            pair: Image and label, prepared.
            patient: Of a reference scan: only the segmenter that has not seen the patient judges it. None: all do.

        Returns:
            ``(F or 1, K, 3)`` counts for each segmenter and class of K, the background left out: voxels of the class in
            both, voxels found, voxels in the label.
        """
        networks = self.networks if patient is None else (self.networks[self.folds[patient]],)
        return torch.stack([_count(network, pair, self.preparation.patch) for network in networks])


@torch.inference_mode()
def _count(network: nn.Module, pair: Pair, patch: tuple[int, ...]) -> torch.Tensor:
    from monai.inferers import sliding_window_inference

    image, label = pair
    device = next(network.parameters()).device
    output = sliding_window_inference(image[None].float().to(device), patch, 4, network, mode="gaussian")
    scores = torch.as_tensor(output)
    found, classes = scores.argmax(1)[0].cpu(), scores.shape[1]
    rows = [
        [int(((found == k) & (label == k)).sum()), int((found == k).sum()), int((label == k).sum())]
        for k in range(1, classes)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def dice(counts: torch.Tensor) -> tuple[list[float], float]:
    """Dice of each class and of all voxels together, the mean over the segmenters.

    The mean of their Dices, not that of their vote, which would flatter: a reference scan is judged by one.

    Args:
        counts: ``(F, K, 3)`` of :meth:`Segmenters.agreement`.

    Returns:
        Dice of each of the K classes, NaN where the label does not show it; and Dice of all classes, ``2 Σ both / Σ
        (found + given)``, which also counts what is found and not in the label.
    """
    both, found, given = counts.unbind(dim=2)
    each = torch.where(given > 0, 2 * both / (found + given).clamp(min=1), math.nan).mean(dim=0)
    together = 2 * both.sum(dim=1) / (found + given).sum(dim=1).clamp(min=1)
    return each.tolist(), float(together.mean())


def deal_folds(patients: Sequence[str], seed: int) -> dict[str, int]:
    """Deal patients into folds of nearly equal size, by hash.

    Args:
        patients: Patient of each scan.
        seed: Of the hash.

    Returns:
        Fold of each patient.
    """
    order = sorted(set(patients), key=lambda name: derive_seed(seed, "filter", "fold", name))
    return {name: index % FOLDS for index, name in enumerate(order)}


def train_segmenters(
    cases: Sequence[Case],
    patients: Sequence[str],
    dataset: Dataset,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    folder: Path,
    digest: str,
) -> Segmenters:
    """Train the segmenter of each fold on the patients of the other folds; those that are in the folder stay.

    Args:
        cases: The reference scans, each with a label.
        patients: Patient of each; at least as many as folds.
        dataset: Their set.
        steps: Steps of each training.
        seed: Of the folds, the first weights and the crops.
        device: Where to train.
        folder: Where the weights are kept.
        digest: Of all that they depend on.

    Returns:
        The segmenters, in evaluation mode.

    Raises:
        BadInputError: If a scan cannot be used.
        DivergedError: If a training came to no finite loss.
    """
    preparation = fit_preparation(cases, dataset, seed)
    folds = deal_folds(patients, seed)
    dims = dataset.spatial_dims
    recipe = Recipe(steps, 4 if dims == 2 else 2, augmentation=_AUGMENTATION[dims])
    classes, channels = len(dataset.class_names), len(dataset.channel_names)
    pairs: list[Pair] = []
    networks = []
    for fold in range(FOLDS):
        path = _file(folder, fold)
        network = _load(path, digest, preparation.patch, channels, classes)
        if network is None:
            pairs = pairs or load_pairs(cases, dataset, preparation, "reference")
            others = [pair for pair, name in zip(pairs, patients, strict=True) if folds[name] != fold]
            name = f"reference (fold {fold + 1} of {FOLDS})"
            network = train_segmenter(others, recipe, preparation.patch, classes, seed, device, name)
            weights = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
            write_bytes(path, save(weights, metadata={"digest": digest}))
        networks.append(network.to(device))
    return Segmenters(preparation, tuple(networks), folds, digest)


def load_segmenters(
    folder: Path, digest: str, preparation: Preparation, *, channels: int, classes: int
) -> list[nn.Module] | None:
    """Segmenters of an earlier run.

    Args:
        folder: Where their weights are kept.
        digest: Of all that they depend on.
        preparation: The grid at which they see scans.
        channels: Of the scans.
        classes: Of the labels, with the background.

    Returns:
        The segmenter of each fold; None where one is missing, damaged or of another digest.
    """
    paths = [_file(folder, fold) for fold in range(FOLDS)]
    networks = [_load(path, digest, preparation.patch, channels, classes) for path in paths]
    whole = [network for network in networks if network is not None]
    return whole if len(whole) == FOLDS else None


def _file(folder: Path, fold: int) -> Path:
    return folder / f"segmenter_{fold}.safetensors"


def _load(path: Path, digest: str, patch: tuple[int, ...], channels: int, classes: int) -> nn.Module | None:
    """A segmenter of an earlier run; None where there is none of this digest."""
    try:
        with safe_open(path, framework="pt") as stored:
            if (stored.metadata() or {}).get("digest") != digest:
                return None
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    network = build_segmenter(Recipe(steps=1, batch_size=1), len(patch), channels, classes, seed=0)
    network.load_state_dict(weights)
    return network.eval()
