"""Variations of scans in a training loop: the same label, another appearance."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform

from medgen.generator import Generator
from medgen.transforms.variation import Conditions, Variation, check_prob, draw_seed
from medgen.types import BadInputError


class RandDiffusionVariation(RandomizableTransform):
    """Give a scan another appearance and let its label stay.

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
        self._strength, self._seed = 0.0, 0

    def randomize(self, data: Any = None) -> None:
        """Draw whether, how strongly and with which noise.

        Args:
            data: Unused.
        """
        super().randomize(None)
        if self._do_transform:
            self._strength = self.variation.draw_strength(self.R)
            self._seed = draw_seed(self.R)

    def __call__(
        self,
        img: Any,
        label: Any = None,
        text: str | None = None,
        attributes: Mapping[str, str] | None = None,
        randomize: bool = True,
    ) -> Any:
        """Vary a scan, or not.

        Args:
            img: ``(C, H, W[, D])`` tensor, MetaTensor or array.
            label: ``(1, H, W[, D])`` class values.
            text: What it shows.
            attributes: Facts about it.
            randomize: Whether to draw anew.

        Returns:
            A scan as ``img``.

        Raises:
            BadInputError: If it does not fit the model.
        """
        if randomize:
            self.randomize()
        if not self._do_transform:
            return img
        return self.variation.make(
            [img],
            [label],
            strength=self._strength,
            seeds=[self._seed],
            texts=[text],
            attributes=[attributes or {}],
        )[0]


class RandDiffusionVariationd(RandomizableTransform, MapTransform):
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
        check_prob(prob)
        RandomizableTransform.__init__(self, prob)
        self.conditions = Conditions(label_key, text_key, attribute_keys)
        self.vary = RandDiffusionVariation(generator, prob=1.0, **options)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandDiffusionVariationd:
        """Set the state that all draws come from.

        Args:
            seed: Of a new state.
            state: A state.

        Returns:
            Itself.
        """
        super().set_random_state(seed, state)
        self.vary.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Vary the scans of a sample, or not.

        Args:
            data: The sample.

        Returns:
            The sample.

        Raises:
            BadInputError: If a key is missing or something does not fit the model.
        """
        done = dict(data)
        self.conditions.check(done)
        self.randomize(None)
        if not self._do_transform:
            return done
        self.vary.randomize()
        label, text, attributes = self.conditions.read(done)
        for key in self.key_iterator(done):
            done[key] = self.vary(done[key], label, text, attributes, randomize=False)
        return done


class RandDiffusionVariationBatchd(RandomizableTransform, MapTransform):
    """The same for a batch after collation, on the model's device: each of its samples with its own chance and noise.

    The strength is one draw for the batch, so that its samples go through the networks together. A sample is what it
    would be alone, within rounding.

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
        check_prob(prob)
        RandomizableTransform.__init__(self, prob)
        if batch_size < 1:
            raise BadInputError(f"batch_size: expected at least 1, got {batch_size}.")
        self.conditions = Conditions(label_key, text_key, attribute_keys)
        self.variation = Variation(generator, device=device, **options)
        self.batch_size = batch_size
        self._chosen: list[int] = []
        self._seeds: list[int] = []
        self._strength = 0.0

    def randomize(self, data: Any) -> None:
        """Draw which samples, how strongly and with which noise.

        Args:
            data: Number of samples.
        """
        self._chosen = np.flatnonzero(self.R.rand(data) < self.prob).tolist()
        self._seeds = [draw_seed(self.R) for _ in range(data)]
        self._strength = self.variation.draw_strength(self.R)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Vary some samples of a batch.

        Args:
            data: The batch.

        Returns:
            The batch.

        Raises:
            BadInputError: If a key is missing or something does not fit the model.
        """
        done = dict(data)
        self.conditions.check(done)
        keys = list(self.key_iterator(done))
        for key in keys:
            if not isinstance(done[key], torch.Tensor):
                raise BadInputError(
                    f"batch: expected a tensor (B, C, H, W[, D]) for {key!r}, got {type(done[key]).__name__}. "
                    "Give what a DataLoader collates."
                )
        counts = {str(key): len(done[key]) for key in [*keys, self.conditions.label_key] if key is not None}
        if len(set(counts.values())) > 1:
            raise BadInputError(f"batch: expected as many labels as scans, got {counts}. Collate them together.")
        if not keys:
            return done
        self.randomize(len(done[keys[0]]))
        columns = [key for key in (self.conditions.label_key, self.conditions.text_key) if key is not None]
        columns += list(self.conditions.attribute_keys.values())
        split = {key: _rows(done[key]) for key in columns}
        steered = [self.conditions.read({key: split[key][row] for key in columns}) for row in self._chosen]
        for key in keys:
            images, varied = _rows(done[key]), done[key].clone()
            for start in range(0, len(self._chosen), self.batch_size):
                rows = self._chosen[start : start + self.batch_size]
                labels, texts, attributes = zip(*steered[start : start + self.batch_size], strict=True)
                made = self.variation.make(
                    [images[row] for row in rows],
                    labels,
                    strength=self._strength,
                    seeds=[self._seeds[row] for row in rows],
                    texts=texts,
                    attributes=attributes,
                )
                for row, image in zip(rows, made, strict=True):
                    varied[row] = image
            done[key] = varied
        return done


def _rows(values: Any) -> Sequence[Any]:
    # Unbinding gives each sample of a MetaTensor its own affine back.
    return values.unbind(0) if isinstance(values, torch.Tensor) and values.ndim > 1 else values


RandDiffusionVariationD = RandDiffusionVariationDict = RandDiffusionVariationd
