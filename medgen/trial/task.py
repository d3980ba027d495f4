"""What is trained and how it is scored: a segmenter by Dice, or a classifier by balanced accuracy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from medgen.seeding import derive_seed
from medgen.segmentation import Pair, Recipe, augment, fit_network, score_segmenter, train_segmenter


@dataclass(frozen=True)
class Task(ABC):
    """A way to learn from pairs of image and target, and how that is scored.

    Attributes:
        classes: Names of the K classes that are scored.
        patch: Voxels along each axis that the network sees.
        device: Where it runs.
        metric: Name of the score.
        network: Name of the network.
    """

    classes: tuple[str, ...]
    patch: tuple[int, ...]
    device: torch.device
    metric: ClassVar[str]
    network: ClassVar[str]

    @abstractmethod
    def learn(self, pairs: Sequence[Pair], recipe: Recipe, seed: int, name: str, start: nn.Module | None) -> nn.Module:
        """Train on pairs.

        Args:
            pairs: Image and target of each scan.
            recipe: How.
            seed: Of weights and crops.
            name: Of the scans, for the progress bar.
            start: Network to go on from; None begins with fresh weights that depend on the seed alone.

        Returns:
            The network.
        """

    @abstractmethod
    def score(self, network: nn.Module, pairs: Sequence[Pair]) -> torch.Tensor:
        """Test a network.

        Args:
            network: From :meth:`learn`.
            pairs: N scans.

        Returns:
            ``(N, K)`` float64; NaN where a scan does not show a class.
        """


@dataclass(frozen=True)
class Segmentation(Task):
    """Dice of a residual U-Net for each class but the background.

    Attributes:
        metric: As of every task.
        network: As of every task.
    """

    metric = "Dice"
    network = "residual U-Net of MONAI"

    def learn(self, pairs: Sequence[Pair], recipe: Recipe, seed: int, name: str, start: nn.Module | None) -> nn.Module:
        """Train a segmenter.

        Args:
            pairs: Image and label map of each scan.
            recipe: How.
            seed: Of weights and crops.
            name: Of the scans, for the progress bar.
            start: Network to go on from, or None.

        Returns:
            The network.
        """
        return train_segmenter(pairs, recipe, self.patch, len(self.classes) + 1, seed, self.device, name, start=start)

    def score(self, network: nn.Module, pairs: Sequence[Pair]) -> torch.Tensor:
        """Dice of each scan and class.

        Args:
            network: The segmenter.
            pairs: N scans.

        Returns:
            ``(N, K)`` float64; NaN where the label map does not show the class.
        """
        return score_segmenter(network, pairs, self.patch, len(self.classes))


@dataclass(frozen=True)
class Classification(Task):
    """Recall of each class by a small residual network; its mean over classes is the balanced accuracy.

    Attributes:
        metric: As of every task.
        network: As of every task.
    """

    metric = "balanced accuracy"
    network = "residual units of MONAI, global average"

    def learn(self, pairs: Sequence[Pair], recipe: Recipe, seed: int, name: str, start: nn.Module | None) -> nn.Module:
        """Train a classifier; classes weigh alike, however many scans they have.

        Args:
            pairs: Image and class index of each scan.
            recipe: How.
            seed: Of weights and crops.
            name: Of the scans, for the progress bar.
            start: Network to go on from, or None.

        Returns:
            The network, ``(B, C, *patch)`` to ``(B, K)`` logits.
        """
        counts = torch.bincount(torch.stack([target.long() for _, target in pairs]), minlength=len(self.classes))
        weight = (len(pairs) / (len(self.classes) * counts.clamp(min=1))).to(self.device)
        blank = torch.zeros(self.patch, dtype=torch.uint8)

        def example(index: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            image, target = pairs[index]
            return augment((image, blank), recipe.augmentation, self.patch, generator)[0], target.long()

        return fit_network(
            start or self._build(len(pairs[0][0]), recipe, seed),
            len(pairs),
            example,
            nn.CrossEntropyLoss(weight),
            recipe,
            seed=seed,
            device=self.device,
            name=f"classifier on {name.replace('_', ' ')} scans",
        )

    def _build(self, channels: int, recipe: Recipe, seed: int) -> nn.Module:
        from monai.networks.blocks import ResidualUnit

        dims, layers = len(self.patch), []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "utility", "weights"))
            for width in recipe.features:
                layers.append(ResidualUnit(dims, channels, width, strides=2, subunits=2, norm="instance"))
                channels = width
            pool = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.AdaptiveAvgPool3d(1)
            return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(channels, len(self.classes)))

    @torch.inference_mode()
    def score(self, network: nn.Module, pairs: Sequence[Pair]) -> torch.Tensor:
        """Whether each scan was told right.

        Args:
            network: The classifier.
            pairs: N scans.

        Returns:
            ``(N, K)`` float64: 1 or 0 in the column of the scan's class, NaN in the others.
        """
        rows = torch.full((len(pairs), len(self.classes)), math.nan, dtype=torch.float64)
        for row, (image, target) in zip(rows, pairs, strict=True):
            found = network(image[None].float().to(self.device)).argmax(1).item()
            row[int(target)] = float(found == int(target))
        return rows
