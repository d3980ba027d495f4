"""Composites of real and synthetic scans of one label, cell by cell.

References:
    Zhang et al. 2024, arXiv:2310.12868 (DiffBoost: cells of 64 of 384 pixels, 60 % of them real; its released code, the
    only place where the two numbers stand, mixes the predictions for the two scans, not the scans).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms.transform import MapTransform
from monai.utils import convert_to_tensor

from medgen.generator import Generator
from medgen.generator.scans import cast_like, check_place
from medgen.transforms.subjects import close_sample, open_sample
from medgen.transforms.variation import Conditions, Noising, Variation, check_prob
from medgen.transforms.workers import DrawnWithin, SeededInWorkers
from medgen.types import BadInputError, Shape

CELL_SIZE, REAL_SHARE = 64, 0.6


@dataclass(frozen=True, eq=False)
class Cells:
    """What a composite draws.

    Attributes:
        real: ``(H, W[, D])`` bool, where the scan stays real.
        noising: Of the partner, where a generator makes it.
    """

    real: torch.Tensor
    noising: Noising | None


class RandDiffusionComposit(SeededInWorkers):
    """Cut a scan into cells, each of them real or from a synthetic scan of the same label, which therefore stays.

    DiffBoost (Zhang et al. 2024) trains a segmenter on such cells: 64 pixels of 384 along an edge, each real with a
    chance of 0.6. There the predictions for a real scan and for its synthetic partner are put together before the loss;
    a transform sees no predictions, so here the scans are. Their seams show in the scan where the two differ: a partner
    of low `strength` has weak ones, and the cells begin at another voxel each time, so that seams have no fixed place.

    Its `last` holds the :class:`Cells` of the last call, or None where the scan stayed.

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
        self.last: Cells | None = None

    def randomize(self, data: Shape) -> None:
        """Draw whether, which cells are real, and the noise of the partner, into `last`.

        Args:
            data: ``(H, W[, D])`` voxels of the scan.
        """
        self.last = self.draw(data)

    def draw(self, shape: Shape) -> Cells | None:
        """Draw whether, which cells are real, and the noise of the partner.

        Args:
            shape: ``(H, W[, D])`` voxels of the scan.

        Returns:
            What was drawn; None to leave the scan.

        Raises:
            BadInputError: If the cells do not fit the scan.
        """
        if self.R.rand() >= self.prob:
            return None
        real = self._draw_cells(shape)
        return Cells(real, None if self.variation is None else self.variation.draw(self.R))

    def __call__(
        self,
        img: Any,
        label: Any = None,
        synthetic: Any = None,
        text: str | None = None,
        attributes: Mapping[str, str] | None = None,
        *,
        randomize: bool = True,
    ) -> Any:
        """Mix a scan, or not.

        Args:
            img: ``(C, H, W[, D])`` tensor, MetaTensor or array.
            label: ``(1, H, W[, D])`` class values, for the generator.
            synthetic: The partner, as ``img``, of the same label, in the same units; for use without a generator.
            text: What the scan shows, for the generator.
            attributes: Facts about it, for the generator.
            randomize: Whether to draw anew; False replays `last`.

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
        self.last = drawn = self.draw(tuple(img.shape[1:])) if randomize else self.last
        return img if drawn is None else self.apply(drawn, img, label, synthetic, text, attributes)

    def apply(
        self,
        drawn: Cells,
        img: Any,
        label: Any = None,
        synthetic: Any = None,
        text: str | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> Any:
        """Mix a scan as was drawn.

        Args:
            drawn: What was drawn.
            img: As for a call, like all others.
            label: Its label.
            synthetic: Its partner.
            text: What it shows.
            attributes: Facts about it.

        Returns:
            A scan as ``img``.

        Raises:
            BadInputError: If the scan does not fit the draw, or the model.
        """
        if tuple(drawn.real.shape) != tuple(img.shape[1:]):
            raise BadInputError(
                f"image: expected the {tuple(drawn.real.shape)} voxels that the cells were drawn for, got "
                f"{tuple(img.shape[1:])}. Bring all scans of a sample to the same voxels."
            )
        if drawn.real.all():
            return img
        if self.variation is not None and drawn.noising is not None:
            synthetic = self.variation.make_one(img, label, drawn.noising, text, attributes)
        real, made = (convert_to_tensor(part, track_meta=False) for part in (img, synthetic))
        made = convert_to_tensor(cast_like(made, img), track_meta=False)
        return cast_like(torch.where(drawn.real.to(real.device), real, made), img)

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


class RandDiffusionCompositd(DrawnWithin, MapTransform):
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
        if (generator is None) == (synthetic_key is None):
            got = "neither" if generator is None else "both"
            raise BadInputError(f"synthetic_key: expected a key or a generator, got {got}. Give one of them.")
        partners = () if synthetic_key is None else _as_keys(synthetic_key)
        if partners and len(partners) != len(self.keys):
            raise BadInputError(f"synthetic_key: expected one for each of {self.keys}, got {partners}.")
        self.partners = dict(zip(self.keys, partners, strict=True)) if partners else {}
        self.conditions = Conditions(label_key, text_key, attribute_keys)
        inner = RandDiffusionComposit(generator, prob, cell_size=cell_size, real_share=real_share, **options)
        DrawnWithin.__init__(self, inner)

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> Any:
        """Mix the scans of a sample, or not.

        Args:
            data: The sample: a dictionary, or a ``Subject`` of TorchIO.
            randomize: Whether to draw anew; False replays `last`.

        Returns:
            A new one of the same kind.

        Raises:
            BadInputError: If a key is missing or something does not fit.
        """
        done = open_sample(data, (*self.keys, *self.partners.values(), self.conditions.label_key))
        self.conditions.check(done)
        present = list(self.key_iterator(done))
        for key in present:
            if self.partners and self.partners[key] not in done:
                raise BadInputError(
                    f"synthetic_key: expected {self.partners[key]!r} in the sample, got {sorted(map(str, done))}. Add "
                    "the synthetic scan of the same label, or give a generator."
                )
        for key, partner in self.partners.items():
            if key in present:
                _check_partner(done[key], done[partner])
        if not present:
            return close_sample(done, data)
        drawn = self.inner.draw(tuple(done[present[0]].shape[1:])) if randomize else self.last
        self.last = drawn
        if drawn is not None:
            label, text, attributes = self.conditions.read(done)
            for key in present:
                partner = done[self.partners[key]] if self.partners else None
                done[key] = self.inner.apply(drawn, done[key], label, partner, text, attributes)
        return close_sample(done, data)


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
