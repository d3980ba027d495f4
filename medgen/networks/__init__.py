"""Networks: MONAI building blocks as diffusers models, 2D and 3D in one class, saved as safetensors and JSON.

The networks of pre-trained bases load peft and many parts of diffusers, so they are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from medgen.networks.autoencoder import Autoencoder
from medgen.networks.control import Control
from medgen.networks.denoiser import Denoiser
from medgen.networks.lora import add_lora, find_lora_layers, load_lora, merge_lora, require_peft, save_lora
from medgen.networks.pretrained_text import PretrainedTextEncoder
from medgen.networks.text_encoder import TextEncoder, encode_unique
from medgen.networks.vocabulary import Vocabulary

if TYPE_CHECKING:
    from medgen.networks.latent_base import LatentBaseAutoencoder, LatentBaseDenoiser
    from medgen.networks.latent_control import LatentBaseControl
    from medgen.networks.latent_folder import LatentBase, read_control, read_latent_base

_HOME = {
    "LatentBase": "medgen.networks.latent_folder",
    "LatentBaseAutoencoder": "medgen.networks.latent_base",
    "LatentBaseControl": "medgen.networks.latent_control",
    "LatentBaseDenoiser": "medgen.networks.latent_base",
    "read_control": "medgen.networks.latent_folder",
    "read_latent_base": "medgen.networks.latent_folder",
}

__all__ = [
    "Autoencoder",
    "Control",
    "Denoiser",
    "LatentBase",
    "LatentBaseAutoencoder",
    "LatentBaseControl",
    "LatentBaseDenoiser",
    "PretrainedTextEncoder",
    "TextEncoder",
    "Vocabulary",
    "add_lora",
    "encode_unique",
    "find_lora_layers",
    "load_lora",
    "merge_lora",
    "read_control",
    "read_latent_base",
    "require_peft",
    "save_lora",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
