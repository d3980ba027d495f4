"""What the denoisers learn from: latents of scans and signed distances of label maps, encoded once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import Accelerator

from medgen.generator import Generator
from medgen.planning import DiffusionPlan, Plan
from medgen.precision import Precision, autocast
from medgen.provenance import write_text
from medgen.seeding import spread
from medgen.training.cache import CACHE_FORMAT, CachedScan, cache_variants, crop_to, key_of, read_scan
from medgen.types import BadInputError

if TYPE_CHECKING:
    from medgen.networks import Autoencoder, LatentBaseAutoencoder

LATENTS = "latents.json"
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

    weights, spread_of = "", None
    if kind == "denoiser" and generator.autoencoder is not None:
        weights, spread_of = _digest(generator), (generator.config.latent_shift, generator.config.latent_scale)
    key = key_of(
        CACHE_FORMAT,
        [Path(scan.path).name for scan in scans],
        weights,
        spread_of,
        stage.variants,
        stage.rotation,
        stage.scaling,
        *([stage.elastic] if stage.elastic else []),  # caches of before it was there keep their names
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


def settle_latents(
    generator: Generator,
    scans: Sequence[CachedScan],
    folder: Path,
    size: tuple[int, ...],
    *,
    precision: Precision,
    accelerator: Accelerator,
) -> None:
    """Set the model's shift and scale of each latent channel so that its denoiser sees training scans of variance 1.

    They are measured once a run, by its first process: a digit that differs, as on another machine, would make another
    cache. The scans are evenly spaced ones of all: were they of one modality alone, another could lie ten deviations
    away. A model without autoencoder stays as it is.

    Args:
        generator: The model, with a trained autoencoder.
        scans: As often as training draws them.
        folder: Run folder.
        size: Voxels per axis of a training scan.
        precision: Number format of the autoencoder.
        accelerator: Device and processes.

    Raises:
        BadInputError: If the denoiser has learned from latents of which this is not on file.
    """
    if generator.autoencoder is None:
        return
    path, digest = folder / LATENTS, _digest(generator)
    if accelerator.is_main_process:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if known.get("autoencoder") != digest:
            if (folder / "checkpoints" / "denoiser").is_dir():
                raise BadInputError(
                    f"{path}: expected the spread of the latents that the denoiser has begun to learn from, got none. "
                    "Train in a new folder."
                )
            shift, scale = _measure(generator.autoencoder, scans, size, precision, accelerator.device)
            write_text(path, json.dumps({"autoencoder": digest, "shift": shift, "scale": scale}) + "\n")
    accelerator.wait_for_everyone()
    found = json.loads(path.read_text(encoding="utf-8"))
    generator.config.latent_shift, generator.config.latent_scale = tuple(found["shift"]), tuple(found["scale"])


@torch.no_grad()
def _measure(
    autoencoder: Autoencoder | LatentBaseAutoencoder,
    scans: Sequence[CachedScan],
    size: tuple[int, ...],
    precision: Precision,
    device: torch.device,
) -> tuple[list[float], list[float]]:
    """Mean and inverse deviation of each latent channel."""
    total, count = torch.zeros(2, 1, dtype=torch.float64), 0
    for scan in spread(scans, MEASURED):
        image = crop_to({"image": read_scan(scan)["image"]}, size, None)["image"]
        with autocast(device, precision):
            latents = autoencoder.encode(image[None].to(device))[0]
        flat = latents[0].flatten(1).double().cpu()
        total = total + torch.stack([flat.sum(1), flat.square().sum(1)])
        count += flat.shape[1]
    mean = total[0] / count
    std = (total[1] / count - mean.square()).sqrt()
    return mean.tolist(), (1 / std).tolist()


def _digest(generator: Generator) -> str:
    """Of the autoencoder's weights."""
    weights = [] if generator.autoencoder is None else generator.autoencoder.state_dict().values()
    return str(float(sum(value.double().abs().sum() for value in weights)))
