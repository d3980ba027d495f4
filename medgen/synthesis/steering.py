"""What steers the samples of a run: checked against the model, embedded, and guided by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields

import torch

from medgen.conditions.assemble import assemble
from medgen.conditions.attributes import far_from_training
from medgen.conditions.condition import Condition, join
from medgen.data.geometry import valid_mask
from medgen.diffusion.guidance import Guided, check_guidance
from medgen.diffusion.minority import MinorityGuidance, check_minority
from medgen.diffusion.sampler import sample
from medgen.generator import ControlUse, Generator
from medgen.networks import encode_unique
from medgen.synthesis.labels import LabelledGrid, label_sampling, steering_names
from medgen.synthesis.plan import SampleSpec, SamplingSettings
from medgen.types import BadInputError

# By which argument each condition is given; all others are attributes.
_ARGUMENTS = {"mask": "labels", "edge": "edges", "text": "prompts"}


def require_conditions(generator: Generator, names: Mapping[str, str]) -> None:
    """Refuse what the model does not listen to.

    Args:
        generator: The model.
        names: Conditions that are asked for, each with the argument that asks for it.

    Raises:
        BadInputError: If the model has no such condition.
    """
    known = generator.conditions
    for name, argument in names.items():
        if name not in known:
            steered = f"steered by {', '.join(known)}; not by {name}" if known else "steered by nothing"
            raise BadInputError(
                f"{argument}: expected none, because the model '{generator.config.name}' is {steered}. Leave it out, "
                f"{_how_to_add(generator, name)}."
            )


def _how_to_add(generator: Generator, name: str) -> str:
    """What gives a model a condition; one of the Stable Diffusion family gets a map by a branch alone."""
    from medgen.networks import LatentBaseDenoiser  # takes long to import

    if name in ("mask", "edge") and isinstance(generator.denoiser, LatentBaseDenoiser):
        branch = f"or train a branch on it with `medgen train --base MODEL --conditions {name}`"
        return f"give --edge_control CONTROLNET, {branch}" if name == "edge" else branch
    return f"or train a model with --conditions {','.join([*generator.conditions, name])}"


def control_uses(generator: Generator, settings: SamplingSettings) -> dict[str, ControlUse]:
    """How the control branches of a model act.

    Args:
        generator: The model.
        settings: How to sample.

    Returns:
        By condition, where not as trained.

    Raises:
        BadInputError: If the model has no such branch, or a setting is unknown or out of range.
    """
    known = [item.name for item in fields(ControlUse)]
    for name, values in settings.controls.items():
        if name not in generator.controls:
            raise BadInputError(
                f"controls: expected control branches of the model '{generator.config.name}' "
                f"({', '.join(sorted(generator.controls)) or 'it has none'}), got {name!r}. Train one with --base."
            )
        if unknown := sorted(set(values) - set(known)):
            raise BadInputError(f"controls: expected {', '.join(known)} for {name}, got {', '.join(unknown)}.")
    return {name: ControlUse(**values) for name, values in settings.controls.items()}


def check_steering(generator: Generator, specs: Sequence[SampleSpec], *, truncate: bool = False) -> None:
    """Refuse a plan that the model cannot follow, before any time goes into sampling.

    A warning names the first value of each attribute that is a number far from those of the training scans.

    Args:
        generator: The model.
        specs: The plan.
        truncate: Cut prompts that the text encoder has no room for, with a warning.

    Raises:
        BadInputError: If the model lacks a condition, does not know the value of an attribute, or a text is too long
            for its encoder or has no word that it knows.
    """
    config = generator.config
    used = {"mask" for spec in specs if spec.source != "none" and not spec.outlines}
    used |= {"edge" for spec in specs if spec.edge is not None} | {"text" for spec in specs if spec.text is not None}
    require_conditions(generator, {name: _ARGUMENTS[name] for name in _ARGUMENTS if name in used})
    if any(spec.outlines for spec in specs):
        require_conditions(generator, {"edge": "label_outlines"})
    facts = dict.fromkeys((name, value) for spec in specs for name, value in spec.attributes.items())
    require_conditions(generator, {name: f"attribute '{name}'" for name, _ in facts})
    far: dict[str, str] = {}
    for name, value in facts:
        if name not in config.attributes:
            raise BadInputError(
                f"attributes: expected some of {', '.join(config.attributes) or 'none'}, got {name!r}. Give it by "
                f"--{_ARGUMENTS[name]}."
            )
        config.attributes[name].encode(value, name=f"attribute '{name}'")
        if known := far_from_training(config.attributes[name], value):
            far.setdefault(name, f"{value} is far from the training scans ({known}), so what it looks like is a guess")
    for name, words in far.items():
        warnings.warn(f"attribute '{name}': {words}", stacklevel=2)
    texts = dict.fromkeys(spec.text for spec in specs if spec.text is not None)
    if not texts:
        return
    if generator.text_encoder is None:
        raise BadInputError(
            f"model '{config.name}': expected a text encoder, got none. Copy the model again, or leave --prompts out."
        )
    try:
        encode_unique(generator.text_encoder, texts, truncate=truncate)
    except BadInputError as error:
        raise BadInputError(f"prompts: {error}".replace("truncate=True", "--truncate_prompts")) from error


def check_settings(generator: Generator, settings: SamplingSettings, *, generate: bool) -> None:
    """Refuse settings that do not go with a model before anything is written, by a rehearsal on a single number.

    Args:
        generator: The model.
        settings: How to sample.
        generate: Whether labels are drawn by the model too.

    Raises:
        BadInputError: If sampler, spacing, steps, guidance or memory bound cannot be, or labels cannot be drawn.
    """
    bound = settings.max_memory_gb
    if bound is not None and not (0 < bound < float("inf")):
        raise BadInputError(f"max_memory_gb: expected a finite number above 0, got {bound}.")
    scales = resolve_scales(generator, settings.guidance_scale)
    each = list(scales.values()) if isinstance(scales, Mapping) else [scales]
    check_guidance(each, settings.guidance_interval, settings.guidance_rescale)
    check_minority(settings.minority_scale)
    control_uses(generator, settings)
    count_evaluations(generator, generator.conditions, settings)
    if generate:
        objective, sampler = label_sampling(generator, settings.sampler)
        sample(
            lambda x, t: x,
            torch.zeros(1, 1, 2),
            objective=objective,
            sampler=sampler,
            spacing=settings.sampler_spacing,
            num_inference_steps=settings.num_inference_steps,
        )


def resolve_scales(
    generator: Generator, guidance_scale: float | Mapping[str, float] | None
) -> float | dict[str, float]:
    """Guidance scales with the model's own where none is given.

    Args:
        generator: The model.
        guidance_scale: For all conditions but those that the model has a scale of their own for, or by name, or None.

    Returns:
        One scale, or that of each of the model's conditions.

    Raises:
        BadInputError: If a name is not that of a condition of the model.
    """
    config = generator.config
    if isinstance(guidance_scale, Mapping):
        for_all, named = config.guidance_scale, guidance_scale
    else:
        for_all, named = config.guidance_scale if guidance_scale is None else guidance_scale, {}
        if not config.guidance_scales:
            return for_all
    unknown = sorted(set(named) - set(generator.conditions))
    if unknown:
        raise BadInputError(
            f"guidance_scale: expected conditions among {', '.join(generator.conditions) or 'none'}, by which the "
            f"model '{generator.config.name}' is steered, got {', '.join(unknown)}. Leave it out."
        )
    own = {**dict.fromkeys(generator.conditions, for_all), **config.guidance_scales}
    return {name: float(scale) for name, scale in {**own, **named}.items()}


def describe_scales(scales: float | Mapping[str, float] | None) -> str:
    """Guidance scales in words.

    Args:
        scales: Of all conditions or by name; None for the model's own.

    Returns:
        Such as ``1.5`` or ``mask 1.5, text 5``.
    """
    if isinstance(scales, Mapping):
        return ", ".join(f"{name} {scale:g}" for name, scale in scales.items())
    return "of the model" if scales is None else f"{scales:g}"


def guide(
    generator: Generator,
    condition: Condition,
    settings: SamplingSettings,
    denoise: Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor],
) -> Guided[Condition]:
    """Bind conditions to a denoiser with the guidance that the settings ask for.

    Args:
        generator: The model.
        condition: What steers a batch.
        settings: How to sample.
        denoise: The model's denoiser, in the precision of the run.

    Returns:
        A denoiser of state and time.
    """
    scales = resolve_scales(generator, settings.guidance_scale)
    if isinstance(scales, dict):
        scales = {name: scale for name, scale in scales.items() if name in condition.parts}
    chain, weights = condition.chain(scales)
    return Guided(
        denoise,
        chain,
        weights,
        interval=settings.guidance_interval,
        rescale=settings.guidance_rescale,
        num_train_timesteps=generator.config.objective.num_train_timesteps,
    )


def seek_minority(generator: Generator, settings: SamplingSettings, noise: torch.Tensor) -> MinorityGuidance | None:
    """Guidance towards rare samples, if the settings ask for it.

    Args:
        generator: The model.
        settings: How to sample.
        noise: ``(B, C, *spatial)`` standard normal, not the noise that the samples start from.

    Returns:
        The guidance of one batch; None where it is off.
    """
    if settings.minority_scale == 0:
        return None
    return MinorityGuidance(settings.minority_scale, noise, generator.config.objective)


def count_evaluations(
    generator: Generator, names: Collection[str], settings: SamplingSettings, *, strength: float = 1.0
) -> int:
    """Passes of the denoiser that a sample takes, found by a rehearsal on a single number.

    Args:
        generator: The model.
        names: Conditions of the sample.
        settings: How to sample.
        strength: Share in (0, 1] of the noise process that is run; less than 1 starts from a scan.

    Returns:
        Their number; passes of the label generator do not count.

    Raises:
        BadInputError: If the settings do not go with the model.
    """
    config = generator.config
    condition = Condition({name: torch.zeros(1, 1) for name in names})
    guided = guide(generator, condition, settings, lambda x, t, part: x)
    noise = torch.zeros(1, 1, 2)
    sample(
        guided,
        noise,
        start=None if strength == 1 else torch.zeros(1, 1, 2),
        strength=strength,
        objective=config.objective,
        sampler=settings.sampler,
        spacing=settings.sampler_spacing,
        num_inference_steps=settings.num_inference_steps,
        temperature=config.temperature if settings.temperature is None else settings.temperature,
        minority=seek_minority(generator, settings, noise),
    )
    return guided.evaluations


def planned_evaluations(generator: Generator, specs: Sequence[SampleSpec], settings: SamplingSettings) -> list[int]:
    """Numbers of passes that the samples of a plan take.

    Args:
        generator: The model.
        specs: The plan.
        settings: How to sample.

    Returns:
        Each number that occurs, rising.
    """
    kinds = {
        (frozenset(steering_names(spec, generator.config)), 1.0 if spec.scan is None else spec.scan.strength)
        for spec in specs
    }
    return sorted({count_evaluations(generator, names, settings, strength=strength) for names, strength in kinds})


def batch_condition(generator: Generator, group: Sequence[LabelledGrid]) -> Condition:
    """What steers samples that share a model grid and have the same kinds of conditions.

    Texts are embedded one by one, so that an embedding does not depend on the others.

    Args:
        generator: The model.
        group: The samples.

    Returns:
        The condition, on the model's device.
    """
    texts = [item.spec.text for item in group if item.spec.text is not None]
    embedded: dict[str, torch.Tensor] = {}
    if texts and generator.text_encoder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the check of the plan has said it all
            embedded = encode_unique(generator.text_encoder, texts, batch_size=1, truncate=True)
    rows = [
        assemble(
            index=None if item.spec.outlines else item.index,
            num_classes=generator.num_classes,
            mask_form=generator.config.mask_form,
            valid=valid_mask(item.placement),
            edge=item.edge,
            attributes={name: generator.config.attributes[name] for name in item.facts},
            facts=item.facts,
            text=None if item.spec.text is None else embedded[item.spec.text],
        )
        for item in group
    ]
    return join(rows).to(generator.device)
