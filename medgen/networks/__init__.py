"""Networks: MONAI building blocks as diffusers models, 2D and 3D in one class, saved as safetensors and JSON."""

from medgen.networks.autoencoder import Autoencoder
from medgen.networks.denoiser import Denoiser

__all__ = ["Autoencoder", "Denoiser"]
