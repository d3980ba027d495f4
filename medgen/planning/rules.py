"""The rules by which a plan is made: which scans, which networks, and for how long."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from medgen.conditions.attributes import SPACING
from medgen.data.dataset import Dataset
from medgen.data.intensity import Normalization
from medgen.diffusion.objective import Objective
from medgen.planning.conditions import choose_conditions
from medgen.planning.cost import BYTES_PER_PARAMETER, TRAINING_PASSES, stage_cost, step_operations
from medgen.planning.fingerprint import Fingerprint, fingerprint
from medgen.planning.machine import world_size
from medgen.planning.plan import (
    LEAST_ADVERSARIAL_PATCH,
    SPACING_FACTOR,
    STAGES,
    AutoencoderPlan,
    DenoiserPlan,
    LabelPlan,
    Plan,
    StageName,
    by_axis,
)
from medgen.types import Shape

# Hours that a whole training should take: a coffee break is too short for a CPU, and a night too long to wait for.
_HOURS = {"cpu": 1.5, "cuda": 3.0}
_SHARES: dict[StageName, float] = {"autoencoder": 0.15, "denoiser": 0.7, "label": 0.15}
# Voxels of the largest scan that is learned whole.
_MOST_VOXELS = {(2, "cpu"): 256**2, (2, "cuda"): 512**2, (3, "cpu"): 96**3, (3, "cuda"): 160**3}
# Voxels per axis of a volume up to which halving the resolution once is enough; halving it twice would lose structures.
_SMALL = 64
_UNET_LEVELS = 3
# Numbers per latent voxel and channel of the scan. All 16 of a 4 x 4 block would lose nothing, but a denoiser that is
# trained for an hour then leaves noise in the finest detail: on cine MR 8 gave clearly cleaner scans.
_LATENTS_PER_CHANNEL = 8
_MOST_LATENT_CHANNELS = 16
# An autoencoder that loses nothing starts as the Haar transform, which needs no more, and only smooths its latents.
_LOSSLESS_STEPS = 200
_LOSSLESS_AUTOENCODERS = {2: ((24, 48), (16, 32)), 4: ((32, 64, 64), (16, 32, 64))}
# Networks from wide to narrow; the widest that gets enough steps in its time is taken.
_AUTOENCODERS = {
    2: ((32, 64), (24, 48), (16, 32)),
    4: ((64, 128, 128), (32, 64, 96), (16, 32, 64)),
}
_DENOISERS = ((96, 192, 256), (64, 128, 192), (48, 96, 128), (32, 64, 96))
_LABEL_DENOISERS = ((64, 128, 128), (32, 64, 64))
_ENOUGH_STEPS: dict[StageName, int] = {"autoencoder": 900, "denoiser": 2000, "label": 1000}
_MOST_STEPS: dict[StageName, int] = {"autoencoder": 20_000, "denoiser": 60_000, "label": 20_000}
# Of scans learned in crops every voxel should be seen in about as many crops, within reason.
_CROPS_PER_VOXEL = 4
_MOST_VARIANTS = 64
# Fewer scans than these are learned by heart, and so are bent too, in about so many versions altogether.
_FEW = 50
_VERSIONS_OF_FEW = 960
_BENT = 0.09
# A small set seen more often than this is learned by heart.
_MOST_VIEWS = 600
_MEMORY_SHARE = 0.5


def make_plan(
    dataset: Dataset,
    *,
    conditions: Sequence[str] | None = None,
    device: str = "auto",
    hours: float | None = None,
) -> Plan:
    """Decide how to train on a data set: scans of which size, which networks, and for how long.

    Args:
        dataset: The scans; the header of each and the voxels of a few are read.
        conditions: What is to steer the generator, see :func:`medgen.planning.choose_conditions`; None for label maps.
        device: `auto`, `cpu`, `cuda` or any torch device.
        hours: How long the training may take, about; None gives 1.5 hours on a CPU and 3 on a GPU.

    Returns:
        The plan; the same data on the same machine gives the same.

    Raises:
        BadInputError: If the data set has no labelled scans or not what the conditions take, or none can be read.
    """
    steered = choose_conditions(dataset, conditions)
    seen = fingerprint(dataset, needs_labels=steered.needs_labels, device=device)
    notes = list(seen.notes)
    kind = seen.machine.kind
    # A scan that is resampled to one voxel size has none to tell.
    spacing, size, compression, crops = _choose_grid(seen, notes, resamples=SPACING not in steered.attributes)
    normalization = _choose_normalization(seen, notes)
    few = seen.useful < _FEW
    variants = 4 if seen.useful >= 150 else 8
    if few:
        variants = int(np.clip(_VERSIONS_OF_FEW // seen.useful, 16, 32))
        notes.append(f"few scans are learned by heart: each is bent into {variants} versions")
    shared: dict[str, Any] = {
        "attention_levels": (False,) * (_UNET_LEVELS - 1) + (True,),
        "objective": Objective(),
        "variants": variants if crops == 1 else int(np.clip(_CROPS_PER_VOXEL * crops, variants, _MOST_VARIANTS)),
    }
    plan = Plan(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", dataset.root.resolve().name).strip("-.") or "model",
        spatial_dims=seen.spatial_dims,
        channel_names=seen.channel_names,
        class_names=seen.class_names,
        modality=seen.modality,
        spacing=spacing,
        orientation="RAS" if seen.spatial_dims == 3 and not seen.flat else None,
        size=size,
        normalization=normalization,
        image_dtype=_choose_dtype(seen, normalization),
        autoencoder=_choose_autoencoder(seen, size, compression, notes),
        denoiser=DenoiserPlan(
            num_res_blocks=1 if kind == "cpu" else 2, elastic=_BENT if few else 0.0, conditions=steered, **shared
        ),
        label=LabelPlan(num_res_blocks=1, mask_channels=16, ema_decay=0.999, **shared)
        if len(seen.class_names) > 1 and steered.mask
        else None,
        label_stride=4 if max(size) > 128 else 2,
    )
    total = 3600 * (hours or _HOURS[kind]) * seen.machine.operations_per_second
    spare = 0.0
    for stage in STAGES:
        budget = total * _SHARES[stage]
        # What the autoencoder leaves over, all but a little where it loses nothing, is the denoiser's.
        plan = _choose_width(plan, stage, budget + (spare if stage == "denoiser" else 0.0), seen)
        if stage == "autoencoder" and plan.autoencoder is not None:
            spare = max(0.0, budget - plan.autoencoder.steps * step_operations(plan, stage))
    slowest = max(step_operations(plan, stage) for stage in STAGES if getattr(plan, stage) is not None)
    return dataclasses.replace(
        plan,
        validate_every=max(100, round(plan.denoiser.steps // 8, -2)),
        # About five minutes are lost at most when a run is killed.
        checkpoint_every=int(np.clip(round(300 * seen.machine.operations_per_second / slowest, -1), 20, 250)),
        fingerprint=seen.to_dict() | {"notes": notes},
    )


def _choose_grid(
    seen: Fingerprint, notes: list[str], *, resamples: bool
) -> tuple[tuple[float, ...] | None, Shape, int, int]:
    """Spacing, size, compression, and crops that fill a scan: whole median scans, else coarser ones, else crops."""
    most = _MOST_VOXELS[seen.spatial_dims, seen.machine.kind]
    shape, spacing = np.array(seen.sizes[1], dtype=float), None
    if resamples and seen.spacings is not None and seen.extent is not None:
        finest, median, coarsest = np.array(seen.spacings)
        spacing, extent = median.copy(), np.array(seen.extent)
        # No coarser than what the finest scan may still be resampled to, less what rounding takes.
        limit = np.maximum(median, 0.999 * SPACING_FACTOR * finest)
        while np.prod(extent / spacing) > most and (spacing < limit).any():
            # The finest axis first, so that thick slices stay as they are.
            axis = int(np.argmin(np.where(spacing < limit, spacing, np.inf)))
            spacing[axis] = min(spacing[axis] * 1.02, limit[axis])
        if (spacing > median).any():
            notes.append(
                f"scans are resampled from {by_axis(median)} mm to a coarser grid, to train in reasonable time"
            )
        elif seen.mixed_spacing:
            notes.append("voxel sizes differ between scans: all are resampled to the median, and back on output")
        spacing = np.array([float(f"{value:.4g}") for value in spacing])
        if (spacing > SPACING_FACTOR * finest).any() or (SPACING_FACTOR * spacing < coarsest).any():
            notes.append(
                f"some voxels differ by more than a factor {SPACING_FACTOR:g} from {by_axis(spacing)} mm: training "
                "stops at these scans, or skips them with --skip_bad"
            )
        shape = extent / spacing
    whole = shape.copy()
    while np.prod(shape) > most:
        shape[np.argmax(shape)] *= 0.98
    if (shape < whole).any():
        notes.append(f"scans of {by_axis(whole.round())} voxels are learned in crops, to train in reasonable time")
    compression = 2 if seen.spatial_dims == 3 and shape.max() <= _SMALL else 4
    unit = compression * 2 ** (_UNET_LEVELS - 1)
    size = tuple(math.ceil(n / unit - 1e-6) * unit for n in shape.round())
    crops = math.ceil(np.prod(whole) / np.prod(shape)) if (shape < whole).any() else 1
    return None if spacing is None else tuple(spacing.tolist()), size, compression, crops


def _choose_normalization(seen: Fingerprint, notes: list[str]) -> Normalization:
    low, high = min(row[0] for row in seen.intensities), max(row[-1] for row in seen.intensities)
    if seen.is_rgb:
        # One window for all colors of all pictures: each on its own would change hue and brightness.
        if seen.whole_numbers and low >= 0:
            bits = max(8, math.ceil(math.log2(high + 1)))
            return Normalization("window", 0.0, 2.0 ** (bits if bits <= 12 else 16) - 1, per_channel=False)
        if low >= 0 and high <= 1:
            return Normalization("window", 0.0, 1.0, per_channel=False)
        return Normalization(per_channel=False)
    if seen.is_hounsfield:
        if seen.modality is None:
            notes.append("intensities look like CT numbers (HU) and are treated as such")
        floor, ceiling = (math.floor(seen.tails[0] / 50) * 50.0, math.ceil(seen.tails[1] / 50) * 50.0)
        return Normalization("window", max(-1000.0, min(floor, 950.0)), min(1000.0, max(ceiling, -950.0)))
    if seen.modality is not None and seen.modality.upper() == "CT":
        notes.append("declared CT, but no intensity is below 0, so not in HU: normalized by percentiles")
    if seen.sparse:
        notes.append("most voxels of a scan share one value: normalized from the lowest to the highest voxel")
        return Normalization("percentile", 0.0, 100.0)
    return Normalization()


def _choose_dtype(seen: Fingerprint, normalization: Normalization) -> Literal["uint8", "uint16", "int16", "float32"]:
    """The smallest type that holds synthetic scans, whose intensities span what the normalization does not clip."""
    if normalization.method == "window":
        low, high = normalization.low, normalization.high
    else:
        low, high = min(row[1] for row in seen.intensities), max(row[3] for row in seen.intensities)
    if seen.flat and seen.spatial_dims == 2 and seen.whole_numbers and low >= 0:
        return "uint8" if high <= 255 else "uint16"
    # Rounding a float scan to integers is harmless where it has some hundred steps.
    if not seen.whole_numbers and high - low < 500:
        return "float32"
    if low >= -32768 and high <= 32767:
        return "int16"
    return "uint16" if low >= 0 and high <= 65535 else "float32"


def _choose_autoencoder(seen: Fingerprint, size: Shape, compression: int, notes: list[str]) -> AutoencoderPlan:
    """Crops of nine tenths of a scan, if they are not too large: each step then sees another part of it."""
    cpu, dims = seen.machine.kind == "cpu", seen.spatial_dims
    most = {(2, True): 128, (2, False): 256, (3, True): 48, (3, False): 96}[dims, cpu]
    patch = tuple(max(min(16, n), min(int(0.9 * n) // 8 * 8, most)) for n in size)
    voxels = 150_000 if cpu else 1_000_000
    channels = len(seen.channel_names)
    latent_channels = min(channels * min(compression**dims, _LATENTS_PER_CHANNEL), _MOST_LATENT_CHANNELS)
    thin = min(patch) < LEAST_ADVERSARIAL_PATCH
    lossless = latent_channels == channels * compression**dims
    if thin and not lossless:
        notes.append("scans are too thin for the discriminator: the autoencoder is trained without it")
    # What loses nothing has nothing that an adversarial term could repair.
    terms: dict[str, Any] = {"adversarial_weight": 0.0, "feature_weight": 0.0} if lossless or thin else {}
    return AutoencoderPlan(
        channels=_AUTOENCODERS[compression][0],
        latent_channels=latent_channels,
        patch_size=patch,
        batch_size=int(np.clip(round(voxels / math.prod(patch)), 2, 8 if cpu else 16)),
        discriminator_channels=16 if dims == 3 else 32,
        **terms,
    )


def _choose_width(plan: Plan, stage: StageName, operations: float, seen: Fingerprint) -> Plan:
    """The plan with the widest network of a stage that gets enough steps, and with batch and steps that fit."""
    before = getattr(plan, stage)
    if before is None:
        return plan
    lossless = stage == "autoencoder" and plan.is_lossless
    enough = _LOSSLESS_STEPS if lossless else _ENOUGH_STEPS[stage]
    autoencoders = _LOSSLESS_AUTOENCODERS if lossless else _AUTOENCODERS
    widths = {
        "autoencoder": autoencoders[plan.compression] if stage == "autoencoder" else (),
        "denoiser": _DENOISERS if plan.spatial_dims == 3 or seen.machine.kind == "cuda" else _DENOISERS[1:],
        "label": _LABEL_DENOISERS,
    }[stage]
    world = world_size()
    memory = _MEMORY_SHARE * 1e9 * seen.machine.memory_gb / (world if seen.machine.device == "cpu" else 1)
    for channels in widths:
        wanted = dataclasses.replace(before, channels=channels)
        trial = dataclasses.replace(plan, **{stage: wanted})
        cost = stage_cost(trial, stage)
        fitting = int((memory - BYTES_PER_PARAMETER * cost.parameters) // cost.activation_bytes)
        batch = min(wanted.batch_size, max(1, fitting) * world)
        steps = int(operations / (TRAINING_PASSES * cost.operations * batch))
        if steps >= enough and fitting * world >= wanted.batch_size / 2:
            break
    if stage != "autoencoder" and fitting * world < wanted.batch_size / 2:
        wanted = dataclasses.replace(wanted, gradient_checkpointing=True)
    batch = max(world, batch // world * world)
    # Quality comes before time: below this many steps there is nothing worth having.
    least = enough * 3 // 4
    steps = int(np.clip(steps, least, max(least, min(_MOST_STEPS[stage], _MOST_VIEWS * seen.useful // batch))))
    steps = _LOSSLESS_STEPS if lossless else round(steps, -2)
    changes: dict[str, Any] = {"batch_size": batch, "steps": steps}
    if stage == "autoencoder":
        changes["adversarial_start"] = steps // 3
    return dataclasses.replace(plan, **{stage: dataclasses.replace(wanted, **changes)})


def cap_steps(plan: Plan, steps: int | None) -> Plan:
    """The plan with no stage longer than asked for.

    Args:
        plan: The plan.
        steps: Most steps of a stage; None leaves it as it is.

    Returns:
        The plan.
    """
    if steps is None:
        return plan
    short = {}
    for name in STAGES:
        stage = getattr(plan, name)
        if stage is not None:
            short[name] = dataclasses.replace(stage, steps=min(stage.steps, steps))
    if plan.autoencoder is not None:
        start = min(plan.autoencoder.adversarial_start, steps // 2)
        short["autoencoder"] = dataclasses.replace(short["autoencoder"], adversarial_start=start)
    return dataclasses.replace(plan, **short)
