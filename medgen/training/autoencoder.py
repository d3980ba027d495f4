"""Stage `autoencoder`: reconstruction, KL, adversarial and learned perceptual terms, none of which needs a download."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.nn import functional as F

from medgen.networks import Autoencoder
from medgen.pictures import sample_grid
from medgen.planning import AutoencoderPlan
from medgen.precision import Precision, autocast, memory_format
from medgen.seeding import derive_seed, seeded_noise, spread, stream
from medgen.training.cache import CachedScan, crop_to, read_scan
from medgen.training.loop import average_gradients, sample_index


def build_discriminator(spatial_dims: int, in_channels: int, channels: int) -> nn.Module:
    """Patch discriminator (Isola et al. 2017, arXiv:1611.07004) whose norms are per sample.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        channels: Feature channels of its first layer.

    Returns:
        A network whose output is a list of feature maps, the last one the patch scores.
    """
    return PatchDiscriminator(
        spatial_dims=spatial_dims, in_channels=in_channels, channels=channels, num_layers_d=2, norm="INSTANCE"
    )


def kl_divergence(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Mean over the latents' elements of KL(N(mean, std²) || N(0, 1)), in nats (Kingma & Welling 2014, eq. 10).

    Args:
        mean: ``(B, c, *size)``.
        std: ``(B, c, *size)``, positive.

    Returns:
        Scalar.
    """
    mean, std = mean.float(), std.float()
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()


def generator_loss(
    autoencoder: Autoencoder,
    discriminator: nn.Module | None,
    image: torch.Tensor,
    noise: torch.Tensor,
    *,
    kl_weight: float,
    adversarial_weight: float,
    feature_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of the autoencoder on one batch.

    The perceptual term compares the discriminator's features of image and reconstruction (Wang et al. 2018,
    arXiv:1711.11585, eq. 4): it is learned on the user's own scans in place of a network trained on photographs.

    Args:
        autoencoder: The network under training.
        discriminator: Its opponent, or None before the adversarial phase.
        image: ``(B, C, *spatial)`` in [-1, 1].
        noise: Standard normal noise of the latents' shape.
        kl_weight: Weight of the KL term.
        adversarial_weight: Weight of the hinge term.
        feature_weight: Weight of feature matching.

    Returns:
        Total loss, reconstruction, and the single terms for the log.
    """
    reconstruction, mean, std = autoencoder(image, noise)
    reconstruction = reconstruction.float()
    terms = {"l1": F.l1_loss(reconstruction, image.float()), "kl": kl_divergence(mean, std)}
    loss = terms["l1"] + kl_weight * terms["kl"]
    if discriminator is not None:
        fake = discriminator(reconstruction)
        with torch.no_grad():
            real = discriminator(image)
        matches = [F.l1_loss(a.float(), b.float()) for a, b in zip(fake[:-1], real[:-1], strict=True)]
        terms["features"] = torch.stack(matches).mean()
        terms["adversarial"] = -fake[-1].float().mean()
        loss = loss + feature_weight * terms["features"] + adversarial_weight * terms["adversarial"]
    return loss, reconstruction, terms


def discriminator_loss(discriminator: nn.Module, image: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017, arXiv:1705.02894).

    Args:
        discriminator: The opponent.
        image: ``(B, C, *spatial)`` real scans.
        reconstruction: ``(B, C, *spatial)``, detached.

    Returns:
        Scalar.
    """
    real, fake = discriminator(image)[-1].float(), discriminator(reconstruction)[-1].float()
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class AutoencoderStage:
    """Trains an autoencoder, and from ``adversarial_start`` on its discriminator, on random crops.

    Args:
        autoencoder: The network.
        plan: Weights, sizes and rates.
        train: Scans to learn from.
        val: Scans to measure on.
        accelerator: Device and processes.
        precision: ``"bf16"`` or ``"fp32"``.
        seed: Root of all draws.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        plan: AutoencoderPlan,
        train: list[CachedScan],
        val: list[CachedScan],
        *,
        accelerator: Accelerator,
        precision: Precision,
        seed: int,
    ) -> None:
        self.name = "autoencoder"
        self.plan, self.train, self.val, self.seed = plan, train, val, seed
        self.accelerator, self.precision = accelerator, precision
        self.steps, self.learning_rate, self.ema_decay = plan.steps, plan.learning_rate, 0.998
        self.can_save_memory = False
        dims = autoencoder.config["spatial_dims"]
        layout = memory_format(dims)
        self.averaged = autoencoder.to(accelerator.device, memory_format=layout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, self.name, "discriminator"))
            discriminator = build_discriminator(dims, autoencoder.config["in_channels"], plan.discriminator_channels)
        self.discriminator = discriminator.to(accelerator.device, memory_format=layout)  # type: ignore[call-overload]
        self.networks = {"autoencoder": self.averaged, "discriminator": self.discriminator}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "autoencoder": torch.optim.AdamW(autoencoder.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True),
            "discriminator": torch.optim.AdamW(
                [{"params": list(discriminator.parameters()), "scale": 0.2}], betas=(0.5, 0.9), weight_decay=0.0
            ),
        }

    def _crop(self, position: int) -> torch.Tensor:
        """One crop, mirrored at random along each axis: without its label, a mirrored texture is as good as any."""
        draw = stream(self.seed, self.name, "crop", position)
        scan = self.train[sample_index(position, len(self.train), self.seed, self.name)]
        image = crop_to({"image": read_scan(scan)["image"]}, self.plan.patch_size, draw)["image"]
        axes = [axis + 1 for axis in range(image.ndim - 1) if torch.rand((), generator=draw) < 0.5]
        return torch.flip(image, axes)

    def update(self, step: int, positions: list[int]) -> dict[str, torch.Tensor]:
        """One step of the autoencoder and, in the adversarial phase, one of the discriminator.

        Args:
            step: 0-based step.
            positions: Positions of this process's samples in the data order.

        Returns:
            Terms of the loss.
        """
        device = self.accelerator.device
        layout = memory_format(self.averaged.config["spatial_dims"])
        image = torch.stack([self._crop(position) for position in positions]).to(device, memory_format=layout)
        size = [length // self.averaged.compression for length in image.shape[2:]]
        seeds = [derive_seed(self.seed, self.name, position) for position in positions]
        noise = seeded_noise((self.averaged.config["latent_channels"], *size), seeds).to(device)
        opposed = self.plan.adversarial_weight > 0 or self.plan.feature_weight > 0
        adversarial = opposed and step >= self.plan.adversarial_start
        self.discriminator.requires_grad_(False)
        with autocast(device, self.precision):
            loss, reconstruction, terms = generator_loss(
                self.averaged,
                self.discriminator if adversarial else None,
                image,
                noise,
                kl_weight=self.plan.kl_weight,
                adversarial_weight=self.plan.adversarial_weight,
                feature_weight=self.plan.feature_weight,
            )
        self._step("autoencoder", self.averaged, loss)
        # The discriminator starts a little earlier, so that the first adversarial gradients already mean something.
        if opposed and step >= self.plan.adversarial_start - 50:
            self.discriminator.requires_grad_(True)
            with autocast(device, self.precision):
                terms["discriminator"] = discriminator_loss(self.discriminator, image, reconstruction.detach())
            self._step("discriminator", self.discriminator, terms["discriminator"])
        return terms

    def _step(self, name: str, network: nn.Module, loss: torch.Tensor) -> None:
        loss.backward()
        average_gradients(self.accelerator, network.parameters())
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)

    @torch.no_grad()
    def validate(self, step: int, picture: Path) -> dict[str, float]:
        """Reconstruct validation scans: mean L1 and PSNR, and a picture of originals above reconstructions.

        Args:
            step: Steps done.
            picture: PNG to write.

        Returns:
            Figures for the log.
        """
        originals, copies, scans = [], [], spread(self.val, 16)
        for scan in scans:
            image = crop_to({"image": read_scan(scan)["image"]}, self.plan.patch_size, None)["image"]
            with autocast(self.accelerator.device, self.precision):
                copies.append(self.averaged(image[None].to(self.accelerator.device))[0][0].float().cpu())
            originals.append(image)
        real, copy = torch.stack(originals), torch.stack(copies).clamp(-1, 1)
        shown = spread(range(len(scans)), 4)
        captions = [f"{kind} {scans[index].case}" for kind in ("real", "copy") for index in shown]
        sample_grid(torch.cat([real[shown], copy[shown]]), None, picture, captions=captions)
        error = (real - copy).square().flatten(1).mean(1)
        return {"val_l1": float(F.l1_loss(copy, real)), "val_psnr": float((10 * torch.log10(4 / error)).mean())}
