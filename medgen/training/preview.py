"""Pictures of a model in training: real scans above what it makes of the same labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from medgen.conditions.edge import extract_edges
from medgen.diffusion.guidance import Guided
from medgen.diffusion.sampler import sample
from medgen.generator import Generator
from medgen.pictures import sample_grid
from medgen.precision import Precision, autocast
from medgen.seeding import derive_seed, seeded_noise, spread
from medgen.training.cache import CachedScan, crop_to, read_scan
from medgen.training.steering import Steering

SHOWN = 4


def _load(generator: Generator, scans: Sequence[CachedScan]) -> dict[str, torch.Tensor]:
    rows = []
    for scan in scans:
        tensors = read_scan(scan)
        if (edge := generator.config.edge) is not None:
            found = extract_edges(tensors["image"], edge, valid=tensors["valid"], spacing=scan.spacing)[0]
            tensors["edge"] = (255 * found).round().to(torch.uint8)
        rows.append(crop_to(tensors, generator.config.size, None))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _captions(*kinds: str, scans: Sequence[CachedScan]) -> list[str]:
    return [f"{kind} {scan.case}" for kind in kinds for scan in scans]


def _names(generator: Generator) -> list[str]:
    return [name for _, name in sorted(generator.config.class_names.items())]


@torch.no_grad()
def preview_images(
    generator: Generator,
    scans: Sequence[CachedScan],
    picture: Path,
    *,
    precision: Precision,
    seed: int,
    device: torch.device,
    steering: Steering,
) -> None:
    """Real scans above synthetic ones of the same conditions.

    Args:
        generator: The model.
        scans: Where the conditions come from.
        picture: PNG to write.
        precision: Number format of the networks.
        seed: Root of the noise, the same at each validation.
        device: Where the networks are.
        steering: What steers each scan.
    """
    scans = spread(scans, SHOWN)
    real = _load(generator, scans)
    label = real["label"].long()
    rows, texts = [], []
    for index, scan in enumerate(scans):
        tensors = {name: tensor[index] for name, tensor in real.items() if name != "image"}
        condition, text = steering.read(scan.case, tensors, None)
        rows.append(condition)
        texts.append(text)
    chain, scales = steering.batch(rows, texts, device).chain(generator.config.guidance_scale)
    seeds = [derive_seed(seed, "preview", index) for index in range(len(label))]
    noise = seeded_noise(generator.latent_shape(tuple(label.shape[1:])), seeds).to(device)
    config = generator.config
    guided = Guided(generator.denoise, chain, scales)
    with autocast(device, precision):
        image = generator.decode(
            sample(guided, noise, objective=config.objective, temperature=config.temperature)
        ).cpu()
    captions = _captions("real", "synthetic", scans=scans)
    labels = torch.cat([label, label])
    sample_grid(torch.cat([real["image"], image]), labels, picture, captions=captions, class_names=_names(generator))


@torch.no_grad()
def preview_labels(
    generator: Generator,
    scans: Sequence[CachedScan],
    picture: Path,
    *,
    precision: Precision,
    seed: int,
    device: torch.device,
) -> None:
    """Real label maps above generated ones of the same field of view.

    Args:
        generator: The model.
        scans: Where the fields of view come from.
        picture: PNG to write.
        precision: Number format of the networks.
        seed: Root of the noise, the same at each validation.
        device: Where the networks are.

    Raises:
        ValueError: If the model has no label generator.
    """
    objective = generator.config.label_objective
    if objective is None:
        raise ValueError("expected a model with a label generator, got one without")
    scans = spread(scans, SHOWN)
    real = _load(generator, scans)
    valid = real["valid"][:, None].float().to(device)
    seeds = [derive_seed(seed, "preview", index) for index in range(len(valid))]
    noise = seeded_noise(generator.label_shape(tuple(valid.shape[2:])), seeds).to(device)
    with autocast(device, precision):
        drawn = sample(lambda x, t: generator.denoise_label(x, t, valid), noise, objective=objective)
    label = torch.cat([real["label"].long(), generator.decode_label(drawn).long().cpu()])
    shade = label.float() / max(generator.num_classes - 1, 1) * 2 - 1
    captions = _captions("real", "generated", scans=scans)
    sample_grid(shade[:, None], label, picture, captions=captions, class_names=_names(generator))
