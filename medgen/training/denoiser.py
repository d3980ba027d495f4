"""Stages `denoiser` and `label`: one diffusion objective, over latents of scans or signed distances of label maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from medgen.conditions.condition import Condition
from medgen.diffusion.objective import Objective
from medgen.planning import DiffusionPlan
from medgen.precision import Precision, autocast, memory_format
from medgen.seeding import derive_seed, seeded_noise, spread, stream
from medgen.training.control import ControlledDenoiser
from medgen.training.loop import average_gradients, sample_index
from medgen.training.steering import Steering, is_trained

if TYPE_CHECKING:
    from medgen.training.control import AnyDenoiser

_Scan = TypeVar("_Scan")

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


def balance_draws(scans: Sequence[_Scan], groups: Sequence[str]) -> list[_Scan]:
    """Repeat the scans of small groups, so that a pass over all scans draws every group equally often.

    Args:
        scans: What is drawn from.
        groups: Of each scan.

    Returns:
        For each group as many scans as the largest has; within a group no scan occurs more than once more often than
        another.
    """
    members: dict[str, list[_Scan]] = {}
    for scan, group in zip(scans, groups, strict=True):
        members.setdefault(group, []).append(scan)
    most = max(map(len, members.values()))
    return [own[index % len(own)] for own in members.values() for index in range(most)]


class _Row(NamedTuple):
    """One version of a scan: clean sample, weight of each voxel, whether it is augmented, and what steers it."""

    x0: torch.Tensor
    region: torch.Tensor
    augmented: torch.Tensor
    condition: Condition
    text: str


class DenoiserStage:
    """Trains one denoiser on cached clean samples.

    Args:
        name: ``"denoiser"``, ``"label"``, ``"control"`` or ``"tuning"``.
        denoiser: The network; of one with control branches only its ``learner`` learns.
        plan: Rates, sizes, dropout.
        objective: What it predicts.
        train: Files of the variant cache to learn from.
        val: Files to measure on.
        steering: What steers each sample; its text encoder, if it is trained, is trained too.
        preview: Called with the number of steps and a PNG path at each validation, averaged weights in place.
        accelerator: Device and processes.
        precision: ``"bf16"`` or ``"fp32"``.
        seed: Root of all draws.
    """

    def __init__(
        self,
        name: str,
        denoiser: AnyDenoiser | ControlledDenoiser,
        plan: DiffusionPlan,
        objective: Objective,
        train: list[Path],
        val: list[Path],
        *,
        steering: Steering,
        preview: Callable[[int, Path], None],
        accelerator: Accelerator,
        precision: Precision,
        seed: int,
    ) -> None:
        self.name, self.plan, self.objective = name, plan, objective
        self.train, self.val, self.steering, self.preview = train, val, steering, preview
        self.accelerator, self.precision, self.seed = accelerator, precision, seed
        self.steps, self.learning_rate, self.ema_decay = plan.steps, plan.learning_rate, plan.ema_decay
        self.can_save_memory = not plan.gradient_checkpointing
        layout = memory_format(denoiser.config["spatial_dims"])
        self.denoiser: nn.Module = denoiser.to(accelerator.device, memory_format=layout).train()  # type: ignore[call-overload]
        self.averaged: nn.Module = denoiser.learner if isinstance(denoiser, ControlledDenoiser) else denoiser
        encoder = steering.text_encoder
        if encoder is not None and is_trained(encoder.to(accelerator.device)):
            self.averaged = nn.ModuleDict({"denoiser": self.averaged, "text_encoder": encoder})
        self.networks: dict[str, nn.Module] = {"denoiser": self.averaged}
        weights = [parameter for parameter in self.averaged.parameters() if parameter.requires_grad]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "denoiser": torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
        }

    def _read(self, path: Path, seed: int | None) -> _Row:
        """A version of a scan; the first without a seed."""
        with safe_open(path, framework="pt") as file:
            flags = file.get_tensor("augmented")
            variant = 0 if seed is None else draw_variant(flags, seed)
            names = [name for name in file.keys() if name != "augmented"]  # noqa: SIM118 - not a mapping
            tensors = {name: file.get_slice(name)[variant] for name in names}
        x, valid = tensors.pop("x").float(), tensors["valid"]
        condition, text = self.steering.read(path.stem, tensors, seed)
        stride = valid.shape[-1] // x.shape[-1]
        pool = F.avg_pool3d if valid.ndim == 3 else F.avg_pool2d
        inside = pool(valid[None, None].float(), stride)[0]
        return _Row(x, OUTSIDE_WEIGHT + (1 - OUTSIDE_WEIGHT) * inside, flags[variant], condition, text)

    def _loss(
        self, rows: Sequence[_Row], seeds: list[int], dropout: float, t: torch.Tensor | None = None
    ) -> torch.Tensor:
        device = self.accelerator.device
        x0, region, augmented = (torch.stack(column).to(device) for column in list(zip(*rows, strict=True))[:3])
        noise = seeded_noise(x0.shape[1:], seeds).to(device)
        if t is None:
            t = torch.cat([self.objective.sample_timesteps(1, generator=stream(seed, "t")) for seed in seeds])
        t = t.to(device)
        # One stream a sample, as for the noise: what is dropped does not depend on the batch.
        together = self.steering.plan.drop_all if self.steering.plan and dropout else 0.0
        parts = [
            row.condition.drop(dropout, generator=stream(seed, "drop"), all_of_them=together)
            for row, seed in zip(rows, seeds, strict=True)
        ]
        condition = self.steering.batch(parts, [row.text for row in rows], device)
        noisy = self.objective.add_noise(x0, noise, t).to(memory_format=memory_format(x0.ndim - 2))
        with autocast(device, self.precision):
            output = self.denoiser(noisy, t, condition.parts, augmented)
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
        rows: list[_Row] = []
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
        files = spread(self.val, 32)
        losses = []
        for first in range(0, len(files), 8):
            part = files[first : first + 8]
            rows = [self._read(path, None) for path in part]
            t = (torch.arange(first, first + len(part)) + 0.5) / len(files) * self.objective.num_train_timesteps
            seeds = [derive_seed(self.seed, "validate", path.stem) for path in part]
            losses.append(self._loss(rows, seeds, 0.0, t.floor()))
        self.preview(step, picture)
        self.denoiser.train()  # not a text encoder: its dropout would depend on what was drawn before
        return {"val_loss": float(torch.cat(losses).mean())} if losses else {}
