"""The published method: DDIM inversion, one-step null-text optimization and two paths of denoising, for comparison.

Faults of the publication's code are mended: the noise schedule is the model's own, its weights are frozen, and what a
mask keeps is the scan, not its one-step estimate.

Reference:
    Ma et al. 2026, arXiv:2406.17608.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medgen.conditions.condition import Condition
from medgen.diffusion.sampler import time_grid
from medgen.precision import autocast, exact_fp32
from medgen.seeding import derive_seed, stream
from medgen.test_time.views import GenerativeViews
from medgen.types import BadInputError


@dataclass(frozen=True)
class NullTextSettings:
    """The numbers of the publication.

    Attributes:
        strength: Share of the noise process that is gone, tau.
        inversion_steps: Steps of the way into noise; 3 is the demonstration's, 30 the paper's.
        steps: Steps back.
        guidance_scale: w.
        learning_rate: Of Adam.
        max_iterations: Most steps of the optimization.
        patience: Steps below the limit after which it ends.
        spread: Ends of the factor on the guidance, drawn for each view.
    """

    strength: float = 0.3
    inversion_steps: int = 3
    steps: int = 3
    guidance_scale: float = 2.0
    learning_rate: float = 0.1
    max_iterations: int = 1000
    patience: int = 100
    spread: tuple[float, float] = (0.5, 1.5)

    @property
    def limit(self) -> float:
        """Of the loss: ``tau 1e-6 + 1e-4``, for tau in a thousand times."""
        return self.strength * 1e-3 + 1e-4


class NullTextViews(GenerativeViews):
    """Views by the published method; the model has to be steered by something.

    Args:
        *args: As for :class:`GenerativeViews`.
        published: The numbers of the publication.
        **kwargs: As for :class:`GenerativeViews`.

    Raises:
        BadInputError: If nothing steers the model.
    """

    def __init__(self, *args: Any, published: NullTextSettings | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.published = published or NullTextSettings(strength=self.settings.strength)
        if not self.condition.parts:
            raise BadInputError(
                "method null_text: expected something that steers the generator, a text or the prediction "
                "(condition_on_prediction), got nothing. Give one, or take another method."
            )
        self._start: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None

    def cost(self) -> tuple[int, int]:
        """Denoiser rows before the first view at most, and for each; a backward pass counts as two rows.

        Returns:
            Both numbers.
        """
        published = self.published
        return published.inversion_steps + 1 + 3 * published.max_iterations, 2 * published.steps

    def draw(self, numbers: Sequence[int], region: torch.Tensor | None) -> torch.Tensor:
        """Latents of some of the views.

        Args:
            numbers: Which.
            region: ``(B, 1, *latent)`` bool, where they may differ; None is everywhere.

        Returns:
            ``(B, c, *latent)``.
        """
        published = self.published
        with exact_fp32():
            noisy, null = self._prepare()
            levels, times = self._grid(published.steps)
            streams = [stream(derive_seed(self.seed, "test time", f"view {number}"), "noise") for number in numbers]
            low, high = published.spread
            factors = torch.tensor([low + (high - low) * float(torch.rand((), generator=g)) for g in streams])
            factors = factors.to(noisy.device).view(-1, *[1] * (noisy.ndim - 1))
            z = noisy.expand(len(numbers), *noisy.shape[1:])
            # Identity: one step of DDIM, eta = 0, from the first state and its noise, at every level.
            noise = (noisy - float(1 - levels[0]) * self.latents) / float(levels[0])
            for i in range(published.steps):
                given = self._predict_noise(z, levels, times, i, self.condition.parts)
                free = self._predict_noise(z, levels, times, i, null)
                e = given + factors * (1 - published.guidance_scale) * (free - given)
                s, after = float(levels[i]), float(levels[i + 1])
                clean = (z - s * e) / (1 - s)
                kept = (1 - s) * after / ((1 - after) * s)
                fresh = torch.stack([torch.randn(noisy.shape[1:], generator=g) for g in streams]).to(z.device)
                z = (1 - after) * clean + after * (kept * e + float(np.sqrt(1 - kept**2)) * fresh)
                if region is not None:
                    z = torch.where(region, z, (1 - after) * self.latents + after * noise)
        return z

    def _grid(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        objective = self.generator.config.objective
        return time_grid(objective, steps, spacing="uniform", strength=self.published.strength)

    def _prepare(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """State at tau by DDIM inversion with the condition, and the null condition that leads back in one step."""
        if self._start is not None:
            return self._start
        published, z0 = self.published, self.latents
        levels, times = self._grid(published.inversion_steps)
        z = z0
        for i in reversed(range(published.inversion_steps)):
            s, after = float(levels[i]), float(levels[i + 1])
            e = self._predict_noise(z, levels, times, i, self.condition.parts)
            clean = (z - after * e) / (1 - after)
            z = (1 - s) * clean + s * e
        given = self._predict_noise(z, levels, times, 0, self.condition.parts)
        null = {name: torch.zeros_like(part) for name, part in self.condition.parts.items()}
        empty = getattr(self.generator.denoiser, "empty_text", None)
        if empty is not None and "text" in null:  # which stands there for no text, in place of zeros
            null["text"] = empty.detach().clone()[None].to(null["text"])
        for part in null.values():
            part.requires_grad_()
        optimizer = torch.optim.Adam(null.values(), lr=published.learning_rate)
        s, below = float(levels[0]), 0
        networks = [self.generator.denoiser, *self.generator.controls.values()]
        frozen = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
        for weight in frozen:
            weight.requires_grad_(False)
        try:
            for _ in range(published.max_iterations):
                with torch.enable_grad():
                    free = self._predict_noise(z, levels, times, 0, null)
                    e = free + published.guidance_scale * (given - free)
                    loss = ((z - s * e) / (1 - s) - z0).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                self.evaluations += 2  # the backward pass
                below = below + 1 if float(loss.detach()) < published.limit else 0
                if below >= published.patience:
                    break
        finally:
            for weight in frozen:
                weight.requires_grad_(True)
        self._start = (z, {name: part.detach() for name, part in null.items()})
        return self._start

    def _predict_noise(
        self, z: torch.Tensor, levels: np.ndarray, times: np.ndarray, i: int, parts: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        objective, s = self.generator.config.objective, float(levels[i])
        x = z if objective.is_flow else z / float(np.hypot(1 - s, s))
        t = torch.full((len(z),), float(times[i]), device=z.device)
        rows = Condition({name: part.expand(len(z), *part.shape[1:]) for name, part in parts.items()})
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(part.requires_grad for part in parts.values())):
            with autocast(self.generator.device, self.settings.precision):
                output = self.generator.denoise(x, t, rows)
            self.evaluations += len(z)
            return (z - (1 - s) * objective.predict_x0(output.float(), x, t)) / s
