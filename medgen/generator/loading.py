"""The networks of a generator, by the class that their folder names; pipelines and ControlNets of diffusers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from medgen import networks
from medgen.conditions.edge import EdgeSettings
from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator.config import GeneratorConfig
from medgen.provenance import sha256_array, sha256_file
from medgen.types import BadInputError

if TYPE_CHECKING:
    from medgen.generator.generator import Generator

PIPELINE = "model_index.json"
# Looked up when one is met: those of Stable Diffusion take long to import.
_CLASSES = (
    "Autoencoder",
    "Control",
    "Denoiser",
    "LatentBaseAutoencoder",
    "LatentBaseControl",
    "LatentBaseDenoiser",
    "TextEncoder",
)


def load_network(folder: Path, *, text_padding: bool = False) -> Any:
    """One network of a bundle.

    Args:
        folder: Its folder, checked.
        text_padding: Whether a pretrained text encoder embeds the padding too.

    Returns:
        The network, in evaluation mode, float32.

    Raises:
        BadInputError: If its weights cannot be loaded.
    """
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
        if kind not in _CLASSES:
            return networks.PretrainedTextEncoder.from_folder(folder, keep_padding=text_padding)
        return getattr(networks, kind).from_pretrained(folder, use_safetensors=True).float().eval()
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"{folder}: expected loadable weights, got: {error}. Copy the model again.") from error


def load_pipeline(name: str | Path, folder: Path) -> tuple[GeneratorConfig, dict[str, Any], str]:
    """A pipeline of the Stable Diffusion 1.x or 2.x family as a generator of gray pictures that texts steer.

    Args:
        name: Its folder, or a Hub id.
        folder: Where its files are.

    Returns:
        Settings, the networks by name, and a digest of its weights.

    Raises:
        BadInputError: If it is of another family, incomplete or damaged.
    """
    base = networks.read_latent_base(name)
    channels = base.denoiser.config["in_channels"]
    config = GeneratorConfig(
        name=Path(name).name,
        spatial_dims=2,
        channel_names={0: "image"},
        class_names={0: "background"},
        size=base.size,
        objective=Objective(**base.objective),
        normalization=Normalization(),
        intensity=IntensityMap((2 / 65535,), (-1.0,)),
        image_dtype="uint16",
        orientation=None,
        latent_scale=base.latent_scale * channels,
        latent_shift=base.latent_shift * channels,
        guidance_scale=7.5,
        text_padding=True,
        training={"pipeline": Path(name).name},
    )
    parts = {"denoiser": base.denoiser, "autoencoder": base.autoencoder, "text_encoder": base.text_encoder}
    # Settings too: a scheduler or a tokenizer decides the voxels as much as the weights do.
    kinds = {".safetensors", ".json", ".txt"}
    files = sorted(path for path in folder.rglob("*") if path.suffix in kinds and path.is_file())
    digest = hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()
    return config, parts, digest


def add_edge_control(generator: Generator, name: str | Path) -> None:
    """Let a ControlNet of diffusers steer a model of the Stable Diffusion 1.x or 2.x family by edges.

    Guidance leaves the edges at 1, as diffusers does, and the digest of the model then covers the ControlNet.

    Args:
        generator: The model.
        name: Folder of the ControlNet, or a Hub id.

    Raises:
        BadInputError: If the model is of another family or follows edges already, or the ControlNet does not fit it.
    """
    config = generator.config
    if not isinstance(generator.denoiser, networks.LatentBaseDenoiser):
        raise BadInputError(
            f"edge_control: expected none, because the model '{config.name}' is not of the Stable Diffusion 1.x or 2.x "
            "family, which ControlNets of diffusers are for. Leave it out, or train a branch with `medgen train --base "
            "MODEL --conditions edge`."
        )
    if "edge" in generator.conditions:
        raise BadInputError(
            f"edge_control: expected none, because the model '{config.name}' follows edges already. Leave it out."
        )
    control = networks.read_control(name, generator.denoiser)
    settings = {key: value for key, value in control.config.items() if not key.startswith("_")}
    content = [json.dumps(settings, sort_keys=True, default=str)]
    content += [sha256_array(weight) for _, weight in sorted(control.state_dict().items())]
    generator.weights_hash = hashlib.sha256("".join([generator.weights_hash, *content]).encode()).hexdigest()
    generator.controls["edge"] = control.to(generator.device)
    config.edge = config.edge or EdgeSettings()
    config.training = {**config.training, "edge_control": Path(name).name}
    config.guidance_scales = {**config.guidance_scales, "edge": 1.0}
