"""Generative views of one scan on its own voxels: how it lies on the model's grid, and where views may differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from medgen.data.geometry import from_model
from medgen.generator import Generator
from medgen.generator.familiarity import deep_features
from medgen.generator.scans import affine_of, grid_of, read_image
from medgen.precision import is_out_of_memory
from medgen.synthesis.editing import steered_scan
from medgen.synthesis.steering import batch_condition
from medgen.test_time.attention import attended_region
from medgen.test_time.masks import MaskKind, random_blocks, uncertain_region
from medgen.test_time.null_text import NullTextViews
from medgen.test_time.slices import SliceViews
from medgen.test_time.views import GenerativeViews, ViewSettings
from medgen.types import BadInputError, Grid


@dataclass(frozen=True)
class Making:
    """How views of any scan are made; the options are those of :class:`medgen.test_time.GenerativeTTA`.

    Attributes:
        generator: The model, on its device.
        settings: Of each view.
        mask: Where views may differ.
        published: Whether by the published method.
        condition_on_prediction: Whether the prediction for the scan steers the model.
        window: Latent voxels per axis of the windows of the denoiser.
        slice_axis: Along which a volume is cut for a 2D model.
        scaled_window: What the ends of the model's intensity window have become in the scans.
        seed: Of noise and blocks.
    """

    generator: Generator
    settings: ViewSettings
    mask: MaskKind
    published: bool
    condition_on_prediction: bool
    window: tuple[int, ...] | None
    slice_axis: int
    scaled_window: tuple[float, float] | None
    seed: int


class ScanViews:
    """Makes generative views of one scan.

    Args:
        making: How.
        image: ``(C, H, W[, D])`` as the user gave it, with its affine if it has one.
        first: ``(K, H, W[, D])``, what the segmenter says of the scan.
        mask: ``(H, W[, D])`` bool, where views may differ, in place of the kind that was chosen.
        text: What the scan shows.
        attributes: Facts about it.

    Raises:
        BadInputError: If the scan or the prediction does not fit the model.
        MemoryError: If the scan is too large for its networks.
    """

    def __init__(
        self,
        making: Making,
        image: Any,
        *,
        first: torch.Tensor,
        mask: torch.Tensor | None = None,
        text: str | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        self.making, self.first, self.given = making, first, mask
        self._read_features = 0
        generator, config = making.generator, making.generator.config
        scan = read_image(image, config, making.scaled_window).float()
        channels = len(config.channel_names)
        if len(scan) != channels:
            raise BadInputError(
                f"image: expected the {channels} channel(s) of the generator '{config.name}' "
                f"({', '.join(config.channel_names.values())}), got {len(scan)}. Choose another generator."
            )
        # One normalization for all slices of a volume, so that they go together.
        intensity = config.normalization.fit(scan)
        shown = _prediction_as_label(generator, first) if making.condition_on_prediction else None

        def build(part: torch.Tensor, grid: Grid, label: torch.Tensor | None) -> GenerativeViews:
            item = steered_scan(generator, grid, label, text=text, facts=attributes)
            kind = NullTextViews if making.published else GenerativeViews
            condition = batch_condition(generator, [item])
            options: dict[str, Any] = {"seed": making.seed, "window": making.window}
            return kind(generator, part, item.placement, intensity, condition, making.settings, **options)

        with _memory():
            if config.spatial_dims == scan.ndim - 1:
                whole = build(scan, grid_of(image, config), shown)
                self.maker: GenerativeViews | SliceViews = whole
                self._looked = [whole]
            else:
                axis = making.slice_axis % 3
                grid = _slice_grid(image, config.spacing, axis)
                labels = [None] * scan.shape[axis + 1] if shown is None else shown.unbind(axis)
                parts = [build(part, grid, label) for part, label in zip(scan.unbind(axis + 1), labels, strict=True)]
                self.maker = SliceViews(parts, axis)
                self._looked = parts[len(parts) // 4 :: max(1, len(parts) // 4)][:3]

    @property
    def evaluations(self) -> int:
        """Rows that the denoiser has seen."""
        return self._read_features + self.maker.evaluations

    def familiarity(self) -> float | None:
        """Score of the scan by what the model knows, about 1 for known ones; takes one row of the denoiser, or three.

        Returns:
            The score; None if the model has not learned what it knows.
        """
        known = self.making.generator.config.familiarity
        if known is None:
            return None
        self._read_features = len(self._looked)
        with _memory():
            features = [deep_features(self.making.generator, part.scan[None]) for part in self._looked]
        return float(np.median([known.score(found) for found in features]))

    def cost(self) -> tuple[int, int]:
        """Denoiser rows up to the first view, with those so far, and for each view.

        Returns:
            Both numbers.
        """
        before, each = self.maker.cost()
        return self._read_features + int(self.given is None and self._attends()) + before, each

    def make(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """Some of the views, side by side in the networks.

        Args:
            numbers: Which, from 1.

        Returns:
            ``(C, H, W[, D])`` float32 each: what has to be added to the scan, in the user's units.
        """
        with _memory():
            masks = [self._mask(number) for number in numbers]
            return [made * self._unit() for made in self.maker.make(numbers, masks)]

    def _attends(self) -> bool:
        """Whether the words decide where views may differ, which takes a row of the denoiser."""
        told = isinstance(self.maker, GenerativeViews) and "text" in self.maker.condition.parts
        return self.making.mask == "attention" or (self.making.mask == "hybrid" and told)

    def _mask(self, number: int) -> torch.Tensor | None:
        """Where a view may differ; None is everywhere."""
        if self.given is not None or self.making.mask == "everywhere":
            return self.given
        region = None if self.making.mask == "blocks" else self._region
        if self.making.mask not in ("blocks", "hybrid"):
            return region
        blocks = random_blocks(self.first.shape[1:], seed=self.making.seed, number=number)
        return blocks if region is None else blocks & region

    @cached_property
    def _region(self) -> torch.Tensor:
        """Where any view may differ, but for the blocks."""
        if self._attends():
            if not isinstance(self.maker, GenerativeViews):
                raise BadInputError(
                    "mask: expected another than 'attention' for slices of a volume. Take 'uncertainty'."
                )
            return from_model(attended_region(self.maker), self.maker.placement, mode="nearest")
        return uncertain_region(-torch.xlogy(self.first, self.first).sum(dim=0), len(self.first))

    def _unit(self) -> float:
        """The unit of the model's window in that of the scan."""
        if self.making.scaled_window is None:
            return 1.0
        low, high = self.making.scaled_window
        window = self.making.generator.config.normalization
        return (high - low) / (window.high - window.low)


def _prediction_as_label(generator: Generator, first: torch.Tensor) -> torch.Tensor:
    if len(first) != generator.num_classes:
        raise BadInputError(
            f"condition_on_prediction: expected a segmenter of the {generator.num_classes} classes of the generator "
            f"'{generator.config.name}', got {len(first)}. Leave it out."
        )
    return generator.index_to_label(first.argmax(dim=0))


@contextmanager
def _memory() -> Iterator[None]:
    """Says what to do where the generator finds too little memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            "generator: expected memory for this scan, got too little. Lower view_batch, and give window and "
            "max_memory_gb; or give crops."
        ) from error


def _slice_grid(image: Any, spacing: Sequence[float] | None, axis: int) -> Grid:
    """Grid of the slices of a volume."""
    others = [other for other in range(3) if other != axis]
    shape, affine = tuple(image.shape[1:]), affine_of(image)
    own = np.eye(4)
    if affine is not None:
        own[:3, :3], own[:3, 3] = affine[:3, [*others, axis]], affine[:3, 3]
    elif spacing is not None:
        own[:2, :2] = np.diag(spacing)
    known = affine is not None or spacing is not None
    return Grid(tuple(shape[other] for other in others), own, known=known)
