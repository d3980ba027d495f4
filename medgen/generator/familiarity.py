"""Whether a model knows scans of a kind: how the deepest features of its denoiser compare with those of its own scans.

What an autoencoder loses, or how well a scan is denoised, tells how rough it is and not what it shows: a smooth picture
of anything passes. The deepest features tell anatomy and contrast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from medgen.conditions.condition import Condition
from medgen.precision import autocast, exact_fp32
from medgen.seeding import stream

if TYPE_CHECKING:
    from medgen.generator.generator import Generator

LEVEL = 0.3  # share of the times at which the denoiser looks
MARGIN = 2.0  # on the highest score of known scans: another scanner may score higher, another anatomy does
FEWEST = 8  # scans to learn from
_MOST = 64
_LEAST_STD = 1e-3
_DEEPEST = ("middle_block", "mid_block")  # as MONAI and diffusers name it


@dataclass(frozen=True)
class Familiarity:
    """The features of known scans.

    Attributes:
        mean: Of each feature.
        std: Of each feature.
        limit: Highest score of a scan that the model is taken to know.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    limit: float

    def score(self, features: torch.Tensor) -> float:
        """How far a scan is from the known ones, in standard deviations.

        Args:
            features: ``(F,)`` of :func:`deep_features`.

        Returns:
            Root mean square over the features; about 1 for known scans.
        """
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        return float(((features.double().cpu() - mean) / std).square().mean().sqrt())


@torch.no_grad()
def deep_features(generator: Generator, scan: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of each channel in the middle of the denoiser, of the scan with noise.

    Of a scan larger than those that the model was trained on the center is taken, as in training. One row of the
    denoiser, in float32 and without conditions; equal scans give equal features.

    Args:
        generator: The model, on its device.
        scan: ``(1, C, *spatial)`` in [-1, 1] on the model's grid.

    Returns:
        ``(F,)`` float64 on the CPU.
    """
    device, objective = generator.device, generator.config.objective
    for axis, size in enumerate(generator.config.size, start=2):
        extra = max(0, scan.shape[axis] - size)
        scan = scan.narrow(axis, extra // 2, scan.shape[axis] - extra)
    deepest = next(module for name, module in generator.denoiser.named_modules() if name.rsplit(".", 1)[-1] in _DEEPEST)
    found: list[torch.Tensor] = []
    hook = deepest.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        with exact_fp32(), autocast(device, "fp32"):
            latents = generator.encode(scan.to(device)).float()
            t = torch.full((1,), LEVEL * objective.num_train_timesteps, device=device)
            noise = torch.randn(latents.shape, generator=stream(0, "familiarity", "noise")).to(device)
            generator.denoise(objective.add_noise(latents, noise, t), t, Condition())
    finally:
        hook.remove()
    channels = found[0][0].flatten(1).double().cpu()
    return torch.cat([channels.mean(dim=1), channels.std(dim=1)])


def fit_familiarity(generator: Generator, scans: Iterable[torch.Tensor]) -> Familiarity | None:
    """Learn what a model knows.

    Args:
        generator: The model, on its device.
        scans: ``(1, C, *spatial)`` each, in [-1, 1] on the model's grid: its training scans; the first 64 are taken.

    Returns:
        Their features. The limit is twice the highest score of any of one half by the features of the other. None for
        fewer than eight scans, which tell too little.
    """
    rows = []
    for scan in scans:
        rows.append(deep_features(generator, scan))
        if len(rows) == _MOST:
            break
    if len(rows) < FEWEST:
        return None
    features = torch.stack(rows)
    halves = (features[::2], features[1::2])
    scores = [_fit(known, 0.0).score(row) for known, others in (halves, halves[::-1]) for row in others]
    return _fit(features, MARGIN * max(scores))


def _fit(features: torch.Tensor, limit: float) -> Familiarity:
    std = features.std(dim=0).clamp(min=_LEAST_STD)
    return Familiarity(tuple(features.mean(dim=0).tolist()), tuple(std.tolist()), limit)
