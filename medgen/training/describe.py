"""What a generator knows of the scans that it is trained on, apart from its weights."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from medgen.data.intensity import IntensityMap
from medgen.generator import GeneratorConfig
from medgen.planning import STAGES, Plan
from medgen.training.cache import CachedScan


def typical_intensity(scans: Sequence[CachedScan]) -> IntensityMap:
    """Map of a typical scan: medians, over the scans, of the source values that become -1 and 1.

    Args:
        scans: The training scans.

    Returns:
        The map; one pair of numbers per channel.
    """
    scale, shift = (np.array([getattr(scan, name) for scan in scans], dtype=float) for name in ("scale", "shift"))
    low, high = (np.median((end - shift) / scale, axis=0) for end in (-1, 1))
    typical = 2 / (high - low)
    return IntensityMap(tuple(typical.tolist()), tuple((-1 - low * typical).tolist()))


def describe_generator(
    plan: Plan, data: str, train: Sequence[CachedScan], validation_cases: int, *, seed: int
) -> GeneratorConfig:
    """Settings of the generator that a run makes.

    Args:
        plan: What the run follows.
        data: Name of the data set.
        train: The training scans.
        validation_cases: Number of scans held out.
        seed: Root of the run's draws.

    Returns:
        The settings; latents are not measured yet.
    """
    shapes = [tuple(map(min, scan.shape, plan.size)) for scan in train]
    # Of crops these two are not known: scans that fit speak for the others, unless most are cropped.
    whole = [scan for shape, scan in zip(shapes, train, strict=True) if shape == scan.shape and scan.labelled]
    constant, parts = set[int](), 0
    if 2 * len(whole) > len(train):
        constant = set.intersection(*(set(scan.classes) for scan in whole)) - {0}
        parts = int(np.quantile([scan.parts for scan in whole], 0.95, method="higher"))
    return GeneratorConfig(
        name=plan.name,
        spatial_dims=plan.spatial_dims,
        channel_names=plan.channel_names,
        class_names=plan.class_names,
        size=plan.size,
        objective=plan.denoiser.objective,
        normalization=plan.normalization,
        intensity=typical_intensity(train),
        image_dtype=plan.image_dtype,
        modality=plan.modality,
        spacing=plan.spacing,
        orientation=plan.orientation,
        label_objective=plan.label.objective if plan.label else None,
        label_stride=plan.label_stride,
        guidance_scale=plan.denoiser.guidance_scale,
        temperature=plan.denoiser.temperature,
        shapes=tuple(shapes),
        constant_classes=tuple(sorted(constant)),
        max_parts=parts,
        mask_form=plan.denoiser.conditions.mask_form,
        edge=plan.denoiser.conditions.edge,
        attributes=plan.denoiser.conditions.attributes,
        text_template=plan.denoiser.conditions.text.template if plan.denoiser.conditions.text else None,
        training={
            "data": data,
            "training_cases": len(train),
            "validation_cases": validation_cases,
            "seed": seed,
            "steps": {name: getattr(plan, name).steps for name in STAGES if getattr(plan, name) is not None},
            "versions": {name: version(name) for name in ("medgen", "torch", "monai", "diffusers")},
            "python": platform.python_version(),
        },
    )
