"""Composites of real and synthetic scans of one label, cell by cell.

References:
    Zhang et al. 2024, arXiv:2310.12868 (DiffBoost: cells of 64 of 384 pixels, 60 % of them real; its released code, the
    only place where the two numbers stand, mixes the predictions for the two scans, not the scans).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform
from monai.utils import convert_to_dst_type, convert_to_tensor

from medgen.generator import Generator
from medgen.transforms.scans import check_place
from medgen.transforms.variation import Conditions, Variation, check_prob, draw_seed
from medgen.types import BadInputError, Shape

CELL_SIZE, REAL_SHARE = 64, 0.6


class RandDiffusionComposit(RandomizableTransform):
    """Cut a scan into cells, each of them real or from a synthetic scan of the same label, which therefore stays.

    DiffBoost (Zhang et al. 2024) trains a segmenter on such cells: 64 pixels of 384 along an edge, each real with a
    chance of 0.6. There the predictions for a real scan and for its synthetic partner are put together before the loss;
    a transform sees no predictions, so here the scans are. Their seams show in the scan where the two differ: a partner
    of low `strength` has weak ones, and the cells begin at another voxel each time, so that seams have no fixed place.

    Args:
        generator: Makes the partner, as for :class:`medgen.transforms.variation.Variation`; None where one is
            given with each scan.
        prob: Chance that a scan is mixed.
        cell_size: Edge of a cell in voxels, of all axes or of each; about a sixth of the scan is as published.
        real_share: Chance in [0, 1] of a cell to be real.
        **options: Of the generator: ``strength``, ``num_inference_steps`` and so on.

    Raises:
        BadInputError: If a number is out of range or there is no such model.
    """

    def __init__(
        self,
        generator: Generator | str | Path | None = None,
        prob: float = 0.1,
        *,
        cell_size: int | Sequence[int] = CELL_SIZE,
        real_share: float = REAL_SHARE,
        **options: Any,
    ) -> None:
        check_prob(prob)
        super().__init__(prob)
        sizes = tuple(cell_size) if isinstance(cell_size, Sequence) else (cell_size,)
        if not sizes or min(sizes) < 1:
            raise BadInputError(f"cell_size: expected at least 1 voxel, got {cell_size}.")
        if not 0 <= real_share <= 1:
            raise BadInputError(f"real_share: expected a share in [0, 1], got {real_share}.")
        if generator is None and options:
            raise BadInputError(f"{', '.join(options)}: expected none without a generator, got some. Leave them out.")
        self.cell_size, self.real_share = sizes, real_share
        self.variation = None if generator is None else Variation(generator, **options)
        self._real = torch.ones(0, dtype=torch.bool)
        self._strength, self._seed = 1.0, 0

    def randomize(self, data: Shape) -> None:
        """Draw whether, which cells are real, and the noise of the partner.

        Args:
            data: ``(H, W[, D])`` voxels of the scan.
        """
        super().randomize(None)
        if not self._do_transform:
            return
        self._real = self._draw_cells(data)
        if self.variation is not None:
            self._strength, self._seed = self.variation.draw_strength(self.R), draw_seed(self.R)

    def __call__(
        self,
        img: Any,
        label: Any = None,
        synthetic: Any = None,
        text: str | None = None,
        attributes: Mapping[str, str] | None = None,
        randomize: bool = True,
    ) -> Any:
        """Mix a scan, or not.

        Args:
            img: ``(C, H, W[, D])`` tensor, MetaTensor or array.
            label: ``(1, H, W[, D])`` class values, for the generator.
            synthetic: The partner, as ``img``, of the same label, in the same units; for use without a generator.
            text: What the scan shows, for the generator.
            attributes: Facts about it, for the generator.
            randomize: Whether to draw anew.

        Returns:
            A scan as ``img``; real cells are bit-identical to it.

        Raises:
            BadInputError: If there is no partner or it does not fit.
        """
        if (synthetic is None) == (self.variation is None):
            got = "neither" if synthetic is None else "both"
            raise BadInputError(
                f"synthetic: expected a scan or a generator that makes it, got {got}. Give one of them."
            )
        if synthetic is not None:
            _check_partner(img, synthetic)
        if randomize:
            self.randomize(tuple(img.shape[1:]))
        if not self._do_transform or self._real.all():
            return img
        if self.variation is not None:
            synthetic = self.variation.make(
                [img],
                [label],
                strength=self._strength,
                seeds=[self._seed],
                texts=[text],
                attributes=[attributes or {}],
            )[0]
        real = convert_to_tensor(img, track_meta=False)
        made = convert_to_tensor(synthetic, track_meta=False).to(real)
        return convert_to_dst_type(torch.where(self._real.to(real.device), real, made), img)[0]

    def _draw_cells(self, shape: Shape) -> torch.Tensor:
        """``(H, W[, D])`` bool, where the scan stays real."""
        sizes = self.cell_size if len(self.cell_size) > 1 else self.cell_size * len(shape)
        if len(sizes) != len(shape):
            raise BadInputError(
                f"cell_size: expected one number, or one per axis of a {len(shape)}D scan, got {sizes}."
            )
        if all(size >= voxels for size, voxels in zip(sizes, shape, strict=True)):
            raise BadInputError(
                f"cell_size: expected cells smaller than the scan of {shape} voxels, got {sizes}. As published, about "
                "a sixth of an axis."
            )
        cells = [(np.arange(voxels) + self.R.randint(size)) // size for voxels, size in zip(shape, sizes, strict=True)]
        real = self.R.rand(*(axis[-1] + 1 for axis in cells)) < self.real_share
        return torch.from_numpy(real[np.ix_(*cells)])


class RandDiffusionCompositd(RandomizableTransform, MapTransform):
    """Dictionary version of :class:`RandDiffusionComposit`; scans of one sample share cells, strength and noise.

    Args:
        keys: Scans.
        generator: Makes the partners; None where the sample holds them.
        label_key: Label map of the sample, which stays; for a generator that label maps steer.
        synthetic_key: Partners, one for each of `keys`, after the same transforms; for use without a generator.
        text_key: Text, for a generator that texts steer.
        attribute_keys: Keys of attributes, by their names in the model.
        prob: Chance that a sample is mixed.
        cell_size: As for :class:`RandDiffusionComposit`.
        real_share: Likewise.
        allow_missing_keys: Whether a scan may be missing; a label or a partner of a scan may not.
        **options: As for :class:`RandDiffusionComposit`.

    Raises:
        BadInputError: As for :class:`RandDiffusionComposit`, or if there is both a generator and a key, or neither.
    """

    def __init__(
        self,
        keys: KeysCollection,
        generator: Generator | str | Path | None = None,
        label_key: Hashable | None = None,
        *,
        synthetic_key: KeysCollection | None = None,
        text_key: Hashable | None = None,
        attribute_keys: Mapping[str, Hashable] | None = None,
        prob: float = 0.1,
        cell_size: int | Sequence[int] = CELL_SIZE,
        real_share: float = REAL_SHARE,
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        check_prob(prob)
        RandomizableTransform.__init__(self, prob)
        if (generator is None) == (synthetic_key is None):
            got = "neither" if generator is None else "both"
            raise BadInputError(f"synthetic_key: expected a key or a generator, got {got}. Give one of them.")
        partners = () if synthetic_key is None else _as_keys(synthetic_key)
        if partners and len(partners) != len(self.keys):
            raise BadInputError(f"synthetic_key: expected one for each of {self.keys}, got {partners}.")
        self.partners = dict(zip(self.keys, partners, strict=True)) if partners else {}
        self.conditions = Conditions(label_key, text_key, attribute_keys)
        self.mix = RandDiffusionComposit(generator, prob=1.0, cell_size=cell_size, real_share=real_share, **options)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandDiffusionCompositd:
        """Set the state that all draws come from.

        Args:
            seed: Of a new state.
            state: A state.

        Returns:
            Itself.
        """
        super().set_random_state(seed, state)
        self.mix.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Mix the scans of a sample, or not.

        Args:
            data: The sample.

        Returns:
            The sample.

        Raises:
            BadInputError: If a key is missing or something does not fit.
        """
        done = dict(data)
        self.conditions.check(done)
        present = list(self.key_iterator(done))
        for key in present:
            if self.partners and self.partners[key] not in done:
                raise BadInputError(
                    f"synthetic_key: expected {self.partners[key]!r} in the sample, got {sorted(map(str, done))}. Add "
                    "the synthetic scan of the same label, or give a generator."
                )
        self.randomize(None)
        if not self._do_transform or not present:
            return done
        self.mix.randomize(tuple(done[present[0]].shape[1:]))
        label, text, attributes = self.conditions.read(done)
        for key in present:
            partner = done[self.partners[key]] if self.partners else None
            done[key] = self.mix(done[key], label, partner, text, attributes, randomize=False)
        return done


def _as_keys(keys: KeysCollection) -> tuple[Hashable, ...]:
    return tuple(keys) if isinstance(keys, (list, tuple)) else (keys,)


def _check_partner(img: Any, synthetic: Any) -> None:
    if tuple(synthetic.shape) != tuple(img.shape):
        raise BadInputError(
            f"synthetic: expected the shape of the scan {tuple(img.shape)}, got {tuple(synthetic.shape)}. Give the "
            "synthetic scan of the same label, after the same transforms."
        )
    check_place(img, synthetic, "synthetic")


RandDiffusionCompositD = RandDiffusionCompositDict = RandDiffusionCompositd
