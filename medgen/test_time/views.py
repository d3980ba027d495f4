"""Generative views of a scan: the same scan as its model would have it look, or in part, with other noise each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from medgen.conditions.condition import Condition
from medgen.data.geometry import Placement, from_model, to_model
from medgen.data.intensity import IntensityMap
from medgen.diffusion.guidance import Guided
from medgen.diffusion.inversion import METHODS, Trajectory, count_rows, invert, vary
from medgen.generator import Generator
from medgen.precision import Precision, autocast, exact_fp32, memory_format
from medgen.seeding import derive_seed, stream
from medgen.synthesis.plan import SamplingSettings
from medgen.synthesis.steering import guide
from medgen.types import BadInputError


@dataclass(frozen=True)
class ViewSettings:
    """How views are made.

    Attributes:
        method: One of :data:`medgen.diffusion.inversion.METHODS`.
        strength: Share in (0, 1] of the noise process that is gone.
        randomness: rho in [0, 1]: 0 goes the same way back, 1 draws all noise anew.
        num_inference_steps: Steps within the strength.
        guidance_scale: w for the conditions, of all or by name; 1 makes one pass a step. None is the model's own.
        detail: What of the scan's own detail, which is lost on the way into latents, a view keeps: 1 adds the change
            that the model makes to the scan (the delta decode, ``x + D(z') - D(z)``), which at rho 0 is nothing; 0
            shows what it decodes, so that what the model does not know, such as noise, goes.
        max_memory_gb: Bound for what decoding adds to the memory in use; None decodes each view in one piece.
        precision: ``fp32`` or ``bf16`` of the networks; states are float32.
    """

    method: str = "edit_friendly"
    strength: float = 0.3
    randomness: float = 1.0
    num_inference_steps: int = 5
    guidance_scale: float | Mapping[str, float] | None = 1.0
    detail: float = 1.0
    max_memory_gb: float | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            BadInputError: If a number is out of range or the method unknown.
        """
        if self.method not in METHODS:
            raise BadInputError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}.")
        for name in ("randomness", "detail"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInputError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}.")
        if not 0 < self.strength <= 1:
            raise BadInputError(f"strength: expected a share in (0, 1], got {self.strength}. Little keeps the scan.")
        if self.num_inference_steps < 1:
            raise BadInputError(f"num_inference_steps: expected at least 1, got {self.num_inference_steps}.")


class GenerativeViews:
    """A scan on its way into noise, from where views of it come back.

    Args:
        generator: The model, on its device.
        image: ``(C, H, W[, D])`` float32 in the units that the model's normalization takes.
        placement: How its grid lies on the model's.
        intensity: Between its units and the model's.
        condition: What steers the model, one row; without parts nothing does.
        settings: How views are made.
        seed: Of all noise; a view depends on it and its own number.
        window: Latent voxels per axis of the windows that the denoiser sees; None shows it all at once. Windows overlap
            by a half and their outputs are averaged, so that noise and masks are those of the whole scan.

    Its ``evaluations`` counts the rows that the denoiser has seen.
    """

    def __init__(
        self,
        generator: Generator,
        image: torch.Tensor,
        placement: Placement,
        intensity: IntensityMap,
        condition: Condition,
        settings: ViewSettings,
        *,
        seed: int,
        window: tuple[int, ...] | None = None,
    ) -> None:
        self.generator, self.placement, self.intensity = generator, placement, intensity
        self.condition, self.settings, self.seed, self.window = condition, settings, seed, window
        self.evaluations = 0
        # Set either way: the layout decides the rounding, so it must not depend on what ran before.
        fast = memory_format(generator.config.spatial_dims) if settings.precision == "bf16" else torch.contiguous_format
        generator.to(memory_format=fast)
        self.scan = to_model(intensity.forward(image), placement, mode="linear", padding="reflect")
        with torch.no_grad(), exact_fp32(), self._precision():
            self.latents = generator.encode(self.scan[None].to(generator.device)).float()
        kept = self.scan
        if settings.detail:
            kept = torch.lerp(self.scan, self.decode(self.latents)[0], settings.detail)
        self._kept = kept  # what is taken off the scan where a view is put in
        self._trajectory: Trajectory | None = None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scans of latents, one after the other: decoding takes the most memory.

        Args:
            latents: ``(B, c, *latent)``.

        Returns:
            ``(B, C, *placement.shape)`` float32 on the CPU.
        """
        with torch.no_grad(), exact_fp32(), self._precision():
            rows = [self.generator.decode(row[None], max_memory_gb=self.settings.max_memory_gb) for row in latents]
        return torch.cat([row.float().cpu() for row in rows])

    def passes(self) -> int:
        """Rows of the denoiser that one state takes: a pass for each output that guidance needs, in each window.

        Returns:
            Their number.
        """
        windows = len(list(_windows(self.latents.shape[2:], self.window))) if self.window else 1
        return self._guided(self.condition).passes(0.0) * windows

    def cost(self) -> tuple[int, int]:
        """Denoiser rows before the first view, and for each.

        Returns:
            Both numbers.
        """
        there, back = count_rows(self.settings.method, self.settings.num_inference_steps)
        return self.passes() * there, self.passes() * back

    def look(self) -> None:
        """Show the denoiser the scan at the noise level from which views come back, with all conditions, once."""
        levels = self.trajectory().levels
        scale = 1.0 if self.generator.config.objective.is_flow else math.hypot(1 - levels[0], levels[0])
        time = torch.full((1,), float(self.trajectory().times[0]), device=self.latents.device)
        with torch.no_grad(), exact_fp32(), self._precision():
            self.generator.denoise(self.trajectory().states[0][:1] / scale, time, self.condition)
        self.evaluations += 1

    def trajectory(self) -> Trajectory:
        """The way into noise; computed once.

        Returns:
            The trajectory.
        """
        if self._trajectory is None:
            settings = self.settings
            noise = self._noise("trajectory")[:, None]
            with exact_fp32():
                self._trajectory = invert(
                    self._denoise,
                    self.latents,
                    objective=self.generator.config.objective,
                    method=settings.method,
                    noise=noise,
                    num_inference_steps=settings.num_inference_steps,
                    strength=settings.strength,
                )
        return self._trajectory

    def make(self, numbers: Sequence[int], masks: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Some of the views, side by side in the networks.

        Args:
            numbers: Which.
            masks: ``(H, W[, D])`` bool of each, where it may differ from the scan; None is everywhere.

        Returns:
            ``(C, H, W[, D])`` float32 each: what has to be added to the scan, in its units; 0 where a mask is False.
        """
        region = None
        if any(mask is not None for mask in masks):
            region = torch.stack([self._to_latents(mask) for mask in masks]).to(self.latents.device)
        decoded = self.decode(self.draw(numbers, region))
        return [self._change(made, mask) for made, mask in zip(decoded, masks, strict=True)]

    def draw(self, numbers: Sequence[int], region: torch.Tensor | None) -> torch.Tensor:
        """Latents of some of the views.

        Args:
            numbers: Which.
            region: ``(B, 1, *latent)`` bool, where they may differ; None is everywhere.

        Returns:
            ``(B, c, *latent)``.
        """
        noise = torch.stack([self._noise(f"view {number}") for number in numbers], dim=1)
        trajectory = self.trajectory()
        with exact_fp32():
            return vary(self._denoise, trajectory, noise, randomness=self.settings.randomness, region=region)

    def _change(self, made: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        own = from_model(made - self._kept, self.placement, mode="linear")
        own = own / torch.tensor(self.intensity.scale, dtype=torch.float32).view(-1, *[1] * (own.ndim - 1))
        return own if mask is None else torch.where(mask, own, 0.0)

    def _to_latents(self, mask: torch.Tensor | None) -> torch.Tensor:
        """``(1, *latent)`` bool, where a latent voxel covers any voxel that may differ."""
        size = self.latents.shape[2:]
        if mask is None:
            return torch.ones((1, *size), dtype=torch.bool)
        share = to_model(mask.float(), self.placement, mode="linear", padding="reflect")
        pool = F.max_pool3d if share.ndim == 3 else F.max_pool2d
        return pool((share > 0).float()[None, None], self.generator.compression)[0] > 0

    def _noise(self, name: str) -> torch.Tensor:
        """``(n, c, *latent)``, that of each step."""
        shape = (self.settings.num_inference_steps, *self.latents.shape[1:])
        noise = torch.randn(shape, generator=stream(derive_seed(self.seed, "test time", name), "noise"))
        return noise.to(self.latents.device)

    def _precision(self) -> AbstractContextManager[object]:
        return autocast(self.generator.device, self.settings.precision)

    def _guided(self, condition: Condition) -> Guided[Condition]:
        def denoise(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
            with self._precision():
                return self.generator.denoise(x, t, condition)

        return guide(self.generator, condition, SamplingSettings(guidance_scale=self.settings.guidance_scale), denoise)

    @torch.no_grad()
    def _denoise(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        parts = {name: part.expand(len(x), *part.shape[1:]) for name, part in self.condition.parts.items()}
        if self.window is None:
            guided = self._guided(Condition(parts))
            out = guided(x, t)
            self.evaluations += guided.evaluations * len(x)
            return out
        stride = self.generator.compression
        whole = tuple(length * stride for length in x.shape[2:])

        def denoise(x: torch.Tensor, t: torch.Tensor, slices: tuple[slice, ...]) -> torch.Tensor:
            # Maps are cut with the state that they belong to; words and facts are of all of it.
            maps: tuple[Any, ...] = (..., *(slice(part.start * stride, part.stop * stride) for part in slices))
            cut = {name: part[maps] if tuple(part.shape[2:]) == whole else part for name, part in parts.items()}
            guided = self._guided(Condition(cut))
            out = guided(x, t)
            self.evaluations += guided.evaluations * len(x)
            return out

        return in_windows(denoise, x, t, self.window)


def _windows(size: Sequence[int], window: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    from monai.data.utils import dense_patch_slices

    edges = tuple(min(length, whole) for length, whole in zip(window, size, strict=True))
    yield from dense_patch_slices(tuple(size), edges, [max(1, length // 2) for length in edges])


def in_windows(
    denoise: Callable[[torch.Tensor, torch.Tensor, tuple[slice, ...]], torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    window: tuple[int, ...],
) -> torch.Tensor:
    """Output of a denoiser that sees one window of a large state at a time, averaged where windows overlap.

    Args:
        denoise: Of state, times and the window.
        x: ``(B, C, *size)`` state.
        t: ``(B,)`` times.
        window: Voxels per axis; windows overlap by a half.

    Returns:
        ``(B, C, *size)``.
    """
    total, count = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x[:1, :1], dtype=torch.float32)
    for slices in _windows(x.shape[2:], window):
        where: tuple[Any, ...] = (..., *slices)
        total[where] += denoise(x[where], t, slices).float()
        count[where] += 1
    return total / count
