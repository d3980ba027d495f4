"""The training plan: every choice that `medgen train` follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from medgen.data.intensity import Normalization
from medgen.diffusion.objective import Objective
from medgen.planning.conditions import ConditionsPlan
from medgen.types import BadInputError, Shape

StageName = Literal["autoencoder", "denoiser", "label"]
STAGES: tuple[StageName, ...] = get_args(StageName)

# The discriminator halves a patch twice and then reads it in windows of 4: of a smaller patch too little is left.
LEAST_ADVERSARIAL_PATCH = 16
# What a stage has of these is 1 or more.
_COUNTS = (
    "batch_size",
    "steps",
    "variants",
    "num_res_blocks",
    "num_head_channels",
    "mask_channels",
    "latent_channels",
    "discriminator_channels",
)
# Displacements of a larger share of the distance of the control points would fold a scan.
_MOST_ELASTIC = 0.15
# Between these factors scans are resampled to the plan's voxel size; beyond them structures would be lost or invented.
SPACING_FACTOR = 2.0


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

    @property
    def is_adversarial(self) -> bool:
        """Whether a discriminator takes part in the training."""
        return self.adversarial_weight > 0 or self.feature_weight > 0


@dataclass
class DiffusionPlan:
    """What the stages `denoiser` and `label` have in common.

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
        variants: Versions of each scan that are computed ahead: the scan itself, and augmented ones; 1 is no
            augmentation. Of a scan larger than `size` each is another random crop.
        rotation: Largest rotation of a variant, degrees.
        scaling: Largest relative change of size of a variant.
        elastic: Above 0 variants are bent too, and all that is done to them is learned as if acquired: for few scans,
            which a denoiser otherwise learns by heart. Standard deviation of the smooth displacement, as a share of the
            distance of its control points (a quarter of the scan's mean edge): of 0.09 lengths change locally by about
            10 %.
        gradient_checkpointing: Trade time for memory; a run may change it on the way.
    """

    channels: tuple[int, ...] = (64, 128, 128)
    attention_levels: tuple[bool, ...] = (False, False, True)
    num_res_blocks: int = 2
    num_head_channels: int = 32
    mask_channels: int = 32
    objective: Objective = field(default_factory=Objective)
    batch_size: int = 8
    steps: int = 4000
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    variants: int = 4
    rotation: float = 8.0
    scaling: float = 0.08
    elastic: float = 0.0
    gradient_checkpointing: bool = False


@dataclass
class DenoiserPlan(DiffusionPlan):
    """Stage `denoiser`: how latents of scans are generated for label maps, texts and other conditions.

    Attributes:
        conditions: What steers it.
        condition_dropout: Chance that a sample trains without a condition, each on its own, for guidance.
        guidance_scale: Default at synthesis; 1 is off.
        temperature: Default at synthesis: factor on the noise that a scan starts from. Below 1 its texture is cleaner.
        balance: Column of the metadata whose values are drawn equally often in training, so that rare ones are learned
            too; null draws every scan equally often.
    """

    conditions: ConditionsPlan = field(default_factory=ConditionsPlan)
    condition_dropout: float = 0.15
    guidance_scale: float = 1.5
    temperature: float = 0.9
    balance: str | None = None


@dataclass
class TuningPlan:
    """How the denoiser of a finished model is trained further; its control branches steer it and stay as they are.

    Attributes:
        lora_rank: Rank of the low-rank changes that are learned (Hu et al. 2022, arXiv:2106.09685), which take little
            memory and are also saved on their own; null tunes all weights of the denoiser.
        lora_targets: Layers that get them, by the end of their names; empty takes all attention layers.
        conditions: Those of its conditions that are read of these scans; the others, label maps that are not to be
            trusted for example, are absent in every scan. null reads all.
    """

    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = ()
    conditions: tuple[str, ...] | None = None


@dataclass
class LabelPlan(DiffusionPlan):
    """Stage `label`: how signed distances of label maps are generated."""


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
        label: Stage 3, which draws new label maps, with keys as for the denoiser; None leaves it out.
        control: Condition, `mask` or `edge`, for which a control branch is trained on a finished model that stays as it
            is; `autoencoder` then says what that model is like, and `denoiser` the pace. None trains none.
        tuning: How a finished model is trained further on these scans, `autoencoder` and `denoiser` as above; None
            trains a model from the start.
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
    label: LabelPlan | None = None
    control: Literal["mask", "edge"] | None = None
    tuning: TuningPlan | None = None
    label_stride: int = 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    validate_every: int = 500
    checkpoint_every: int = 250
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            BadInputError: If a setting is impossible, or two do not fit together; the message starts with the key.
        """
        dims = self.spatial_dims
        _check_counts(self)
        if self.orientation is not None:
            self.orientation = _check_orientation(self.orientation)
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
            if self.autoencoder.is_adversarial and min(patch) < LEAST_ADVERSARIAL_PATCH:
                raise BadInputError(
                    f"autoencoder.patch_size: expected at least {LEAST_ADVERSARIAL_PATCH} voxels per axis, which the "
                    f"discriminator needs, got {list(patch)}. Raise it, or set adversarial_weight and feature_weight "
                    "to 0."
                )
        _check_conditions(self)
        if self.control is not None and self.tuning is not None:
            raise BadInputError("tuning: expected null in a plan for a control branch. Train one after the other.")
        if self.tuning is not None and self.tuning.lora_rank is not None and self.tuning.lora_rank < 1:
            raise BadInputError(f"tuning.lora_rank: expected 1 or more, got {self.tuning.lora_rank}. Raise it.")
        guidance, temperature = self.denoiser.guidance_scale, self.denoiser.temperature
        if not (math.isfinite(guidance) and guidance >= 0):
            raise BadInputError(
                f"denoiser.guidance_scale: expected a finite number of 0 or more, got {guidance}. Correct it."
            )
        if not (math.isfinite(temperature) and temperature > 0):
            raise BadInputError(
                f"denoiser.temperature: expected a finite number above 0, got {temperature}. Correct it."
            )
        for name in STAGES:
            stage = getattr(self, name)
            if stage is None:
                continue
            levels = getattr(stage, "attention_levels", stage.channels)
            if len(levels) != len(stage.channels):
                raise BadInputError(
                    f"{name}.attention_levels: expected one value for each of the {len(stage.channels)} channels, "
                    f"got {len(levels)}. Give as many."
                )

    @property
    def has_base(self) -> bool:
        """Whether it goes on from a finished model."""
        return self.control is not None or self.tuning is not None

    @property
    def read_conditions(self) -> ConditionsPlan:
        """What is read of the scans to steer the training: all that steers the model, or less where it is tuned."""
        own, tuning = self.denoiser.conditions, self.tuning
        return own if tuning is None or tuning.conditions is None else own.only(tuning.conditions)

    @property
    def compression(self) -> int:
        """Voxels of a scan per voxel of its latents, along an axis."""
        return 1 if self.autoencoder is None else int(2 ** (len(self.autoencoder.channels) - 1))

    @property
    def divisor(self) -> int:
        """Sizes on the model's grid are multiples of this."""
        return math.lcm(self.compression, self.label_stride if self.label is not None else 1)

    @property
    def is_lossless(self) -> bool:
        """Whether the latents hold as many numbers as the scan, so that nothing of it is lost."""
        whole = len(self.channel_names) * self.compression**self.spatial_dims
        return self.autoencoder is None or self.autoencoder.latent_channels >= whole


def _check_counts(plan: Plan) -> None:
    """Refuse counts below 1, which would divide by zero or build networks without channels, and scans that fold."""
    counts = {key: getattr(plan, key) for key in ("label_stride", "validate_every", "checkpoint_every")}
    for name in STAGES:
        stage = getattr(plan, name)
        if stage is None:
            continue
        counts |= {f"{name}.{key}": getattr(stage, key) for key in _COUNTS if hasattr(stage, key)}
        if not stage.channels or min(stage.channels) < 1:
            raise BadInputError(
                f"{name}.channels: expected a number of 1 or more for each level, got {list(stage.channels)}. "
                "Correct it."
            )
        bent = getattr(stage, "elastic", 0.0)
        if not 0 <= bent <= _MOST_ELASTIC:
            raise BadInputError(f"{name}.elastic: expected 0 to {_MOST_ELASTIC}, got {bent}. Take 0.09, or 0 for none.")
    for key, count in counts.items():
        if count < 1:
            raise BadInputError(f"{key}: expected 1 or more, got {count}. Raise it.")


def _check_conditions(plan: Plan) -> None:
    """Refuse conditions that cannot be, or that the data of the plan has nothing for."""
    own = plan.denoiser.conditions
    shares = {"condition_dropout": plan.denoiser.condition_dropout}
    shares |= {f"conditions.{name}": getattr(own, name) for name in ("class_dropout", "drop_all")}
    for key, share in shares.items():
        if not 0 <= share < 1:
            raise BadInputError(f"denoiser.{key}: expected a chance in [0, 1), got {share}. Correct it.")
    if own.mask and len(plan.class_names) < 2:
        raise BadInputError(
            f"denoiser.conditions.mask: expected classes beside the background, got {plan.class_names}. Set it to "
            "false, or add label maps."
        )
    if plan.label is not None and not own.mask:
        raise BadInputError("label: expected a denoiser that label maps steer, got one without. Set label to null.")
    taken = sorted({"mask", "edge", "text"} & set(own.attributes))
    if taken:
        raise BadInputError(f"denoiser.conditions.attributes: expected other names than {taken[0]!r}. Rename it.")
    tuned_by = plan.tuning.conditions if plan.tuning is not None else None
    lacking = [name for name in tuned_by or () if name not in own.names]
    if lacking:
        raise BadInputError(
            f"tuning.conditions: expected some of those that steer the model ({', '.join(own.names) or 'none'}), got "
            f"{', '.join(lacking)}. Take it out."
        )
    if own.text is not None and min(own.text.length, own.text.width, own.text.depth, own.text.min_count) < 1:
        raise BadInputError("denoiser.conditions.text: expected sizes of 1 or more. Correct them.")


def _check_orientation(orientation: str) -> str:
    """Axis codes in capitals, as all who compare them expect."""
    codes = orientation.upper()
    if len(codes) != 3 or any(sum(code in pair for code in codes) != 1 for pair in ("LR", "PA", "IS")):
        raise BadInputError(
            f"orientation: expected one letter each of L or R, P or A, and I or S, such as RAS, got {orientation!r}. "
            "Correct it, or set it to null."
        )
    return codes


def _check_size(key: str, size: Shape, dims: int, divisors: Mapping[str, int]) -> None:
    if len(size) != dims or min(size) < 1:
        raise BadInputError(f"{key}: expected {dims} positive numbers of voxels, got {list(size)}. Correct it.")
    for reason, divisor in divisors.items():
        if any(n % divisor for n in size):
            fixed = [-(-n // divisor) * divisor for n in size]
            raise BadInputError(
                f"{key}: expected multiples of {divisor} ({reason}), got {list(size)}. Set it to {fixed}."
            )


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
            channels, classes, stride = len(plan.class_names), 1, plan.label_stride
        else:
            channels = plan.autoencoder.latent_channels if plan.autoencoder else len(plan.channel_names)
            classes, stride = len(plan.class_names), plan.compression
        extra = {"in_channels": channels, "mask_classes": classes, "mask_stride": stride}
        if stage == "denoiser":
            extra |= _condition_arguments(own.conditions) | {"augmentation_flag": own.variants > 1 and not own.elastic}
            extra["mask_classes"] = classes if own.conditions.mask else 0
    return {"spatial_dims": plan.spatial_dims, **{name: getattr(own, name) for name in names}, **extra}


def _condition_arguments(conditions: ConditionsPlan) -> dict[str, Any]:
    """Arguments of the denoiser that say which conditions it reads."""
    text = conditions.text
    return {
        "edges": conditions.edge is not None,
        "text_length": text.length if text else 0,
        "text_width": text.width if text else 0,
        "attributes": {name: attribute.features for name, attribute in conditions.attributes.items()} or None,
    }


def by_axis(values: Iterable[float]) -> str:
    """Sizes or spacings for people.

    Args:
        values: One number per axis.

    Returns:
        As `64 x 48`.
    """
    return " x ".join(f"{value:.4g}" for value in values)
