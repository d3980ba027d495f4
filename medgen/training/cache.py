"""Scans on the model's grid and their latents, computed once and read from disk while training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.transforms import RandAffine
from safetensors import safe_open
from tqdm import tqdm

from medgen.conditions.topology import count_parts
from medgen.data.dataset import Case, Dataset, load_cases
from medgen.data.geometry import place, to_model, valid_mask
from medgen.planning import DenoiserPlan, Plan
from medgen.seeding import derive_seed, stream
from medgen.training.tensors import save_tensors
from medgen.types import BadInputError, Sample

# Part of the cache's name: raise it when what is stored changes.
CACHE_FORMAT = 2


@dataclass(frozen=True)
class CachedScan:
    """One scan on the model's grid.

    Attributes:
        case: Identifier.
        path: Safetensors file with `image` (float16, [-1, 1]), `label` (uint8 class indices) and `valid` (bool).
        shape: Shape on the model's grid before padding.
        scale: Intensity factors of its normalization.
        shift: Intensity offsets of its normalization.
        classes: Label values present.
        parts: Connected parts of the foreground, neighbors across corners counted as connected.
    """

    case: str
    path: str
    shape: tuple[int, ...]
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    classes: tuple[int, ...]
    parts: int


def key_of(*parts: Any) -> str:
    """Short content hash of settings, to name what was computed from them.

    Args:
        *parts: Dataclasses or JSON-able values.

    Returns:
        Twelve hexadecimal digits.
    """
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]


def cache_scans(
    dataset: Dataset, cases: Iterable[Case], plan: Plan, folder: Path, *, divisor: int, skip_bad: bool, title: str
) -> list[CachedScan]:
    """Bring scans onto the model's grid and normalize them, once.

    Args:
        dataset: Where the cases come from.
        cases: Which of its cases.
        plan: Gives grid, size and normalization.
        folder: Run folder; the cache lies in `cache/scans-HASH`.
        divisor: Sizes on the model's grid are padded to multiples of it.
        skip_bad: Note bad cases in ``dataset.rejected`` and go on, instead of raising.
        title: Name on the progress bar.

    Returns:
        What was cached, in the order of ``cases``.
    """
    grid = (plan.spacing, plan.orientation, plan.size, divisor)
    settings = key_of(CACHE_FORMAT, *grid, plan.normalization, plan.class_names)
    target = folder / "cache" / f"scans-{settings}"
    target.mkdir(parents=True, exist_ok=True)
    cases = list(cases)
    cached: dict[str, CachedScan] = {}
    missing = []
    for case in cases:
        path = target / f"{case.case}.safetensors"
        if path.exists():
            cached[case.case] = _read_entry(path)
        else:
            missing.append(case)

    def check(case: Case, sample: Sample) -> None:
        source = case.images[0]
        if sample.image is None or sample.label is None:
            raise BadInputError(f"{source}: expected an image and a label, got only one of them. Add the other.")
        if plan.spacing is not None and not sample.grid.known:
            raise BadInputError(
                f"{source}: expected a scan that states its voxel size (the plan resamples to {plan.spacing} mm), got "
                "a format without one. Give it as NIfTI, or set spacing to null in the plan."
            )
        plan.normalization.fit(sample.image, source=source)

    samples = load_cases(dataset, missing, skip_bad=skip_bad, check=check)
    try:
        for sample in tqdm(samples, total=len(missing), desc=f"reading {title} scans", disable=not missing):
            path = target / f"{sample.case}.safetensors"
            _write_entry(sample, plan, path, divisor)
            cached[sample.case] = _read_entry(path)
    except BadInputError:
        # A resumed run finds only the bad cases missing, and none good among them: that is no reason to stop.
        if not (skip_bad and cached):
            raise
    return [cached[case.case] for case in cases if case.case in cached]


def _write_entry(sample: Sample, plan: Plan, path: Path, divisor: int) -> None:
    if sample.image is None or sample.label is None:
        raise ValueError(f"{sample.case}: expected a sample that passed the check, got one without image or label")
    placement = place(
        sample.grid, spacing=plan.spacing, orientation=plan.orientation, min_size=plan.size, divisor=divisor
    )
    intensity = plan.normalization.fit(sample.image)
    image = to_model(intensity.forward(sample.image), placement, mode="linear", padding="reflect")
    label = to_model(sample.label, placement, mode="nearest", padding="constant")
    values = torch.tensor(sorted(plan.class_names))
    entry = {
        "case": sample.case,
        "shape": placement.resampled_shape,
        "scale": intensity.scale,
        "shift": intensity.shift,
        "classes": sample.label.unique().tolist(),
        "parts": count_parts(sample.label),
    }
    tensors = {
        "image": image.to(torch.float16),
        "label": torch.searchsorted(values, label.long()).to(torch.uint8),
        "valid": valid_mask(placement),
    }
    save_tensors(tensors, path, {"entry": json.dumps(entry)})


def _read_entry(path: Path) -> CachedScan:
    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["entry"])
    tuples: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return CachedScan(path=str(path), **tuples)


def read_scan(scan: CachedScan) -> dict[str, torch.Tensor]:
    """Tensors of a cached scan.

    Args:
        scan: Entry of the cache.

    Returns:
        ``image (C, *size)`` float32 in [-1, 1], ``label (*size)`` uint8 class indices, ``valid (*size)`` bool.
    """
    with safe_open(scan.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("image", "label", "valid")}
    tensors["image"] = tensors["image"].float()
    return tensors


def crop_to(
    tensors: dict[str, torch.Tensor], size: tuple[int, ...], generator: torch.Generator | None
) -> dict[str, torch.Tensor]:
    """Crop tensors that share their last axes.

    Args:
        tensors: Each ``(..., *spatial)``.
        size: Voxels to keep per axis; axes that are not larger stay whole.
        generator: Source of the corner; None takes the center.

    Returns:
        Views of the same names.
    """
    shape = next(iter(tensors.values())).shape[-len(size) :]
    slices: list[Any] = []
    for have, want in zip(shape, size, strict=True):
        room = max(have - want, 0)
        start = room // 2 if generator is None else int(torch.randint(room + 1, (1,), generator=generator))
        slices.append(slice(start, start + min(have, want)))
    return {name: tensor[(..., *slices)] for name, tensor in tensors.items()}


def augment(tensors: dict[str, torch.Tensor], plan: DenoiserPlan, seed: int) -> dict[str, torch.Tensor]:
    """Rotate and scale a scan with its label by a small random amount; never mirrored, since sides matter.

    Args:
        tensors: As :func:`read_scan` gives them.
        plan: Bounds of the draw.
        seed: Decides the draw.

    Returns:
        The same tensors, transformed alike; outside the field of view `valid` is False and `label` 0.
    """
    dims = tensors["label"].ndim
    angle = plan.rotation * torch.pi / 180
    affine = RandAffine(
        prob=1.0,
        rotate_range=[(-angle, angle)] * (3 if dims == 3 else 1),
        scale_range=[(-plan.scaling, plan.scaling)] * dims,
    )
    out = {}
    for name, mode, padding in (
        ("image", "bilinear", "reflection"),
        ("label", "nearest", "zeros"),
        ("valid", "nearest", "zeros"),
    ):
        affine.set_random_state(seed % 2**32)
        tensor = tensors[name].float()
        moved = affine(tensor if name == "image" else tensor[None], mode=mode, padding_mode=padding)
        moved = torch.as_tensor(moved)
        out[name] = moved if name == "image" else moved[0].round().to(tensors[name].dtype)
    out["label"] = out["label"] * out["valid"]
    return out


def cache_variants(
    scans: list[CachedScan],
    encode: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    plan: DenoiserPlan,
    folder: Path,
    *,
    size: tuple[int, ...],
    variants: int,
    seed: int,
    title: str,
) -> list[Path]:
    """Encode every scan in several augmented versions, once; version 0 is the scan itself.

    Args:
        scans: Entries of the scan cache.
        encode: Tensors of :func:`read_scan` to the denoiser's clean sample ``(c, *latent size)``.
        plan: Bounds of the augmentation.
        folder: Where the files go; its name should tell the encoder's hash.
        size: Voxels per axis that larger scans are cropped to.
        variants: Versions per scan.
        seed: Decides the draws, together with case and version.
        title: Name on the progress bar.

    Returns:
        One safetensors file per scan with ``x (V, c, ...)``, ``label (V, *size)`` and ``valid (V, *size)``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{scan.case}.safetensors" for scan in scans]
    todo = [(scan, path) for scan, path in zip(scans, paths, strict=True) if not path.exists()]
    for scan, path in tqdm(todo, desc=f"encoding {title}", disable=not todo):
        whole = read_scan(scan)
        rows = []
        for variant in range(variants):
            tensors = whole
            if variant:
                tensors = augment(whole, plan, derive_seed(seed, "augment", scan.case, variant))
            draw = stream(seed, "crop", scan.case, variant) if variant else None
            tensors = crop_to(tensors, size, draw)
            rows.append({"x": encode(tensors).to(torch.float16), "label": tensors["label"], "valid": tensors["valid"]})
        save_tensors({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, path)
    return paths
