"""How variations of scans are made: the same label, another appearance, by noising a scan in part.

References:
    Meng et al. 2022, arXiv:2108.01073 (SDEdit). Zhang et al. 2024, arXiv:2310.12868 (DiffBoost).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgen.conditions.edge import extract_edges
from medgen.data.geometry import from_model, to_model, valid_mask
from medgen.generator import Generator
from medgen.generator.scans import check_place, give_back, grid_of, read_image, read_label
from medgen.precision import Precision, resolve_precision
from medgen.synthesis import SamplingSettings, translate_batch
from medgen.synthesis.inpainting import check_strength
from medgen.synthesis.labels import place_on_model
from medgen.transforms.model_reference import ModelReference
from medgen.types import BadInputError, Grid

# Seen on scans of the heart and the hippocampus: below, little changes but what the autoencoder loses; above, what no
# label holds (vessels, trabeculae, neighboring organs) is redrawn or lost. The borders of the labels stay in between.
STRENGTH = (0.3, 0.6)
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Noising:
    """What a variation draws.

    Attributes:
        strength: Share in (0, 1] of the noise process.
        seed: Of the noise.
    """

    strength: float
    seed: int


class Variation:
    """How variations are made; the numbers are drawn by the transforms.

    The scan goes to the model's grid and intensities and back, by its own affine and its own normalization, as
    :func:`medgen.synthesis.translate` does. A model that normalizes each scan by percentiles or its z-score makes the
    same of a scan in any units; one with a fixed window needs its units, or `scaled_window`. What lies beyond the
    model's range (the highest and lowest 0.5 % by default) is clipped.

    A scan without an affine is taken to lie on the model's grid (:func:`medgen.generator.scans.grid_of`). The model
    knows whole scans as medgen reads them: put the transform before crops and flips, and read pictures rows first
    (``LoadImaged(..., reader="PILReader", reverse_indexing=False)``).

    Args:
        generator: A Generator; or folder, embedded name or Hub id of one, which is loaded once in each process.
        strength: Share in (0, 1] of the noise process that is run, or the two ends that it is drawn between.
        num_inference_steps: Network steps, all within that share.
        guidance_scale: w of classifier-free guidance; None is the model's own.
        precision: ``fp32``, ``bf16``, or ``auto`` for what is fast on the device.
        use_edges: Whether a model that edges steer gets those of the scan.
        scaled_window: For a model with a fixed intensity window: what its two ends have become in the scans.
        device: Where a named model is loaded; workers of a DataLoader need the CPU.

    Raises:
        BadInputError: If a number is out of range or there is no such model.
    """

    def __init__(
        self,
        generator: Generator | str | Path,
        *,
        strength: float | tuple[float, float] = STRENGTH,
        num_inference_steps: int = 10,
        guidance_scale: float | Mapping[str, float] | None = None,
        precision: Precision = "auto",
        use_edges: bool = True,
        scaled_window: tuple[float, float] | None = None,
        device: str = "cpu",
    ) -> None:
        ends = tuple(strength) if isinstance(strength, Sequence) else (strength, strength)
        for end in ends:
            check_strength(end)
        if len(ends) != 2 or ends[0] > ends[1]:
            raise BadInputError(f"strength: expected a share or two that rise, got {strength}. Give (low, high).")
        if scaled_window is not None and not scaled_window[0] < scaled_window[1]:
            raise BadInputError(f"scaled_window: expected two rising numbers, got {scaled_window}.")
        if num_inference_steps < 1:
            raise BadInputError(f"num_inference_steps: expected at least 1, got {num_inference_steps}.")
        self.model = ModelReference(generator, device=device)
        self.strength = ends
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.precision = precision
        self.use_edges = use_edges
        self.scaled_window = scaled_window

    def settings(self, generator: Generator) -> SamplingSettings:
        """How to sample.

        Args:
            generator: The model.

        Returns:
            The settings.
        """
        return SamplingSettings(
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            precision=resolve_precision(self.precision, generator.device),
        )

    def draw_strength(self, state: np.random.RandomState) -> float:
        """A strength.

        Args:
            state: Of the transform.

        Returns:
            A share, even between the two ends.
        """
        return float(state.uniform(*self.strength))

    def draw(self, state: np.random.RandomState) -> Noising:
        """What one scan needs.

        Args:
            state: Of the transform.

        Returns:
            A strength and a seed.
        """
        return Noising(self.draw_strength(state), draw_seed(state))

    def make_one(
        self, image: Any, label: Any, drawn: Noising, text: str | None, attributes: Mapping[str, str] | None
    ) -> Any:
        """Make a variation.

        Args:
            image: As for :meth:`make`, like all others.
            label: Its label.
            drawn: Strength and seed.
            text: What it shows.
            attributes: Facts about it.

        Returns:
            The variation.

        Raises:
            BadInputError: If something does not fit the model.
        """
        made = self.make(
            [image], [label], strength=drawn.strength, seeds=[drawn.seed], texts=[text], attributes=[attributes or {}]
        )
        return made[0]

    def make(
        self,
        images: Sequence[Any],
        labels: Sequence[Any],
        *,
        strength: float,
        seeds: Sequence[int],
        texts: Sequence[str | None] | None = None,
        attributes: Sequence[Mapping[str, str]] | None = None,
    ) -> list[Any]:
        """Make variations, side by side in the networks.

        Args:
            images: ``(C, H, W[, D])`` each, in any units that the model's normalization takes.
            labels: ``(1, H, W[, D])`` class values each; None for a model that label maps do not steer.
            strength: Share in (0, 1] of the noise process.
            seeds: Seed of each.
            texts: What each shows, in words.
            attributes: Facts about each.

        Returns:
            The variations, each of the kind, type, units and geometry of its scan.

        Raises:
            BadInputError: If a scan, its label, text or facts do not fit the model.
        """
        with self.model.use() as generator:
            config = generator.config
            grids = [grid_of(image, config) for image in images]
            scans = [read_image(image, config, self.scaled_window) for image in images]
            maps = [_steering_label(label, image, generator) for label, image in zip(labels, images, strict=True)]
            edges = None
            if self.use_edges and "edge" in generator.conditions:
                edges = [_own_edges(scan, grid, generator) for scan, grid in zip(scans, grids, strict=True)]
            made = translate_batch(
                generator,
                scans,
                maps,
                grids=grids,
                strength=strength,
                seeds=seeds,
                texts=texts,
                facts=attributes,
                edges=edges,
                settings=self.settings(generator),
            )
            return [
                give_back(edited.image, image, config, self.scaled_window)
                for edited, image in zip(made, images, strict=True)
            ]


class Conditions:
    """Where a dictionary holds what steers the model.

    Args:
        label_key: Label map; None for a model that label maps do not steer.
        text_key: Text; None for none.
        attribute_keys: Key of each attribute of the model that is given.
    """

    def __init__(
        self,
        label_key: Hashable | None,
        text_key: Hashable | None = None,
        attribute_keys: Mapping[str, Hashable] | None = None,
    ) -> None:
        self.label_key = label_key
        self.text_key = text_key
        self.attribute_keys = dict(attribute_keys or {})

    @property
    def keys(self) -> list[Hashable]:
        """All keys that are read."""
        named = [self.label_key, self.text_key, *self.attribute_keys.values()]
        return [key for key in named if key is not None]

    def check(self, data: Mapping[Hashable, Any]) -> None:
        """Refuse a sample that lacks one.

        Args:
            data: The sample, or a batch.

        Raises:
            BadInputError: If a key is not there.
        """
        named = {"label_key": self.label_key, "text_key": self.text_key}
        named |= {f"attribute_keys['{name}']": key for name, key in self.attribute_keys.items()}
        for name, key in named.items():
            if key is not None and key not in data:
                raise BadInputError(f"{name}: expected {key!r} in the sample, got {sorted(map(str, data))}. Add it.")

    def read(self, data: Mapping[Hashable, Any]) -> tuple[Any, str | None, dict[str, str]]:
        """What steers a sample.

        Args:
            data: The sample.

        Returns:
            Label, text and attributes.
        """
        label = None if self.label_key is None else data[self.label_key]
        text = None if self.text_key is None else str(data[self.text_key])
        values = {name: data[key] for name, key in self.attribute_keys.items()}
        # Collation makes tensors of numbers.
        facts = {name: str(value.item() if hasattr(value, "item") else value) for name, value in values.items()}
        return label, text, facts


def draw_seed(state: np.random.RandomState) -> int:
    """A seed for the noise of a sample.

    Args:
        state: Of the transform.

    Returns:
        A number in ``[0, 2**32 - 1)``.
    """
    return int(state.randint(MAX_SEED, dtype="uint32"))


def check_prob(prob: float) -> None:
    """Refuse a chance that is none.

    Args:
        prob: The chance.

    Raises:
        BadInputError: If it is not in [0, 1].
    """
    if not 0 <= prob <= 1:
        raise BadInputError(f"prob: expected a chance in [0, 1], got {prob}.")


def _steering_label(label: Any, image: Any, generator: Generator) -> torch.Tensor | None:
    if label is not None:
        values = read_label(label, tuple(image.shape[1:]))
        check_place(image, label, "label")
        return values
    if "mask" in generator.conditions:
        raise BadInputError(
            f"label: expected the label map of the scan, because label maps steer the model '{generator.config.name}' "
            "and the variation has to follow it, got none. Give label_key."
        )
    return None


def _own_edges(scan: torch.Tensor, grid: Grid, generator: Generator) -> torch.Tensor:
    """Edges of a scan on its own grid, extracted on the model's as those of the training scans were."""
    config = generator.config
    if config.edge is None:
        raise BadInputError(
            f"model '{config.name}': expected one that says how its edges are extracted, got one that does not. "
            "Set use_edges to False."
        )
    placement = place_on_model(grid, generator)
    normalized = config.normalization.fit(scan.float()).forward(scan)
    on_model = to_model(normalized, placement, mode="linear", padding="reflect")
    spacing = placement.grid.spacing if grid.known else None
    edge = extract_edges(on_model, config.edge, valid=valid_mask(placement), spacing=spacing)
    return from_model(edge, placement, mode="linear").clamp_(0, 1)
