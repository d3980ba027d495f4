"""What the denoisers learn from: latents of scans and signed distances of label maps, encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from medgen.generator import Generator
from medgen.planning import DiffusionPlan, Plan
from medgen.precision import Precision, autocast
from medgen.seeding import spread
from medgen.training.cache import CACHE_FORMAT, CachedScan, cache_variants, crop_to, key_of, read_scan

MEASURED = 64  # scans that tell the spread of the latents


def cache_latents(
    scans: list[CachedScan],
    generator: Generator,
    kind: Literal["denoiser", "label"],
    variants: int,
    *,
    plan: Plan,
    folder: Path,
    precision: Precision,
    device: torch.device,
    seed: int,
    title: str,
) -> list[Path]:
    """Clean samples of scans for one denoiser, in a folder whose name tells everything that they were computed from.

    Args:
        scans: On the model's grid.
        generator: Its autoencoder encodes scans, its label coding label maps.
        kind: Denoiser that learns from them: of scans, or of label maps.
        variants: Versions of each scan: the scan itself, and augmented ones.
        plan: What is followed.
        folder: Run folder.
        precision: Number format of the autoencoder.
        device: Where it runs.
        seed: Root of the augmentation.
        title: Of the progress bar.

    Returns:
        One file a scan, with its variants.
    """
    stage: DiffusionPlan | None = plan.denoiser if kind == "denoiser" else plan.label
    if stage is None:
        raise ValueError(f"expected a plan with the stage {kind!r}, got one without")
    edge = plan.read_conditions.edge if kind == "denoiser" else None

    @torch.no_grad()
    def encode(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if kind == "label":
            return generator.encode_label(tensors["label"].long())
        with autocast(device, precision):
            return generator.encode(tensors["image"][None].to(device))[0].float().cpu()

    weights = ""
    if kind == "denoiser" and generator.autoencoder is not None:
        weights = str(float(sum(value.double().abs().sum() for value in generator.autoencoder.state_dict().values())))
    key = key_of(
        CACHE_FORMAT,
        [Path(scan.path).name for scan in scans],
        weights,
        generator.config.latent_shift,
        generator.config.latent_scale,
        stage.variants,
        stage.rotation,
        stage.scaling,
        plan.size,
        plan.label_stride,
        seed,
        variants,
        edge,
    )
    return cache_variants(
        scans,
        encode,
        stage,
        folder / "cache" / f"{kind}-{key}",
        size=plan.size,
        variants=variants,
        seed=seed,
        title=title,
        edge=edge,
    )


@torch.no_grad()
def measure_latents(
    generator: Generator,
    scans: Sequence[CachedScan],
    size: tuple[int, ...],
    *,
    precision: Precision,
    device: torch.device,
) -> None:
    """Set the model's shift and scale of each latent channel so that its denoiser sees training scans of variance 1.

    The scans are evenly spaced ones of all: were they of one modality alone, another could lie ten deviations away.
    A model without autoencoder stays as it is.

    Args:
        generator: The model, with a trained autoencoder.
        scans: As often as training draws them.
        size: Voxels per axis of a training scan.
        precision: Number format of the autoencoder.
        device: Where it runs.
    """
    if generator.autoencoder is None:
        return
    total = torch.zeros(2, generator.denoiser.config["in_channels"], dtype=torch.float64)
    count = 0
    for scan in spread(scans, MEASURED):
        image = crop_to({"image": read_scan(scan)["image"]}, size, None)["image"]
        with autocast(device, precision):
            latents = generator.autoencoder.encode(image[None].to(device))[0]
        flat = latents[0].flatten(1).double().cpu()
        total += torch.stack([flat.sum(1), flat.square().sum(1)])
        count += flat.shape[1]
    mean = total[0] / count
    std = (total[1] / count - mean.square()).sqrt()
    generator.config.latent_shift = tuple(mean.tolist())
    generator.config.latent_scale = tuple((1 / std).tolist())
