"""The training plan: every choice that `medgen train` follows, as one editable YAML file."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import docstring_parser
import jsonargparse
import numpy as np
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medgen.data.dataset import Dataset, split_cases
from medgen.data.intensity import Normalization
from medgen.diffusion.objective import Objective
from medgen.fingerprint import Fingerprint, Machine, fingerprint, read_machine
from medgen.precision import autocast, memory_format, resolve_device, resolve_precision
from medgen.types import BadInputError, Shape

StageName = Literal["autoencoder", "denoiser", "label"]
STAGES: tuple[StageName, ...] = get_args(StageName)

# Hours that a whole training should take: a coffee break is too short for a CPU, and a night too long to wait for.
_HOURS = {"cpu": 1.5, "cuda": 3.0}
_SHARES: dict[StageName, float] = {"autoencoder": 0.15, "denoiser": 0.7, "label": 0.15}
# Sustained TFLOP/s in training, of one CPU core or one GPU, with and without bfloat16 in hardware. Rough on purpose:
# every process of a run must come to the same plan, so nothing is measured here.
_TERAFLOPS = {("cpu", True): 0.1, ("cpu", False): 0.035, ("cuda", True): 30.0, ("cuda", False): 8.0}
# Voxels of the largest scan that is learned whole.
_MOST_VOXELS = {(2, "cpu"): 256**2, (2, "cuda"): 512**2, (3, "cpu"): 96**3, (3, "cuda"): 160**3}
_MOST_COARSENING = 2.0
# Voxels per axis up to which halving the resolution once is enough; a second time would lose small structures.
_SMALL = 64
_UNET_LEVELS = 3
_MOST_LATENT_CHANNELS = 8
# An autoencoder that loses nothing starts as good as it needs to be, and only smooths its latents.
_LOSSLESS_STEPS = 200
# Networks from wide to narrow; the widest that gets enough steps in its time is taken.
_AUTOENCODERS = {
    2: ((32, 64), (24, 48), (16, 32)),
    4: ((64, 128, 128), (32, 64, 96), (16, 32, 64)),
}
_DENOISERS = ((96, 192, 256), (64, 128, 192), (48, 96, 128), (32, 64, 96))
_LABEL_DENOISERS = ((64, 128, 128), (32, 64, 64))
_ENOUGH_STEPS: dict[StageName, int] = {"autoencoder": 900, "denoiser": 2000, "label": 1000}
_MOST_STEPS: dict[StageName, int] = {"autoencoder": 20_000, "denoiser": 60_000, "label": 20_000}
# A small set seen more often than this is learned by heart.
_MOST_VIEWS = 600
# Weights, gradient, two moments of AdamW and the moving average, in float32.
_BYTES_PER_PARAMETER = 20
_MEMORY_SHARE = 0.5
_TRAINING_PASSES = 3  # the backward pass costs about two forward passes


@dataclass
class AutoencoderPlan:
    """Stage `autoencoder`: how scans become latents.

    Attributes:
        channels: Feature channels per level; each level after the first halves the resolution.
        latent_channels: Channels of the latent grid.
        num_res_blocks: Residual blocks per level.
        patch_size: Voxels per axis of the random crops it learns from.
        batch_size: Crops a step, over all processes.
        steps: Optimizer steps.
        learning_rate: Peak rate of AdamW; warms up, then falls by a cosine.
        kl_weight: Weight of the KL term.
        adversarial_weight: Weight of the hinge term.
        feature_weight: Weight of feature matching, the learned perceptual term.
        adversarial_start: Step at which both begin.
        discriminator_channels: Feature channels of the discriminator's first layer.
    """

    channels: tuple[int, ...] = (32, 64, 64)
    latent_channels: int = 4
    num_res_blocks: int = 1
    patch_size: tuple[int, ...] = (32, 32, 32)
    batch_size: int = 4
    steps: int = 2000
    learning_rate: float = 1e-3
    kl_weight: float = 1e-4
    adversarial_weight: float = 0.02
    feature_weight: float = 0.05
    adversarial_start: int = 500
    discriminator_channels: int = 16


@dataclass
class DenoiserPlan:
    """Stages `denoiser` and `label`: how latents (or signed distances of labels) are generated.

    Attributes:
        channels: Feature channels per level.
        attention_levels: Which levels attend.
        num_res_blocks: Residual blocks per level.
        num_head_channels: Channels of one attention head.
        mask_channels: Feature channels of the embedded mask.
        objective: What the network predicts and how steps are weighted.
        batch_size: Samples a step, over all processes.
        steps: Optimizer steps.
        learning_rate: Peak rate of AdamW; warms up, then falls by a cosine.
        ema_decay: Decay of the moving average of the weights that is kept.
        condition_dropout: Chance that a sample trains without its mask, for classifier-free guidance.
        guidance_scale: Default at synthesis; 1 is off.
        variants: Augmented versions of each scan whose latents are cached; 1 is no augmentation.
        rotation: Largest rotation of a variant, degrees.
        scaling: Largest relative change of size of a variant.
        gradient_checkpointing: Trade time for memory.
    """

    channels: tuple[int, ...] = (64, 128, 128)
    attention_levels: tuple[bool, ...] = (False, False, True)
    num_res_blocks: int = 2
    num_head_channels: int = 32
    mask_channels: int = 32
    objective: Objective = field(default_factory=Objective)
    batch_size: int = 8
    steps: int = 4000
    learning_rate: float = 5e-4
    ema_decay: float = 0.999
    condition_dropout: float = 0.15
    guidance_scale: float = 1.5
    variants: int = 4
    rotation: float = 8.0
    scaling: float = 0.08
    gradient_checkpointing: bool = False


@dataclass
class Plan:
    """Everything that `medgen train` decides, and may be told.

    Attributes:
        name: Name of the model.
        spatial_dims: 2 or 3.
        channel_names: Image channels, in file order. With R, G, B, a gray picture is read as three equal channels.
        class_names: Label value to name; 0 is the background.
        size: Voxels per axis of a training scan; smaller scans are padded, larger ones cropped in training.
        modality: What the scanner was, as far as the folder says.
        spacing: Voxel size in mm that scans are resampled to, and back on output; None keeps every scan's own.
        orientation: Axis codes that scans are turned to, as nibabel writes them; None leaves them.
        normalization: How intensities map to the model's range of -1 to 1.
        image_dtype: Number type of synthetic images.
        autoencoder: Stage 1, which takes scans to small latent grids and back; None works on the voxels themselves.
        denoiser: Stage 2, which draws a scan for a label map.
        label: Stage 3, which draws new label maps, with the keys of the denoiser; None leaves it out.
        label_stride: Voxels per axis that one voxel of the label generator covers.
        precision: Number format of the networks: `auto`, `fp32` or `bf16`.
        validate_every: Steps between validations, each with a picture and a saved model.
        checkpoint_every: Steps between checkpoints.
        fingerprint: What was seen of the data, for the reader.
    """

    name: str
    spatial_dims: int
    channel_names: dict[int, str]
    class_names: dict[int, str]
    size: tuple[int, ...]
    modality: str | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str | None = "RAS"
    normalization: Normalization = field(default_factory=Normalization)
    image_dtype: Literal["uint8", "uint16", "int16", "float32"] = "int16"
    autoencoder: AutoencoderPlan | None = field(default_factory=AutoencoderPlan)
    denoiser: DenoiserPlan = field(default_factory=DenoiserPlan)
    label: DenoiserPlan | None = None
    label_stride: int = 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    validate_every: int = 500
    checkpoint_every: int = 250
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            BadInputError: If two settings do not fit together; the message starts with the key.
        """
        dims = self.spatial_dims
        if dims not in (2, 3):
            raise BadInputError(f"spatial_dims: expected 2 or 3, got {dims}. Correct it.")
        if 0 not in self.class_names:
            raise BadInputError(f"class_names: expected 0 (the background) among them, got {self.class_names}. Add it.")
        if self.spacing is not None and (len(self.spacing) != dims or min(self.spacing) <= 0):
            raise BadInputError(f"spacing: expected {dims} positive lengths in mm, got {self.spacing}. Correct it.")
        divisors = {"the compression of the autoencoder": self.compression}
        if self.label is not None:
            divisors["label_stride"] = self.label_stride
        _check_size("size", self.size, dims, divisors)
        if self.autoencoder is not None:
            patch = self.autoencoder.patch_size
            _check_size("autoencoder.patch_size", patch, dims, {"its compression": self.compression})
            if any(n > most for n, most in zip(patch, self.size, strict=True)):
                raise BadInputError(
                    f"autoencoder.patch_size: expected at most size {list(self.size)}, got {list(patch)}. Lower it."
                )
        for name in STAGES:
            stage = getattr(self, name)
            if stage is None:
                continue
            for key in ("batch_size", "steps", "variants", "num_res_blocks"):
                if getattr(stage, key, 1) < 1:
                    raise BadInputError(f"{name}.{key}: expected 1 or more, got {getattr(stage, key)}. Raise it.")
            levels = getattr(stage, "attention_levels", stage.channels)
            if len(levels) != len(stage.channels):
                raise BadInputError(
                    f"{name}.attention_levels: expected one value for each of the {len(stage.channels)} channels, "
                    f"got {len(levels)}. Give as many."
                )

    @property
    def compression(self) -> int:
        """Voxels of a scan per voxel of its latents, along an axis."""
        return 1 if self.autoencoder is None else int(2 ** (len(self.autoencoder.channels) - 1))


def _check_size(key: str, size: Shape, dims: int, divisors: Mapping[str, int]) -> None:
    if len(size) != dims or min(size) < 1:
        raise BadInputError(f"{key}: expected {dims} positive numbers of voxels, got {list(size)}. Correct it.")
    for reason, divisor in divisors.items():
        if any(n % divisor for n in size):
            fixed = [-(-n // divisor) * divisor for n in size]
            raise BadInputError(
                f"{key}: expected multiples of {divisor} ({reason}), got {list(size)}. Set it to {fixed}."
            )


def make_plan(dataset: Dataset, *, device: str = "auto", hours: float | None = None) -> Plan:
    """Decide how to train on a data set: scans of which size, which networks, and for how long.

    Args:
        dataset: The scans; the header of each and the voxels of a few are read.
        device: `auto`, `cpu`, `cuda` or any torch device.
        hours: How long the training may take, about; None gives 1.5 hours on a CPU and 3 on a GPU.

    Returns:
        The plan; the same data on the same machine gives the same.

    Raises:
        BadInputError: If the data set has no labelled scans, or none can be read.
    """
    seen = fingerprint(dataset, device=device)
    notes = list(seen.notes)
    kind = _kind(seen.machine)
    spacing, size, compression = _choose_grid(seen, notes)
    normalization = _choose_normalization(seen, notes)
    attention = (False,) * (_UNET_LEVELS - 1) + (True,)
    denoiser = DenoiserPlan(
        attention_levels=attention,
        num_res_blocks=1 if kind == "cpu" else 2,
        objective=Objective(timestep_sampling="logit_normal"),
        variants=4 if seen.labelled >= 150 else 8 if seen.labelled >= 50 else 16,
    )
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
        autoencoder=_choose_autoencoder(seen, size, compression),
        denoiser=denoiser,
        label=dataclasses.replace(denoiser, num_res_blocks=1, mask_channels=16) if len(seen.class_names) > 1 else None,
        label_stride=4 if max(size) > 128 else 2,
    )
    total = 3600 * (hours or _HOURS[kind]) * _throughput(seen.machine)
    for stage in STAGES:
        plan = _choose_width(plan, stage, total * _SHARES[stage], seen)
    slowest = max(_step_operations(plan, stage) for stage in STAGES if getattr(plan, stage) is not None)
    return dataclasses.replace(
        plan,
        validate_every=max(100, round(plan.denoiser.steps // 8, -2)),
        # About five minutes are lost at most when a run is killed.
        checkpoint_every=int(np.clip(round(300 * _throughput(seen.machine) / slowest, -1), 20, 250)),
        fingerprint=seen.to_dict() | {"notes": notes},
    )


def _kind(machine: Machine) -> str:
    return "cpu" if machine.device == "cpu" else "cuda"


def _world() -> int:
    """Processes of this run, as torch's launchers announce them."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def _throughput(machine: Machine) -> float:
    """Assumed floating point operations per second in training, of all processes together."""
    units = machine.cores if _kind(machine) == "cpu" else _world()
    return 1e12 * _TERAFLOPS[_kind(machine), machine.fast_bf16] * units


def _choose_grid(seen: Fingerprint, notes: list[str]) -> tuple[tuple[float, ...] | None, Shape, int]:
    """Spacing, size and compression: whole median scans if they are not too large, else coarser ones, else crops."""
    most = _MOST_VOXELS[seen.spatial_dims, _kind(seen.machine)]
    shape, spacing = np.array(seen.sizes[1], dtype=float), None
    if seen.spacings is not None and seen.extent is not None:
        median = np.array(seen.spacings[1])
        spacing, extent = median.copy(), np.array(seen.extent)
        while np.prod(extent / spacing) > most and (spacing < _MOST_COARSENING * median).any():
            # The finest axis first, so that thick slices stay as they are.
            axis = int(np.argmin(np.where(spacing < _MOST_COARSENING * median, spacing, np.inf)))
            spacing[axis] = min(spacing[axis] * 1.02, _MOST_COARSENING * median[axis])
        if (spacing > median).any():
            notes.append(f"scans are resampled from {_times(median)} mm to a coarser grid, to train in reasonable time")
        elif seen.mixed_spacing:
            notes.append("voxel sizes differ between scans: all are resampled to the median, and back on output")
        spacing = np.array([float(f"{value:.4g}") for value in spacing])
        shape = extent / spacing
    whole = shape.copy()
    while np.prod(shape) > most:
        shape[np.argmax(shape)] *= 0.98
    if (shape < whole).any():
        notes.append(f"scans of {_times(whole.round())} voxels are learned in crops, to train in reasonable time")
    compression = 2 if shape.max() <= _SMALL else 4
    unit = compression * 2 ** (_UNET_LEVELS - 1)
    size = tuple(math.ceil(n / unit - 1e-6) * unit for n in shape.round())
    return None if spacing is None else tuple(spacing.tolist()), size, compression


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


def _choose_autoencoder(seen: Fingerprint, size: Shape, compression: int) -> AutoencoderPlan:
    """Crops of nine tenths of a scan, if they are not too large: each step then sees another part of it."""
    cpu, dims = _kind(seen.machine) == "cpu", seen.spatial_dims
    most = {(2, True): 128, (2, False): 256, (3, True): 48, (3, False): 96}[dims, cpu]
    patch = tuple(max(min(16, n), min(int(0.9 * n) // 8 * 8, most)) for n in size)
    voxels = 150_000 if cpu else 1_000_000
    # As many channels as a block has voxels lose nothing, so no adversarial term has to repair anything.
    whole = len(seen.channel_names) * compression**dims
    latent_channels = min(whole, _MOST_LATENT_CHANNELS)
    terms: dict[str, Any] = {"adversarial_weight": 0.0, "feature_weight": 0.0} if latent_channels == whole else {}
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
    widths = {
        "autoencoder": _AUTOENCODERS[plan.compression] if stage == "autoencoder" else (),
        "denoiser": _DENOISERS if plan.spatial_dims == 3 or _kind(seen.machine) == "cuda" else _DENOISERS[1:],
        "label": _LABEL_DENOISERS,
    }[stage]
    world = _world()
    memory = _MEMORY_SHARE * 1e9 * seen.machine.memory_gb / (world if seen.machine.device == "cpu" else 1)
    for channels in widths:
        wanted = dataclasses.replace(before, channels=channels)
        trial = dataclasses.replace(plan, **{stage: wanted})
        cost = _cost(trial, stage)
        fitting = int((memory - _BYTES_PER_PARAMETER * cost.parameters) // cost.activation_bytes)
        batch = min(wanted.batch_size, max(1, fitting) * world)
        steps = int(operations / (_TRAINING_PASSES * cost.operations * batch))
        if steps >= _ENOUGH_STEPS[stage] and fitting * world >= wanted.batch_size / 2:
            break
    if stage != "autoencoder" and fitting * world < wanted.batch_size / 2:
        wanted = dataclasses.replace(wanted, gradient_checkpointing=True)
    batch = max(world, batch // world * world)
    # Quality comes before time: below this many steps there is nothing worth having.
    least = _ENOUGH_STEPS[stage] * 3 // 4
    steps = int(np.clip(steps, least, max(least, min(_MOST_STEPS[stage], _MOST_VIEWS * seen.labelled // batch))))
    steps = round(steps, -2)
    if (
        stage == "autoencoder"
        and wanted.latent_channels == len(plan.channel_names) * plan.compression**plan.spatial_dims
    ):
        steps = _LOSSLESS_STEPS
    changes: dict[str, Any] = {"batch_size": batch, "steps": steps}
    if stage == "autoencoder":
        changes["adversarial_start"] = steps // 3
    return dataclasses.replace(plan, **{stage: dataclasses.replace(wanted, **changes)})


def network_arguments(plan: Plan, stage: StageName) -> dict[str, Any]:
    """Arguments of the network that a stage trains.

    Args:
        plan: The plan.
        stage: `autoencoder`, `denoiser` or `label`.

    Returns:
        Keyword arguments of `medgen.networks.Autoencoder` or, for the other stages, `medgen.networks.Denoiser`.

    Raises:
        ValueError: If the plan leaves the stage out.
    """
    own = getattr(plan, stage)
    if own is None:
        raise ValueError(f"expected a plan with stage {stage!r}, got one without")
    names = ["channels", "num_res_blocks"]
    if stage == "autoencoder":
        extra = {"in_channels": len(plan.channel_names), "latent_channels": own.latent_channels}
    else:
        names += ["attention_levels", "num_head_channels", "mask_channels"]
        if stage == "label":
            channels, classes, stride = len(plan.class_names) - 1, 1, plan.label_stride
        else:
            channels = plan.autoencoder.latent_channels if plan.autoencoder else len(plan.channel_names)
            classes, stride = len(plan.class_names), plan.compression
        extra = {"in_channels": channels, "mask_classes": classes, "mask_stride": stride}
    return {"spatial_dims": plan.spatial_dims, **{name: getattr(own, name) for name in names}, **extra}


def check_plan(plan: Plan, dataset: Dataset) -> None:
    """Make sure that a plan, which may come from another folder or an editor, fits a data set.

    Args:
        plan: The plan.
        dataset: The scans that it is to be followed on.

    Raises:
        BadInputError: If dimension, channels or classes differ, or the networks cannot be built.
    """
    if plan.spatial_dims != dataset.spatial_dims:
        raise BadInputError(
            f"{dataset.root}: expected {plan.spatial_dims}D scans as in the plan, got {dataset.spatial_dims}D ones. "
            "Choose another plan, or leave it out to have one made."
        )
    if len(plan.channel_names) != len(dataset.channel_names):
        named = [", ".join(names.values()) for names in (plan.channel_names, dataset.channel_names)]
        raise BadInputError(
            f"{dataset.root}: expected {len(plan.channel_names)} channel(s) ({named[0]}) as in the plan, got "
            f"{len(dataset.channel_names)} ({named[1]}). Correct channel_names in the plan, or the data set."
        )
    unknown = {value: name for value, name in dataset.class_names.items() if value not in plan.class_names}
    if unknown:
        raise BadInputError(
            f"{dataset.root}: expected the classes {plan.class_names} of the plan, got {unknown} too. "
            "Add them to class_names in the plan."
        )
    for stage in STAGES:
        if getattr(plan, stage) is None:
            continue
        try:
            _cost(plan, stage)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadInputError(f"{stage}: expected a network that can be built, got: {reason}. Change it.") from error


class _Cost(NamedTuple):
    parameters: int
    operations: int  # floating point operations of one forward pass of one sample
    activation_bytes: float  # kept for the backward pass of one sample, with room for work space


@cache
def _measure_cost(key: tuple[Any, ...]) -> _Cost:
    stage, size, arguments = key
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    # Fake tensors have shapes and types like real ones, but no numbers.
    with FakeTensorMode(), torch.enable_grad():
        network = _build(stage, dict(arguments))
        inputs = _inputs(stage, dict(arguments), size, 1)
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter, saving:
            network(*inputs)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    stored = sum(storage.nbytes() for storage in kept.values())
    return _Cost(parameters, counter.get_total_flops(), 1.3 * stored)


def _cost(plan: Plan, stage: StageName, size: Shape | None = None) -> _Cost:
    """Cost of one sample, from a network without numbers in it, so that nothing is computed."""
    own = getattr(plan, stage)
    size = size or (own.patch_size if isinstance(own, AutoencoderPlan) else plan.size)
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in network_arguments(plan, stage).items()}
    cost = _measure_cost((stage, tuple(size), tuple(arguments.items())))
    if getattr(own, "gradient_checkpointing", False):
        cost = cost._replace(operations=cost.operations * 4 // 3, activation_bytes=cost.activation_bytes / 4)
    return cost


def _step_operations(plan: Plan, stage: StageName) -> float:
    return float(_TRAINING_PASSES * _cost(plan, stage).operations * getattr(plan, stage).batch_size)


def _build(stage: StageName, arguments: Mapping[str, Any]) -> torch.nn.Module:
    from medgen.networks import Autoencoder, Denoiser  # heavy to import, and reading a plan does not need it

    return Autoencoder(**arguments) if stage == "autoencoder" else Denoiser(**arguments)


def _inputs(stage: StageName, arguments: Mapping[str, Any], size: Shape, batch: int) -> tuple[torch.Tensor, ...]:
    """Noise in the shape of a training batch, for scans of ``size`` voxels."""
    if stage == "autoencoder":
        return (torch.randn(batch, arguments["in_channels"], *size),)
    stride = arguments["mask_stride"]
    x = torch.randn(batch, arguments["in_channels"], *(n // stride for n in size))
    mask = torch.randn(batch, arguments["mask_classes"], *size)
    return x, torch.full((batch,), 500.0), mask


def read_plan(path: str | Path) -> Plan:
    """Read a plan.

    Args:
        path: YAML file whose key `plan` holds it: `plan.yaml` of a run, or a configuration of `medgen train`, of
            which everything else is passed over.

    Returns:
        The plan.

    Raises:
        BadInputError: If the file is missing or no YAML, or has a key or a value that a plan cannot have.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadInputError(f"{path}: expected a YAML file with a training plan, got: {reason}. Correct it.") from error
    if not isinstance(content, dict) or not isinstance(content.get("plan"), dict):
        raise BadInputError(
            f"{path}: expected the key `plan` with a training plan, got none. Write one with --dry_run."
        )
    for key, known in _unknown_keys(content["plan"], Plan):
        close = get_close_matches(key.rpartition(".")[2], known, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known here: {', '.join(known)}."
        raise BadInputError(f"{path}: expected keys of a training plan, got the unknown key '{key}'. {hint}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan, "plan")
    try:
        # The same parser as for the command line, so that both read `1e-4` and `[1, 2]` alike.
        parsed = parser.parse_string(yaml.safe_dump({"plan": content["plan"]}))
        plan = parser.instantiate_classes(parsed).plan
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise BadInputError(f"{path}: expected values that fit a training plan, got: {_one_line(error)}.") from error
    return plan


def _unknown_keys(values: Mapping[str, Any], kind: type, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted keys that the dataclass does not have, each with those that it has."""
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            yield f"{prefix}{key}", list(hints)
            continue
        inner = next((t for t in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(t)), None)
        if inner is not None and isinstance(value, dict):
            yield from _unknown_keys(value, inner, f"{prefix}{key}.")  # type: ignore[arg-type]


def _one_line(error: Exception) -> str:
    text = re.sub(r"- Expected a <class 'NoneType'>|Given value type:.*", "", str(error))
    text = re.sub(r"Does not validate against any of the Union subtypes.*?Errors:", "", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).split()).rstrip(".")


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as a YAML file for people: each key has a comment.

    Args:
        plan: The plan.
        path: The file; its folder must be there. It appears whole or not at all.
    """
    path = Path(path)
    lines = [
        "# What `medgen train` does, and how. To change something, edit this file and pass it back, to a new folder:",
        "#   medgen train --config THIS_FILE --data FOLDER --output NEW_FOLDER",
        "plan:",
        *_yaml_lines(plan, "  ", set()),
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _yaml_lines(values: Any, indent: str, explained: set[type]) -> Iterator[str]:
    """Lines of a dataclass; each field's comment is its entry in the docstring, once per class."""
    comments = {}
    if type(values) not in explained:
        parsed = docstring_parser.parse(type(values).__doc__ or "", style=docstring_parser.DocstringStyle.GOOGLE)
        # Among all entries: docstring-parser counts attributes as parameters, its fork does not.
        documented = [entry for entry in parsed.meta if hasattr(entry, "arg_name")]
        comments = {entry.arg_name: _in_yaml_words(entry.description or "") for entry in documented}
    explained.add(type(values))
    for entry in dataclasses.fields(values):
        value, comment = getattr(values, entry.name), comments.get(entry.name, "")
        if dataclasses.is_dataclass(value) or (isinstance(value, dict) and entry.name == "fingerprint"):
            yield from ("", *_comment(comment, indent)) if comment else ()
            yield f"{indent}{entry.name}:" + ("" if value else " {}")
            if isinstance(value, dict):
                text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
                yield from (f"{indent}  {line}" for line in text.splitlines() if value)
            else:
                yield from _yaml_lines(value, indent + "  ", explained)
            continue
        line = f"{indent}{entry.name}: {_scalar(value)}"
        if comment and len(f"{line:<44}") + len(comment) + 4 > 120:
            yield from _comment(comment, indent)
            comment = ""
        yield f"{line:<44}  # {comment}" if comment else line


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, 118, initial_indent=start, subsequent_indent=start)


def _in_yaml_words(text: str) -> str:
    for python, plain in (("None", "null"), ("False", "false"), ("True", "true")):
        text = re.sub(rf"\b{python}\b", plain, text)
    return " ".join(text.replace("``", "`").split())


def _scalar(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def summarize_plan(plan: Plan, dataset: Dataset, *, device: str = "auto") -> str:
    """What a plan would do, and what it would cost.

    Args:
        plan: The plan.
        dataset: The scans that it is to be followed on.
        device: `auto`, `cpu`, `cuda` or any torch device.

    Returns:
        Text of several lines: data, choices, and for each stage parameters, memory and time.

    Raises:
        BadInputError: If the plan does not fit the data set, or the device is not there.
    """
    check_plan(plan, dataset)
    machine = read_machine(device)
    labelled = dataclasses.replace(dataset, cases=[case for case in dataset.cases if case.label is not None])
    train, val = split_cases(labelled)
    left_out = len(dataset.cases) - len(train) - len(val)
    grid = f"{_times(plan.size)} voxels" + (f" of {_times(plan.spacing)} mm" if plan.spacing else "")
    normalization = plan.normalization
    bounds = "" if normalization.method == "zscore" else f" {normalization.low:g} to {normalization.high:g}"
    lines = [
        f"plan       {plan.name}: {plan.spatial_dims}D {plan.modality or 'scans'}, "
        f"channels {', '.join(plan.channel_names.values())}; classes {', '.join(plan.class_names.values())}",
        f"data       {dataset.root}: {len(train)} scans for training, {len(val)} for validation"
        + (f", {left_out} left out (no label, or another split)" if left_out else ""),
        f"grid       {grid}; compressed {plan.compression}x per axis",
        f"intensity  by {normalization.method}{bounds}; synthetic scans as {plan.image_dtype}",
        f"machine    {machine.name}, {machine.cores} CPU cores, {machine.memory_gb:.0f} GB, "
        f"{resolve_precision(plan.precision, machine.device)}",
        *(f"note       {note}" for note in dict.fromkeys([*plan.fingerprint.get("notes", []), *dataset.notes])),
        "",
        f"{'stage':<12}{'parameters':>12}{'steps x batch':>16}{'memory':>10}{'time':>12}",
    ]
    seconds, memory = 0.0, 0.0
    for stage in STAGES:
        own = getattr(plan, stage)
        if own is None:
            continue
        cost, world = _cost(plan, stage), _world()
        need = 0.7 + (_BYTES_PER_PARAMETER * cost.parameters + cost.activation_bytes * own.batch_size / world) / 1e9
        work = own.steps * _step_operations(plan, stage)
        took = work / (_measured_throughput(plan, stage, device) * (world if machine.device != "cpu" else 1))
        seconds, memory = seconds + took, max(memory, need)
        steps = f"{own.steps} x {own.batch_size}"
        lines.append(f"{stage:<12}{cost.parameters / 1e6:>10.2f} M{steps:>16}{need:>7.1f} GB{_duration(took):>12}")
    lines += [
        f"{'all':<12}{'':>28}{memory:>7.1f} GB{_duration(seconds):>12}",
        "",
        "Time: operations of the networks, at the speed of two training steps that were just timed on this machine; "
        "reading, encoding and validation come on top.",
        "Memory: weights, optimizer and what the backward pass keeps, in float32; bfloat16 needs less.",
    ]
    if memory > machine.memory_gb:
        lines.append(f"This does not fit into {machine.memory_gb:.0f} GB: lower batch_size, or size, in the plan.")
    return "\n".join(lines)


def _measured_throughput(plan: Plan, stage: StageName, device: str) -> float:
    """Operations per second of a real training step, on a piece of a scan that takes about a second."""
    chosen, own = resolve_device(device), getattr(plan, stage)
    size = list(own.patch_size if isinstance(own, AutoencoderPlan) else plan.size)
    unit = plan.compression if stage != "label" else plan.label_stride
    while _cost(plan, stage, tuple(size)).operations > 2e10 and max(size) > 8 * unit:
        axis = size.index(max(size))
        size[axis] = max(4 * unit, size[axis] // 2 // (4 * unit) * 4 * unit)
    arguments = network_arguments(plan, stage)
    precision = resolve_precision(plan.precision, chosen)
    operations = _cost(plan, stage, tuple(size)).operations
    batch = int(np.clip(2e10 // operations, 1, own.batch_size))
    with torch.random.fork_rng(devices=[]), torch.device(chosen):
        network: Any = _build(stage, arguments)
        network.to(memory_format=memory_format(plan.spatial_dims))
        inputs = _inputs(stage, arguments, tuple(size), batch)
    marks = [time.perf_counter()]
    for _ in range(2):
        with autocast(chosen, precision):
            output = network(*inputs)
        loss = (output[0] if isinstance(output, tuple) else output).float().square().mean()
        loss.backward()
        if chosen.type == "cuda":
            torch.cuda.synchronize(chosen)
        marks.append(time.perf_counter())
    # The first step also prepares kernels.
    fastest = min(late - early for early, late in pairwise(marks))
    return _TRAINING_PASSES * operations * batch / fastest


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(1, minutes)} min"


def _times(values: Any) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
