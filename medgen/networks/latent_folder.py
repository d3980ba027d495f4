"""Pre-trained bases in diffusers' layout: pipelines of Stable Diffusion 1.x and 2.x, and ControlNets for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError

from medgen.networks.latent_base import LatentBaseAutoencoder, LatentBaseDenoiser
from medgen.networks.latent_control import LatentBaseControl
from medgen.networks.pretrained_text import PretrainedTextEncoder, find_folder
from medgen.types import BadInputError

_FAMILY = "the Stable Diffusion 1.x or 2.x family"
_PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "", "tokenizer": "", "scheduler": ""}
# Parts and settings by which other families give themselves away.
_FOREIGN_PARTS = ("transformer", "text_encoder_2", "text_encoder_3", "prior", "decoder", "unet_2")
_FOREIGN_SETTINGS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What is downloaded of a Hub repository, which often has each network several times.
_HUB_FILES = [
    "*.json",
    "tokenizer/*",
    *(f"{part}/diffusion_pytorch_model{end}.safetensors" for part in ("unet", "vae") for end in ("", "-*-of-*")),
    *(f"text_encoder/model{end}.safetensors" for end in ("", "-*-of-*")),
    "diffusion_pytorch_model.safetensors",
]
# What the objectives of medgen know; beta at the first and the last step.
_BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02), "squaredcos_cap_v2": None}


@dataclass(frozen=True)
class LatentBase:
    """A pre-trained base, ready to be tuned or steered.

    Attributes:
        denoiser: Its U-Net.
        autoencoder: Its autoencoder.
        text_encoder: Its text encoder, frozen, with the padding that the U-Net was trained with.
        objective: What the U-Net predicts: arguments of :class:`medgen.diffusion.objective.Objective`. All times weigh
            the same, as in its own training.
        size: ``(H, W)`` in pixels that it was trained at.
        latent_scale: Factor to about unit variance of the latents, for all channels.
        latent_shift: Mean of the latents before scaling, for all channels.
    """

    denoiser: LatentBaseDenoiser
    autoencoder: LatentBaseAutoencoder
    text_encoder: PretrainedTextEncoder
    objective: dict[str, Any]
    size: tuple[int, int]
    latent_scale: tuple[float, ...]
    latent_shift: tuple[float, ...]


@torch.no_grad()
def read_latent_base(name: str | Path, *, image_channels: int = 1) -> LatentBase:
    """Load a pipeline of the Stable Diffusion 1.x or 2.x family in float32; only a Hub id asks the network.

    Args:
        name: Folder with ``model_index.json``, ``unet/``, ``vae/``, ``text_encoder/``, ``tokenizer/`` and
            ``scheduler/``, or ``owner/name`` on the Hub, which is asked only where no local folder ``owner`` exists.
            Its safety checker, if it has one, is not used.
        image_channels: Channels of the scans, 1 or 3.

    Returns:
        The networks, in evaluation mode, and their settings.

    Raises:
        BadInputError: If the folder is of another family, a file is missing or damaged, weights are pickled, parts do
            not fit each other, or the noise schedule is not one that medgen knows.
    """
    folder = find_folder(name, "a folder in diffusers' layout", _HUB_FILES)
    _check_family(folder, _read_json(folder / "model_index.json", "the folder of a diffusers pipeline"))
    settings = _read_json(folder / "unet" / "config.json", "the U-Net's configuration")
    _check_unet(folder, settings)
    objective = _read_objective(folder / "scheduler")
    text_encoder = PretrainedTextEncoder.from_folder(folder, keep_padding=True)
    if settings.get("cross_attention_dim", 1280) != text_encoder.width:
        raise BadInputError(
            f"{folder}: expected a text encoder of width {settings.get('cross_attention_dim', 1280)}, as unet/ attends "
            f"to, got one of {text_encoder.width}. Take unet/ and text_encoder/ of one model."
        )
    unet = _load(diffusers.UNet2DConditionModel, folder / "unet")
    vae = _load(diffusers.AutoencoderKL, folder / "vae")
    if vae.config["latent_channels"] != unet.config["in_channels"]:
        raise BadInputError(
            f"{folder}: expected an autoencoder with {unet.config['in_channels']} latent channels, as unet/ takes, got "
            f"one with {vae.config['latent_channels']}. Take unet/ and vae/ of one model."
        )
    autoencoder = LatentBaseAutoencoder.of(vae, in_channels=image_channels)
    empty = text_encoder.encode([""])[0]
    denoiser = LatentBaseDenoiser.of(unet, empty, mask_stride=autoencoder.compression)
    return LatentBase(
        denoiser=denoiser.eval(),
        autoencoder=autoencoder.eval(),
        text_encoder=text_encoder,
        objective=objective,
        size=_image_size(folder, unet.config["sample_size"], autoencoder.compression),
        latent_scale=(float(vae.config["scaling_factor"]),),
        latent_shift=(float(vae.config.get("shift_factor") or 0.0),),
    )


def read_control(name: str | Path, base: LatentBaseDenoiser, *, condition: str = "edge") -> LatentBaseControl:
    """Load a ControlNet of diffusers in float32; only a Hub id asks the network.

    Args:
        name: Folder with ``config.json`` and weights, or ``owner/name`` on the Hub, which is asked only where no local
            folder ``owner`` exists.
        base: What it is to steer.
        condition: Name of its map: ``edge`` takes the strength of the edges for all its channels; another map must
            have as many channels as it reads.

    Returns:
        The branch, in evaluation mode.

    Raises:
        BadInputError: If it is no ControlNet, a file is missing or damaged, weights are pickled, or it does not fit the
            base.
    """
    folder = find_folder(name, "a folder in diffusers' layout", _HUB_FILES)
    settings = _read_json(folder / "config.json", "the folder of a diffusers ControlNet")
    if settings.get("_class_name") != "ControlNetModel":
        raise BadInputError(
            f"{folder}: expected a ControlNetModel of diffusers, got {settings.get('_class_name', 'another model')}. "
            f"Name a ControlNet for {_FAMILY}."
        )
    controlnet = _load(diffusers.ControlNetModel, folder)
    names = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")
    expected, found = ({key: _comparable(net.config[key]) for key in names} for net in (base.unet, controlnet))
    expected["addition_embed_type"], found["addition_embed_type"] = None, controlnet.config["addition_embed_type"]
    # Each step of the embedding of its map halves it, down to the size of the latents.
    expected["map voxels per latent voxel"] = base.config["mask_stride"]
    found["map voxels per latent voxel"] = 2 ** (len(controlnet.config["conditioning_embedding_out_channels"]) - 1)
    other = [key for key in expected if expected[key] != found[key]]
    if other:
        raise BadInputError(
            f"{folder}: expected a ControlNet for this base, with {other[0]} {expected[other[0]]}, got "
            f"{found[other[0]]}. Name one that was trained for the base."
        )
    return LatentBaseControl.around(controlnet, base, condition).eval()


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise BadInputError(f"{path}: expected {what}, got no such file. Name a whole folder as diffusers saves it.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path}: expected JSON, got a damaged file ({error}). Copy it again.") from error
    if not isinstance(values, dict):
        raise BadInputError(f"{path}: expected {what}, got JSON of another kind. Copy it again.")
    return values


def _check_family(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse pipelines with other parts; an optional part that is left out stands as ``[null, null]``."""
    kinds = {
        part: entry[1] for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]
    }
    foreign = [f"{part} ({kinds[part]})" for part in _FOREIGN_PARTS if part in kinds]
    foreign += [f"no {part}" for part in _PARTS if part not in kinds]
    foreign += [
        f"{part} {kinds[part]}" for part, kind in _PARTS.items() if part in kinds and kind not in ("", kinds[part])
    ]
    if foreign:
        raise BadInputError(
            f"{folder}: expected a base of {_FAMILY} ({', '.join(_PARTS)}), got {index.get('_class_name', 'another')} "
            f"with {', '.join(foreign)}. Name another base."
        )


def _check_unet(folder: Path, settings: Mapping[str, Any]) -> None:
    channels = [settings.get(key, 4) for key in ("in_channels", "out_channels")]
    if channels != [4, 4]:
        kinds = {
            9: " (an inpainting model)",
            8: " (an image editing model)",
            5: " (a depth model)",
            7: " (an upscaler)",
        }
        raise BadInputError(
            f"{folder}: expected a U-Net with 4 channels in and out, as text-to-image models of {_FAMILY} have, got "
            f"{channels[0]} in and {channels[1]} out{kinds.get(channels[0], '')}. Name a text-to-image base."
        )
    given = [f"{key} {settings[key]!r}" for key in _FOREIGN_SETTINGS if settings.get(key) is not None]
    if isinstance(settings.get("cross_attention_dim"), list):
        given.append("several widths of text")
    if given:
        raise BadInputError(
            f"{folder}: expected a U-Net of {_FAMILY}, steered by text alone, got one with {', '.join(given)}, as "
            "SDXL, distilled and class-conditional models have. Name another base."
        )


def _read_objective(folder: Path) -> dict[str, Any]:
    """Arguments of the objective that the scheduler stands for."""
    path = folder / "scheduler_config.json"
    stored = _read_json(path, "the scheduler's configuration")
    kind = getattr(diffusers, str(stored.get("_class_name")), None)
    if kind is None or not hasattr(kind, "from_config"):
        raise BadInputError(
            f"{path}: expected a scheduler of diffusers, got {stored.get('_class_name')}. Save the pipeline with "
            "another, such as DDIMScheduler."
        )
    scheduler = kind.from_config(stored)
    config = scheduler.config
    # A scheduler keeps settings of others that it does not read, so that they do not tell its kind.
    prediction = config.get("prediction_type") if hasattr(scheduler, "alphas_cumprod") else None
    if prediction not in ("epsilon", "v_prediction"):
        raise BadInputError(
            f"{path}: expected prediction_type epsilon or v_prediction, as in {_FAMILY}, got {prediction or 'none'} "
            f"({stored['_class_name']}). Name another base."
        )
    schedule, ends = config.get("beta_schedule"), (config.get("beta_start"), config.get("beta_end"))
    if config.get("trained_betas") is not None:
        schedule = "trained_betas"
    known = _BETAS.get(str(schedule), ())
    if known is not None and not (known and all(map(isclose, known, ends))):
        raise BadInputError(
            f"{path}: expected beta_schedule scaled_linear from 0.00085 to 0.012, linear from 0.0001 to 0.02 or "
            f"squaredcos_cap_v2, got {schedule} from {ends[0]} to {ends[1]}. Name another base."
        )
    return {
        "prediction": prediction,
        "num_train_timesteps": int(config["num_train_timesteps"]),
        "beta_schedule": schedule,
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "min_snr_gamma": None,
    }


def _image_size(folder: Path, sample_size: Any, compression: int) -> tuple[int, int]:
    if sample_size is None:
        raise BadInputError(
            f"{folder / 'unet' / 'config.json'}: expected the sample_size that the U-Net was trained at, got none. Add "
            "it, for example 64 for pictures of 512."
        )
    height, width = sample_size if isinstance(sample_size, (list, tuple)) else (sample_size, sample_size)
    return int(height) * compression, int(width) * compression


def _load(kind: Any, folder: Path) -> Any:
    """A network of diffusers, whole and in float32."""
    _read_json(folder / "config.json", f"a {kind.__name__} of diffusers")
    if not any((folder / f"{_WEIGHTS}{end}").is_file() for end in ("", ".index.json")):
        found = [path.name for pattern in (*_PICKLES, "*.safetensors") for path in folder.glob(pattern)]
        advice = "Copy the folder whole."
        if found and not found[0].endswith(".safetensors"):
            advice = (
                "It is a pickle, which can run code when opened. Convert it where you trust it: load it in diffusers "
                "and save it with save_pretrained."
            )
        elif found:
            advice = f"Rename it, or save the network with save_pretrained, as {_WEIGHTS}."
        raise BadInputError(f"{folder}: expected {_WEIGHTS}, got {found[0] if found else 'no weights'}. {advice}")
    try:
        network, report = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise BadInputError(
            f"{folder}: expected the class {kind.__name__} as diffusers saves it, got an error: "
            f"{str(error).strip().partition(chr(10))[0]} Save or download it again, whole."
        ) from error
    if report["missing_keys"]:
        raise BadInputError(
            f"{folder}: expected weights of the whole network, got none for "
            f"{', '.join(sorted(report['missing_keys'])[:3])}. Save or download it again."
        )
    return network.float().eval()


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
