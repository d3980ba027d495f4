"""From a plan to labelled scans, batch by batch and lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medgen.conditions.condition import Condition
from medgen.data.geometry import from_model
from medgen.diffusion.sampler import sample
from medgen.generator import Generator
from medgen.precision import autocast, exact_fp32, is_out_of_memory, memory_format
from medgen.seeding import derive_seed, seeded_noise
from medgen.synthesis.labels import LabelledGrid, generate_labels, prepare
from medgen.synthesis.plan import SampleSpec, SamplingSettings
from medgen.synthesis.steering import batch_condition, check_steering, control_uses, guide, seek_minority
from medgen.types import BadInputError, Grid


@dataclass(frozen=True, eq=False)
class SyntheticSample:
    """A labelled scan and how it came about.

    Attributes:
        image: ``(C, H, W[, D])`` float32 in source units, rounded to what the model's file type holds; of a sample that
            is made from a scan, in the units and of the type of that.
        label: ``(H, W[, D])`` int16 label values; None where it was made without.
        grid: Grid of both: that of the source scan, of the label file or of the edges, or of a training scan.
        spec: What was planned.
        label_record: How the label arose.
        conditions: What steered it besides the label map, as JSON values.
        network_evaluations: Passes of the denoiser.
        model_shape: Voxels of the padded grid that the networks saw.
        batch: Samples that went through the networks together, this one included.
    """

    image: torch.Tensor
    label: torch.Tensor | None
    grid: Grid
    spec: SampleSpec
    label_record: dict[str, Any]
    conditions: dict[str, Any]
    network_evaluations: int
    model_shape: tuple[int, ...]
    batch: tuple[SampleSpec, ...]


def iter_samples(
    generator: Generator,
    specs: Sequence[SampleSpec],
    settings: SamplingSettings | None = None,
    *,
    batch_size: int = 4,
    on_step: Callable[[int], object] | None = None,
) -> Iterator[SyntheticSample]:
    """Make the samples of a plan one batch at a time, as they are asked for.

    Args:
        generator: The model, on its device.
        specs: The plan, for example from :func:`medgen.synthesis.plan_samples`.
        settings: How to sample.
        batch_size: Most samples that go through the networks together.
        on_step: Called with the number of finished network steps of the current batch.

    Yields:
        Labelled scans in the order of the plan.

    Raises:
        BadInputError: If a label, a text or another condition cannot be used or the settings do not go together.
    """
    if batch_size < 1:
        raise BadInputError(f"batch_size: expected at least 1, got {batch_size}.")
    check_steering(generator, specs)
    for start in range(0, len(specs), batch_size):
        batch = [prepare(spec, generator) for spec in specs[start : start + batch_size]]
        yield from sample_batch(generator, batch, settings or SamplingSettings(), on_step=on_step)


def sample_batch(
    generator: Generator,
    batch: Iterable[LabelledGrid],
    settings: SamplingSettings,
    *,
    on_step: Callable[[int], object] | None = None,
    on_reject: Callable[[SampleSpec, BadInputError], object] | None = None,
    edits_together: bool = False,
) -> list[SyntheticSample]:
    """Make the scans of one batch: those that share a model grid and kinds of conditions run together, edits alone.

    Args:
        generator: The model, on its device.
        batch: Samples of :func:`medgen.synthesis.labels.prepare`.
        settings: How to sample.
        on_step: Called with the number of finished network steps.
        on_reject: Called with a sample for which no acceptable label is drawn, and the reason; None raises it.
        edits_together: Whether edits of one strength run together too: faster on a GPU, and equal to the same edits
            alone within rounding only.

    Returns:
        Labelled scans in the order of the batch, without those rejected.

    Raises:
        BadInputError: If the settings do not go together or no acceptable label is drawn.
        MemoryError: If the batch does not fit; the message says which setting to lower.
    """
    groups: dict[Any, list[LabelledGrid]] = {}
    for item in batch:
        kinds = frozenset({*item.facts, *item.spec.conditions, *([] if item.edge is None else ["edge"])})
        # An edit runs alone, so that it depends on its own seed only, to the last bit.
        edits = None if item.scan is None else item.scan.strength if edits_together else item.spec.index
        groups.setdefault((item.placement.shape, item.spec.source, kinds, edits), []).append(item)
    done: list[SyntheticSample] = []
    for (shape, *_), group in groups.items():
        try:
            done += _sample_group(generator, group, settings, on_step, on_reject)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            remedy = "Lower batch_size" if len(group) > 1 else "Lower max_memory_gb, or use smaller label maps"
            raise MemoryError(
                f"{group[0].spec.case}: expected memory for {len(group)} scan(s) of {shape} voxels, got too little. "
                f"{remedy} (now batch_size {len(group)}, max_memory_gb {settings.max_memory_gb})."
            ) from error
    return sorted(done, key=lambda item: item.spec.index)


def _sample_group(
    generator: Generator,
    group: list[LabelledGrid],
    settings: SamplingSettings,
    on_step: Callable[[int], object] | None,
    on_reject: Callable[[SampleSpec, BadInputError], object] | None,
) -> list[SyntheticSample]:
    # A sample that is rejected took part in drawing the labels, so a replay has to take it along.
    members = tuple(item.spec for item in group)
    images, group, evaluations = _run_networks(generator, group, settings, on_step, on_reject)
    return [
        SyntheticSample(
            image=_to_source(image, item, generator),
            label=item.label,
            grid=item.placement.source,
            spec=item.spec,
            label_record=item.record,
            conditions=item.conditions,
            network_evaluations=evaluations,
            model_shape=item.placement.shape,
            batch=members,
        )
        for item, image in zip(group, images, strict=True)
    ]


@torch.no_grad()  # inference mode would leave no gradients to the guidance towards rare samples
@exact_fp32()
def _run_networks(
    generator: Generator,
    group: list[LabelledGrid],
    settings: SamplingSettings,
    on_step: Callable[[int], object] | None,
    on_reject: Callable[[SampleSpec, BadInputError], object] | None,
) -> tuple[Iterable[torch.Tensor], list[LabelledGrid], int]:
    """Images ``(B, C, *spatial)`` in [-1, 1] on the model's grid, the samples with their labels, denoiser passes."""
    config, device = generator.config, generator.device
    # Set either way: the layout decides the rounding, so it must not depend on what ran before.
    layout = memory_format(config.spatial_dims) if settings.precision == "bf16" else torch.contiguous_format
    generator.to(memory_format=layout)

    def label_denoiser(x: torch.Tensor, t: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        with autocast(device, settings.precision):
            return generator.denoise_label(x, t, valid)

    uses = control_uses(generator, settings)

    def denoiser(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        with autocast(device, settings.precision):
            return generator.denoise(x, t, condition, controls=uses)

    if group[0].spec.source == "generate":
        group = generate_labels(group, generator, label_denoiser, settings, on_reject)
        if not group:
            return [], [], 0
    guided = guide(generator, batch_condition(generator, group), settings, denoiser)
    shape, seeds = generator.latent_shape(group[0].placement.shape), [item.spec.seed for item in group]
    noise = seeded_noise(shape, seeds)
    again = seeded_noise(shape, [derive_seed(seed, "minority") for seed in seeds]) if settings.minority_scale else noise
    start, region = None, None
    edits = [(item.scan, item.placement) for item in group if item.scan is not None]  # all of a group, or none
    if edits:
        pairs = [scan.to_model(placement, generator.compression) for scan, placement in edits]
        own, region = (torch.cat(maps).to(device) for maps in zip(*pairs, strict=True))
        with autocast(device, settings.precision):
            start = generator.encode(own).float()
    latents = sample(
        guided,
        noise.to(device),
        objective=config.objective,
        callback=None if on_step is None else lambda step, _: on_step(step + 1),
        sampler=settings.sampler,
        spacing=settings.sampler_spacing,
        num_inference_steps=settings.num_inference_steps,
        temperature=config.temperature if settings.temperature is None else settings.temperature,
        start=start,
        strength=edits[0][0].strength if edits else 1.0,
        region=region,
        minority=seek_minority(generator, settings, again.to(device)),
    )
    with autocast(device, settings.precision):
        images = generator.decode(latents, max_memory_gb=settings.max_memory_gb)
    return images.float().cpu(), group, guided.evaluations


def _to_source(image: torch.Tensor, item: LabelledGrid, generator: Generator) -> torch.Tensor:
    """Back onto the sample's own grid, into source units, rounded to what the file type can hold."""
    if item.scan is not None:
        return item.scan.blend(image, item.placement)
    own = generator.config.intensity.inverse(from_model(image, item.placement, mode="linear"))
    kind = np.dtype(generator.config.image_dtype)
    if kind.kind == "f":
        return own
    limits = np.iinfo(kind)
    return own.round().clamp(limits.min, limits.max)
