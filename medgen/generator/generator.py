"""The generator: its networks, and what they do with scans, label maps and conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from medgen.bundle import SETTINGS, find_model, read_bundle, write_bundle
from medgen.conditions.condition import Condition
from medgen.conditions.mask import class_distances, from_class_distances
from medgen.generator.config import ControlUse, GeneratorConfig, parse_config
from medgen.generator.loading import PIPELINE, add_edge_control, load_network, load_pipeline
from medgen.types import BadInputError, Shape

if TYPE_CHECKING:
    from medgen.networks import (
        Autoencoder,
        Control,
        Denoiser,
        LatentBaseAutoencoder,
        LatentBaseControl,
        LatentBaseDenoiser,
        PretrainedTextEncoder,
        TextEncoder,
    )

_CONTROL = "control_"  # before the condition, in the name of a branch's folder


class Generator:
    """Networks, settings and normalization of one generative model.

    Args:
        config: What it was trained for.
        denoiser: Image denoiser, in latent or pixel space.
        autoencoder: Scans to latents and back; None in pixel space.
        label_denoiser: Generator of label maps; None if it has none.
        text_encoder: Reads the texts that steer it; None if texts do not.
        controls: Control branches, by the condition that they read.
        weights_hash: SHA-256 over the stored weights and settings; empty before the first save.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        denoiser: Denoiser | LatentBaseDenoiser,
        autoencoder: Autoencoder | LatentBaseAutoencoder | None = None,
        label_denoiser: Denoiser | None = None,
        text_encoder: TextEncoder | PretrainedTextEncoder | None = None,
        controls: Mapping[str, Control | LatentBaseControl] | None = None,
        weights_hash: str = "",
    ) -> None:
        self.config = config
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self.label_denoiser = label_denoiser
        self.text_encoder = text_encoder
        self.controls = dict(controls or {})
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
    def conditions(self) -> tuple[str, ...]:
        """Names of what steers it."""
        built_in = self.denoiser.condition_shapes((1,) * self.config.spatial_dims)
        return tuple(dict.fromkeys([*built_in, *sorted(self.controls)]))

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

    def denoise(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        *,
        controls: Mapping[str, ControlUse] | None = None,
    ) -> torch.Tensor:
        """Denoiser output in the parametrization of ``config.objective``, float32.

        Args:
            x: ``(B, c, *size)`` noisy latents.
            t: ``(B,)`` in [0, num_train_timesteps), all equal where a control does not act throughout.
            condition: What steers it. A control branch whose condition is absent is not run.
            controls: How each control branch takes part, by its condition; others act as trained.

        Returns:
            ``(B, c, *size)``.
        """
        done = 1 - float(t[0]) / self.config.objective.num_train_timesteps
        residuals = []
        for name, control in sorted(self.controls.items()):  # one order, as it decides the rounding
            use = (controls or {}).get(name, ControlUse())
            if name in condition.parts and use.conditioning_scale and use.start <= done <= use.end:
                residuals.append(control(x, t, condition.parts, conditioning_scale=use.conditioning_scale))
        built_in = self.denoiser.condition_shapes(x.shape[2:])
        parts = {name: part for name, part in condition.parts.items() if name in built_in or name not in self.controls}
        return self.denoiser(x, t, parts, residuals=residuals).float()

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
        return self.label_denoiser(x, t, {"mask": valid}).float()

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
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", edge_control: str | Path | None = None
    ) -> Generator:
        """Load a bundle from a folder, by embedded name or by Hub id; or a Stable Diffusion pipeline.

        Args:
            name: Folder of a model or of a training run, embedded name such as ``hippocampus-mr-3d``, folder of a
                pipeline of the Stable Diffusion 1.x or 2.x family in diffusers' layout, or Hub id ``owner/name`` of
                either (the one case that uses the network).
            device: Where the networks go.
            edge_control: Folder or Hub id of a ControlNet in diffusers' layout by which edges steer a model of that
                family. It does not say how its edges were extracted: those of scans then are medgen's own
                (:class:`medgen.conditions.edge.EdgeSettings`), and saving packs it into the bundle.

        Returns:
            The generator, in evaluation mode, float32.

        Raises:
            BadInputError: If the folder is missing, incomplete, damaged, or holds pickled weights, or if the ControlNet
                does not fit the model.
        """
        folder = Path(name) if (Path(name) / PIPELINE).is_file() else find_model(name)
        if (folder / PIPELINE).is_file() and not (folder / SETTINGS).is_file():
            config, networks, digest = load_pipeline(name, folder)
        else:
            bundle = read_bundle(folder)
            config, digest = parse_config(bundle.config, bundle.settings), bundle.digest
            networks = {
                part: load_network(path, text_padding=config.text_padding) for part, path in bundle.networks.items()
            }
        for network in networks.values():
            network.to(device)
        controls = {part.removeprefix(_CONTROL): networks.pop(part) for part in list(networks) if _CONTROL in part}
        generator = cls(config, controls=controls, weights_hash=digest, **networks)
        if edge_control is not None:
            add_edge_control(generator, edge_control)
        return generator

    def _networks(self) -> dict[str, Any]:
        named = {part: getattr(self, part) for part in ("autoencoder", "denoiser", "label_denoiser", "text_encoder")}
        named |= {f"{_CONTROL}{name}": control for name, control in self.controls.items()}
        return {name: network for name, network in named.items() if network is not None}

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, device=like.device, dtype=torch.float32).view(1, -1, *[1] * (like.ndim - 2))
