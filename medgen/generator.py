"""The bundle: one folder that holds the networks of a generator and everything needed to use them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn import functional as F

from medgen.bundle import find_model, read_bundle, write_bundle
from medgen.conditions.condition import Condition
from medgen.conditions.mask import class_distances, from_class_distances
from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.networks import Autoencoder, Denoiser
from medgen.types import BadInputError, Shape

_KINDS = {"autoencoder": Autoencoder, "denoiser": Denoiser, "label_denoiser": Denoiser}


@dataclass
class GeneratorConfig:
    """What a generator was trained for.

    Attributes:
        name: Name of the model.
        spatial_dims: 2 or 3.
        channel_names: Image channels, in file order.
        class_names: Label value to name; 0 is the background.
        size: Least voxels per axis on the model's grid.
        objective: What the denoiser predicts.
        normalization: How real intensities map to [-1, 1].
        intensity: Map typical of the training set; its inverse gives synthetic scans source-like intensities.
        image_dtype: Number type of synthetic images.
        modality: What the scanner was.
        spacing: Voxel size in mm of the model's grid, or None for any.
        orientation: Axis codes of the model's grid, or None.
        latent_scale: Per latent channel, factor to unit variance.
        latent_shift: Per latent channel, mean before scaling.
        label_objective: What the label denoiser predicts.
        label_stride: Voxels per axis that one voxel of the label generator covers.
        guidance_scale: Default at synthesis.
        temperature: Default at synthesis, of images; label maps are drawn at 1.
        shapes: Shapes of training scans on the model's grid before padding, to draw new fields of view from.
        constant_classes: Label values that every training case has.
        max_parts: Connected parts of the foreground that 5 % of the training cases exceed at most; 0 sets no limit.
        training: Summary for the card: data, steps, seeds, versions.
    """

    name: str
    spatial_dims: int
    channel_names: dict[int, str]
    class_names: dict[int, str]
    size: tuple[int, ...]
    objective: Objective
    normalization: Normalization
    intensity: IntensityMap
    image_dtype: Literal["uint8", "uint16", "int16", "float32"] = "int16"
    modality: str | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str | None = "RAS"
    latent_scale: tuple[float, ...] = (1.0,)
    latent_shift: tuple[float, ...] = (0.0,)
    label_objective: Objective | None = None
    label_stride: int = 1
    guidance_scale: float = 1.5
    temperature: float = 1.0
    shapes: tuple[tuple[int, ...], ...] = ()
    constant_classes: tuple[int, ...] = ()
    max_parts: int = 0
    training: dict[str, Any] = field(default_factory=dict)


def _parse_config(values: dict[str, Any], path: Path) -> GeneratorConfig:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GeneratorConfig, "config")
    try:
        return parser.instantiate_classes(parser.parse_object({"config": values})).config
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise BadInputError(
            f"{path}: expected settings of a medgen generator, got others ({error}). Copy the model again."
        ) from error


class Generator:
    """Networks, settings and normalization of one generative model.

    Args:
        config: What it was trained for.
        denoiser: Image denoiser, in latent or pixel space.
        autoencoder: Scans to latents and back; None in pixel space.
        label_denoiser: Generator of label maps; None if it has none.
        weights_hash: SHA-256 over the stored weights and settings; empty before the first save.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        denoiser: Denoiser,
        autoencoder: Autoencoder | None = None,
        label_denoiser: Denoiser | None = None,
        weights_hash: str = "",
    ) -> None:
        self.config = config
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self.label_denoiser = label_denoiser
        self.weights_hash = weights_hash

    @property
    def compression(self) -> int:
        """Image voxels per latent voxel along one axis."""
        return self.autoencoder.compression if self.autoencoder else 1

    @property
    def divisor(self) -> int:
        """Image sizes on the model's grid must be multiples of this."""
        return int(np.lcm(self.compression, self.config.label_stride if self.label_denoiser else 1))

    @property
    def num_classes(self) -> int:
        """Classes of the label map, the background included."""
        return len(self.config.class_names)

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return next(self.denoiser.parameters()).device

    def to(self, *args: Any, **kwargs: Any) -> Generator:
        """Move every network, as `torch.nn.Module.to` does.

        Args:
            *args: Device, dtype or both.
            **kwargs: For example ``memory_format``.

        Returns:
            Itself.
        """
        for network in self._networks().values():
            network.to(*args, **kwargs)
        return self

    def latent_shape(self, image_shape: Shape) -> Shape:
        """Shape of one sample's latents.

        Args:
            image_shape: ``(H, W[, D])`` on the model's grid, multiples of :attr:`divisor`.

        Returns:
            ``(c, h, w[, d])``.
        """
        return (self.denoiser.config["in_channels"], *(size // self.compression for size in image_shape))

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Normalized latents of ``image`` (posterior mean).

        Args:
            image: ``(B, C, *spatial)`` in [-1, 1].

        Returns:
            ``(B, c, *spatial / compression)``, about zero mean and unit variance per channel.
        """
        latents = image if self.autoencoder is None else self.autoencoder.encode(image)[0].float()
        return (latents - self._per_channel(self.config.latent_shift, latents)) * self._per_channel(
            self.config.latent_scale, latents
        )

    def decode(self, latents: torch.Tensor, *, max_memory_gb: float | None = None) -> torch.Tensor:
        """Image of normalized latents.

        Args:
            latents: ``(B, c, *size)``.
            max_memory_gb: Bound for all that decoding adds to the memory in use; None decodes in one piece.

        Returns:
            ``(B, C, *size * compression)`` float32 in [-1, 1].
        """
        raw = latents / self._per_channel(self.config.latent_scale, latents) + self._per_channel(
            self.config.latent_shift, latents
        )
        image = raw if self.autoencoder is None else self.autoencoder.decode(raw, max_memory_gb=max_memory_gb)
        return image.float().clamp_(-1, 1)

    def denoise(self, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Denoiser output in the parametrization of ``config.objective``, float32.

        Args:
            x: ``(B, c, *size)`` noisy latents.
            t: ``(B,)`` in [0, num_train_timesteps).
            condition: What steers it.

        Returns:
            ``(B, c, *size)``.
        """
        return self.denoiser(x, t, condition.mask).float()

    def label_shape(self, image_shape: Shape) -> Shape:
        """Shape of one sample in the label generator's space.

        Args:
            image_shape: ``(H, W[, D])`` on the model's grid.

        Returns:
            ``(K, *image_shape / label_stride)``.
        """
        return (self.num_classes, *(size // self.config.label_stride for size in image_shape))

    def encode_label(self, label: torch.Tensor) -> torch.Tensor:
        """Signed distances of a label map, background included, on the label generator's grid.

        Args:
            label: ``(*spatial)`` class indices.

        Returns:
            ``(K, *spatial / label_stride)`` in [-1, 1].
        """
        distance = class_distances(label, self.num_classes)
        pool = F.avg_pool3d if self.config.spatial_dims == 3 else F.avg_pool2d
        return pool(distance[None], self.config.label_stride)[0]

    def decode_label(self, x: torch.Tensor) -> torch.Tensor:
        """Label maps of signed distances.

        Args:
            x: ``(B, K, *size)``.

        Returns:
            ``(B, *size * label_stride)`` int16 class indices.
        """
        mode = "trilinear" if self.config.spatial_dims == 3 else "bilinear"
        return from_class_distances(F.interpolate(x.float(), scale_factor=self.config.label_stride, mode=mode))

    def denoise_label(self, x: torch.Tensor, t: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Output of the label denoiser, float32.

        Args:
            x: ``(B, K, *size)``.
            t: ``(B,)`` in [0, num_train_timesteps).
            valid: ``(B, 1, *size * label_stride)`` float, 1 inside the field of view.

        Returns:
            ``(B, K, *size)``.

        Raises:
            ValueError: If this generator has no label generator.
        """
        if self.label_denoiser is None:
            raise ValueError("expected a model with a label generator, got one without; train it with stage `label`")
        return self.label_denoiser(x, t, valid).float()

    def label_to_index(self, label: torch.Tensor) -> torch.Tensor:
        """Label values as in the files to class indices 0..K-1.

        Args:
            label: Any shape, values among ``config.class_names``.

        Returns:
            Same shape, int16.

        Raises:
            BadInputError: If a value is not declared.
        """
        values = torch.tensor(sorted(self.config.class_names))
        index = torch.searchsorted(values, label.long().cpu()).clamp(max=len(values) - 1)
        if not torch.equal(values[index], label.long().cpu()):
            found = sorted(set(label.unique().tolist()) - set(self.config.class_names))
            raise BadInputError(
                f"label: expected values among {sorted(self.config.class_names)}, got {found} too. Remap them."
            )
        return index.to(torch.int16)

    def index_to_label(self, index: torch.Tensor) -> torch.Tensor:
        """Class indices 0..K-1 to label values as in the files.

        Args:
            index: Any shape.

        Returns:
            Same shape, int16.
        """
        return torch.tensor(sorted(self.config.class_names), dtype=torch.int16)[index.long().cpu()]

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the model; at every moment, also when killed, the folder holds the old model or the new one.

        Args:
            folder: Made if absent; an older model in it is replaced, other files are left alone.
            dtype: Storage format of the weights; they are float32 again after loading.

        Raises:
            BadInputError: If the disk is full; the old model then remains.
        """
        self.weights_hash = write_bundle(Path(folder), self._networks(), dataclasses.asdict(self.config), dtype=dtype)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device = "cpu") -> Generator:
        """Load a bundle from a folder, by embedded name or by Hub id.

        Args:
            name: Folder of a model or of a training run, embedded name such as ``hippocampus-mr-3d``, or Hub id
                ``owner/name`` (the one case that uses the network).
            device: Where the networks go.

        Returns:
            The generator, in evaluation mode, float32.

        Raises:
            BadInputError: If the folder is missing, incomplete, damaged, or holds pickled weights.
        """
        bundle = read_bundle(find_model(name))
        networks: dict[str, Any] = {}
        for component, folder in bundle.networks.items():
            try:
                network = _KINDS[component].from_pretrained(folder, use_safetensors=True)
            except (OSError, SafetensorError, ValueError, RuntimeError) as error:
                raise BadInputError(
                    f"{folder}: expected loadable weights, got: {error}. Copy the model again."
                ) from error
            networks[component] = network.float().eval().to(device)
        return cls(_parse_config(bundle.config, bundle.settings), weights_hash=bundle.digest, **networks)

    def _networks(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _KINDS if getattr(self, name) is not None}

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, device=like.device, dtype=torch.float32).view(1, -1, *[1] * (like.ndim - 2))
