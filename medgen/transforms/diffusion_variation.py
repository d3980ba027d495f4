"""Variations of scans in a training loop: the same label, another appearance."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms.transform import MapTransform

from medgen.generator import Generator
from medgen.transforms.subjects import close_sample, open_sample
from medgen.transforms.variation import Conditions, Noising, Variation, check_prob, draw_seed
from medgen.transforms.workers import DrawnWithin, SeededInWorkers
from medgen.types import BadInputError


@dataclass(frozen=True)
class BatchNoising:
    """What a variation of a batch draws.

    Attributes:
        strength: Share in (0, 1] of the noise process.
        seeds: Of the noise of each sample.
        chosen: Samples that are varied.
    """

    strength: float
    seeds: tuple[int, ...]
    chosen: tuple[int, ...]


class RandDiffusionVariation(SeededInWorkers):
    """Give a scan another appearance and let its label stay.

    Its `last` holds the :class:`~medgen.transforms.variation.Noising` of the last call, or None where the scan stayed.

    Args:
        generator: As for :class:`medgen.transforms.variation.Variation`, like all further options.
        prob: Chance that a scan is varied.
        **options: Its other keywords: ``strength``, ``num_inference_steps``, ``guidance_scale``,
            ``precision``, ``use_edges``, ``scaled_window``, ``device``.

    Raises:
        BadInputError: As for :class:`medgen.transforms.variation.Variation`.
    """

    def __init__(self, generator: Generator | str | Path, prob: float = 0.1, **options: Any) -> None:
        check_prob(prob)
        super().__init__(prob)
        self.variation = Variation(generator, **options)
        self.last: Noising | None = None

    def randomize(self, data: Any = None) -> None:
        """Draw whether, how strongly and with which noise, into `last`.

        Args:
            data: Unused.
        """
        self.last = self.draw()

    def draw(self) -> Noising | None:
        """Draw whether, how strongly and with which noise.

        Returns:
            What was drawn; None to leave the scan.
        """
        return self.variation.draw(self.R) if self.R.rand() < self.prob else None

    def __call__(
        self,
        img: Any,
        label: Any = None,
        text: str | None = None,
        attributes: Mapping[str, str] | None = None,
        *,
        randomize: bool = True,
    ) -> Any:
        """Vary a scan, or not.

        Args:
            img: ``(C, H, W[, D])`` tensor, MetaTensor or array.
            label: ``(1, H, W[, D])`` class values.
            text: What it shows.
            attributes: Facts about it.
            randomize: Whether to draw anew; False replays `last`.

        Returns:
            A scan as ``img``.

        Raises:
            BadInputError: If it does not fit the model.
        """
        self.last = drawn = self.draw() if randomize else self.last
        return img if drawn is None else self.variation.make_one(img, label, drawn, text, attributes)


class RandDiffusionVariationd(DrawnWithin, MapTransform):
    """Dictionary version of :class:`RandDiffusionVariation`; scans of one sample share strength and noise.

    Args:
        keys: Scans.
        generator: As for :class:`medgen.transforms.variation.Variation`, like all further options.
        label_key: Their label map, which stays; None for a model that label maps do not steer.
        text_key: Their text, for a model that texts steer.
        attribute_keys: Keys of attributes, by their names in the model.
        prob: Chance that a sample is varied.
        allow_missing_keys: Whether a scan may be missing; a label may not.
        **options: As for :class:`RandDiffusionVariation`.

    Raises:
        BadInputError: As for :class:`medgen.transforms.variation.Variation`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        generator: Generator | str | Path,
        label_key: Hashable | None = None,
        *,
        text_key: Hashable | None = None,
        attribute_keys: Mapping[str, Hashable] | None = None,
        prob: float = 0.1,
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        DrawnWithin.__init__(self, RandDiffusionVariation(generator, prob, **options))
        self.conditions = Conditions(label_key, text_key, attribute_keys)

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> Any:
        """Vary the scans of a sample, or not.

        Args:
            data: The sample: a dictionary, or a ``Subject`` of TorchIO.
            randomize: Whether to draw anew; False replays `last`.

        Returns:
            A new one of the same kind.

        Raises:
            BadInputError: If a key is missing or something does not fit the model.
        """
        done = open_sample(data, (*self.keys, self.conditions.label_key))
        self.conditions.check(done)
        self.last = drawn = self.inner.draw() if randomize else self.last
        if drawn is not None:
            label, text, attributes = self.conditions.read(done)
            for key in self.key_iterator(done):
                done[key] = self.inner.variation.make_one(done[key], label, drawn, text, attributes)
        return close_sample(done, data)


class RandDiffusionVariationBatch(SeededInWorkers):
    """The same for a batch after collation, on the model's device: each of its samples with its own chance and noise.

    The strength is one draw for the batch, so that its samples go through the networks together. A sample is what it
    would be alone, within rounding.

    Its `last` holds the :class:`BatchNoising` of the last call.

    Args:
        generator: As for :class:`medgen.transforms.variation.Variation`, like all further options.
        prob: Chance of each sample.
        batch_size: Most samples that go through the networks together.
        device: As for :class:`medgen.transforms.variation.Variation`, but by default the GPU if there is one.
        **options: As for :class:`RandDiffusionVariation`.

    Raises:
        BadInputError: As for :class:`medgen.transforms.variation.Variation`.
    """

    def __init__(
        self,
        generator: Generator | str | Path,
        prob: float = 0.1,
        *,
        batch_size: int = 8,
        device: str = "auto",
        **options: Any,
    ) -> None:
        check_prob(prob)
        super().__init__(prob)
        if batch_size < 1:
            raise BadInputError(f"batch_size: expected at least 1, got {batch_size}.")
        self.variation = Variation(generator, device=device, **options)
        self.batch_size = batch_size
        self.last: BatchNoising | None = None

    def randomize(self, data: int) -> None:
        """Draw which samples, how strongly and with which noise, into `last`.

        Args:
            data: Number of samples.
        """
        self.last = self.draw(data)

    def draw(self, count: int) -> BatchNoising:
        """Draw which samples, how strongly and with which noise.

        Args:
            count: Number of samples.

        Returns:
            What was drawn.
        """
        chosen = np.flatnonzero(self.R.rand(count) < self.prob).tolist()
        seeds = tuple(draw_seed(self.R) for _ in range(count))
        return BatchNoising(self.variation.draw_strength(self.R), seeds, tuple(chosen))

    def __call__(
        self,
        img: torch.Tensor,
        label: Any = None,
        text: Sequence[str] | None = None,
        attributes: Sequence[Mapping[str, str]] | None = None,
        *,
        randomize: bool = True,
    ) -> torch.Tensor:
        """Vary some samples of a batch.

        Args:
            img: ``(B, C, H, W[, D])``.
            label: ``(B, 1, H, W[, D])`` class values.
            text: What each shows.
            attributes: Facts about each.
            randomize: Whether to draw anew; False replays `last`.

        Returns:
            A batch as ``img``.

        Raises:
            BadInputError: If it is no batch, or does not fit the model or the draw.
        """
        _check_batch({"img": img}, {"label": label})
        self.last = drawn = self.draw(len(img)) if randomize else self.last
        count = len(img)
        steered = zip(
            [None] * count if label is None else _rows(label),
            [None] * count if text is None else text,
            [{}] * count if attributes is None else attributes,
            strict=True,
        )
        return img if drawn is None else self.apply(drawn, img, list(steered))

    def apply(
        self,
        drawn: BatchNoising,
        img: torch.Tensor,
        steered: Sequence[tuple[Any, str | None, Mapping[str, str]]],
    ) -> torch.Tensor:
        """Vary the samples of a batch that were drawn.

        Args:
            drawn: What was drawn.
            img: ``(B, C, H, W[, D])``.
            steered: Label, text and attributes of each sample.

        Returns:
            A batch as ``img``.

        Raises:
            BadInputError: If it does not fit the model or the draw.
        """
        if len(img) != len(drawn.seeds):
            raise BadInputError(
                f"batch: expected the {len(drawn.seeds)} samples that were drawn for, got {len(img)}. Draw anew."
            )
        images, varied = _rows(img), img.clone()
        for start in range(0, len(drawn.chosen), self.batch_size):
            rows = drawn.chosen[start : start + self.batch_size]
            labels, texts, attributes = zip(*[steered[row] for row in rows], strict=True)
            made = self.variation.make(
                [images[row] for row in rows],
                labels,
                strength=drawn.strength,
                seeds=[drawn.seeds[row] for row in rows],
                texts=texts,
                attributes=attributes,
            )
            for row, image in zip(rows, made, strict=True):
                varied[row] = image
        return varied


class RandDiffusionVariationBatchd(DrawnWithin, MapTransform):
    """Dictionary version of :class:`RandDiffusionVariationBatch`; scans of one sample share strength and noise.

    Args:
        keys: Scans, ``(B, C, H, W[, D])``.
        generator: As for :class:`medgen.transforms.variation.Variation`, like all further options.
        label_key: Label maps, ``(B, 1, H, W[, D])``.
        text_key: Texts, one each.
        attribute_keys: Keys of attributes, one value each, by their names in the model.
        prob: Chance of each sample.
        batch_size: Most samples that go through the networks together.
        allow_missing_keys: Whether a scan may be missing.
        device: As for :class:`medgen.transforms.variation.Variation`, but by default the GPU if there is one.
        **options: As for :class:`RandDiffusionVariation`.

    Raises:
        BadInputError: As for :class:`medgen.transforms.variation.Variation`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        generator: Generator | str | Path,
        label_key: Hashable | None = None,
        *,
        text_key: Hashable | None = None,
        attribute_keys: Mapping[str, Hashable] | None = None,
        prob: float = 0.1,
        batch_size: int = 8,
        allow_missing_keys: bool = False,
        device: str = "auto",
        **options: Any,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        inner = RandDiffusionVariationBatch(generator, prob, batch_size=batch_size, device=device, **options)
        DrawnWithin.__init__(self, inner)
        self.conditions = Conditions(label_key, text_key, attribute_keys)

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> dict[Hashable, Any]:
        """Vary some samples of a batch.

        Args:
            data: The batch.
            randomize: Whether to draw anew; False replays `last`.

        Returns:
            The batch.

        Raises:
            BadInputError: If a key is missing or something does not fit the model.
        """
        done = dict(data)
        self.conditions.check(done)
        scans = {key: done[key] for key in self.key_iterator(done)}
        label_key = self.conditions.label_key
        _check_batch(scans, {} if label_key is None else {label_key: done[label_key]})
        if not scans:
            return done
        count = len(next(iter(scans.values())))
        self.last = drawn = self.inner.draw(count) if randomize else self.last
        if drawn is None:
            return done
        columns = {key: _rows(done[key]) for key in self.conditions.keys}
        steered = [
            self.conditions.read({key: values[row] for key, values in columns.items()}) if row in drawn.chosen else None
            for row in range(count)
        ]
        return done | {key: self.inner.apply(drawn, scan, steered) for key, scan in scans.items()}


def _check_batch(scans: Mapping[Hashable, Any], labels: Mapping[Hashable, Any]) -> None:
    for key, scan in scans.items():
        if not isinstance(scan, torch.Tensor):
            raise BadInputError(
                f"batch: expected a tensor (B, C, H, W[, D]) for {key!r}, got {type(scan).__name__}. "
                "Give what a DataLoader collates."
            )
    counts = {str(key): len(values) for key, values in {**scans, **labels}.items() if values is not None}
    if len(set(counts.values())) > 1:
        raise BadInputError(f"batch: expected as many labels as scans, got {counts}. Collate them together.")


def _rows(values: Any) -> Sequence[Any]:
    # Unbinding gives each sample of a MetaTensor its own affine back.
    return values.unbind(0) if isinstance(values, torch.Tensor) and values.ndim > 1 else values


RandDiffusionVariationD = RandDiffusionVariationDict = RandDiffusionVariationd
RandDiffusionVariationBatchD = RandDiffusionVariationBatchDict = RandDiffusionVariationBatchd
