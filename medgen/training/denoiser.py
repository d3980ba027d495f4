"""Stages `denoiser` and `label`: one diffusion objective, over latents of scans or signed distances of label maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from medgen.conditions.condition import Condition
from medgen.conditions.mask import one_hot
from medgen.diffusion.objective import Objective
from medgen.networks import Denoiser
from medgen.planning import DiffusionPlan
from medgen.precision import Precision, autocast, memory_format
from medgen.seeding import derive_seed, seeded_noise, stream
from medgen.training.loop import average_gradients, sample_index

# Voxels outside a scan's field of view are reflections that nobody sees; they count little, but keep the rim sane.
OUTSIDE_WEIGHT = 0.1


def diffusion_loss(
    output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, region: torch.Tensor
) -> torch.Tensor:
    """Weighted mean squared error of a batch.

    Args:
        output: ``(B, c, *size)`` of the network.
        target: As ``output``.
        weight: ``(B,)`` weight of each sample's timestep.
        region: ``(B, 1, *size)`` weight of each voxel.

    Returns:
        ``(B,)`` loss per sample.
    """
    error = (output.float() - target).square() * region
    return weight * error.flatten(1).sum(1) / (region.flatten(1).sum(1) * output.shape[1])


def draw_variant(augmented: torch.Tensor, seed: int) -> int:
    """Choose a version of a scan: half of the draws are as acquired, which is what synthesis asks for.

    Args:
        augmented: ``(V,)`` bool, the versions as acquired first.
        seed: Decides the draw.

    Returns:
        Index of the version.
    """
    changed = int(augmented.sum())
    acquired = len(augmented) - changed
    chance = stream(seed, "variant")
    draw = int(torch.randint(max(1, 2 * changed), (1,), generator=chance))
    return acquired + draw if draw < changed else int(torch.randint(acquired, (1,), generator=chance))


class DenoiserStage:
    """Trains one denoiser on cached clean samples.

    Args:
        name: ``"denoiser"`` or ``"label"``.
        denoiser: The network.
        plan: Rates, sizes, dropout.
        objective: What it predicts.
        train: Files of the variant cache to learn from.
        val: Files to measure on.
        num_classes: Channels of the mask: classes of the label map, or 1 for the field of view alone.
        preview: Called with the number of steps and a PNG path at each validation, averaged weights in place.
        accelerator: Device and processes.
        precision: ``"bf16"`` or ``"fp32"``.
        seed: Root of all draws.
    """

    def __init__(
        self,
        name: str,
        denoiser: Denoiser,
        plan: DiffusionPlan,
        objective: Objective,
        train: list[Path],
        val: list[Path],
        *,
        num_classes: int,
        preview: Callable[[int, Path], None],
        accelerator: Accelerator,
        precision: Precision,
        seed: int,
    ) -> None:
        self.name, self.plan, self.objective = name, plan, objective
        self.train, self.val, self.num_classes, self.preview = train, val, num_classes, preview
        self.accelerator, self.precision, self.seed = accelerator, precision, seed
        self.steps, self.learning_rate, self.ema_decay = plan.steps, plan.learning_rate, plan.ema_decay
        self.can_save_memory = not plan.gradient_checkpointing
        layout = memory_format(denoiser.config["spatial_dims"])
        self.averaged = denoiser.to(accelerator.device, memory_format=layout).train()
        self.networks: dict[str, nn.Module] = {"denoiser": self.averaged}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "denoiser": torch.optim.AdamW(denoiser.parameters(), betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
        }

    def _read(self, path: Path, seed: int | None) -> tuple[torch.Tensor, ...]:
        """Clean sample, one-hot mask and voxel weights of a version of a scan (None: the first); if it is augmented."""
        with safe_open(path, framework="pt") as file:
            flags = file.get_tensor("augmented")
            variant = 0 if seed is None else draw_variant(flags, seed)
            x, label, valid = (file.get_slice(name)[variant] for name in ("x", "label", "valid"))
        if self.num_classes == 1:
            mask = valid[None].float()
        else:
            mask = one_hot(label[None].long(), self.num_classes, valid=valid[None])[0]
        stride = valid.shape[-1] // x.shape[-1]
        pool = F.avg_pool3d if valid.ndim == 3 else F.avg_pool2d
        inside = pool(valid[None, None].float(), stride)[0]
        return x.float(), mask, OUTSIDE_WEIGHT + (1 - OUTSIDE_WEIGHT) * inside, flags[variant]

    def _loss(
        self, rows: Sequence[tuple[torch.Tensor, ...]], seeds: list[int], dropout: float, t: torch.Tensor | None = None
    ) -> torch.Tensor:
        device = self.accelerator.device
        x0, mask, region, augmented = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
        noise = seeded_noise(x0.shape[1:], seeds).to(device)
        if t is None:
            t = torch.cat([self.objective.sample_timesteps(1, generator=stream(seed, "t")) for seed in seeds])
        t = t.to(device)
        # One stream a sample, as for the noise: what is dropped does not depend on the batch.
        parts = [
            Condition(row[None]).drop(dropout, generator=stream(seed, "drop"))
            for row, seed in zip(mask, seeds, strict=True)
        ]
        condition = torch.cat([part.mask for part in parts if part.mask is not None])
        noisy = self.objective.add_noise(x0, noise, t).to(memory_format=memory_format(x0.ndim - 2))
        with autocast(device, self.precision):
            output = self.averaged(noisy, t, condition, augmented)
        return diffusion_loss(output, self.objective.target(x0, noise, t), self.objective.weight(t).to(device), region)

    def update(self, step: int, positions: list[int]) -> dict[str, torch.Tensor]:
        """One optimizer step.

        Args:
            step: 0-based step.
            positions: Positions of this process's samples in the data order.

        Returns:
            The loss.
        """
        seeds = [derive_seed(self.seed, self.name, position) for position in positions]
        rows = []
        for position, seed in zip(positions, seeds, strict=True):
            path = self.train[sample_index(position, len(self.train), self.seed, self.name)]
            rows.append(self._read(path, seed))
        loss = self._loss(rows, seeds, getattr(self.plan, "condition_dropout", 0.0)).mean()
        loss.backward()
        average_gradients(self.accelerator, self.averaged.parameters())
        nn.utils.clip_grad_norm_(self.averaged.parameters(), 1.0)
        self.optimizers["denoiser"].step()
        self.optimizers["denoiser"].zero_grad(set_to_none=True)
        return {"loss": loss}

    @torch.no_grad()
    def validate(self, step: int, picture: Path) -> dict[str, float]:
        """Loss on validation scans at fixed noise and evenly spread times, then the preview.

        Args:
            step: Steps done.
            picture: PNG to write.

        Returns:
            Figures for the log.
        """
        self.averaged.eval()
        files = self.val[:32]
        losses = []
        for first in range(0, len(files), 8):
            part = files[first : first + 8]
            rows = [self._read(path, None) for path in part]
            t = (torch.arange(first, first + len(part)) + 0.5) / len(files) * self.objective.num_train_timesteps
            seeds = [derive_seed(self.seed, "validate", path.stem) for path in part]
            losses.append(self._loss(rows, seeds, 0.0, t.floor()))
        self.preview(step, picture)
        self.averaged.train()
        return {"val_loss": float(torch.cat(losses).mean())} if losses else {}
