"""Scans on the model's grid and their latents, computed once and read from disk while training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from medgen.conditions.attributes import SPACING, encode_attributes
from medgen.conditions.edge import EdgeSettings, extract_edges
from medgen.conditions.topology import count_parts
from medgen.data.dataset import Case, Dataset, Rejection, load_cases, require_orientation
from medgen.data.geometry import place, to_model, valid_mask
from medgen.planning import SPACING_FACTOR, ConditionsPlan, DiffusionPlan, Plan, facts_of
from medgen.provenance import sha256_file
from medgen.seeding import derive_seed, stream
from medgen.training.augment import augment
from medgen.training.tensors import save_tensors
from medgen.types import BadInputError, Grid, Sample

# Part of the cache's name: raise it when what is stored changes.
CACHE_FORMAT = 4


@dataclass(frozen=True)
class CachedScan:
    """One scan on the model's grid.

    Attributes:
        case: Identifier.
        path: Safetensors file with `image` (float16, [-1, 1]), `label` (uint8 class indices) and `valid` (bool).
        source: Digest of the files that it was read from.
        shape: Shape on the model's grid before padding.
        spacing: Voxel edges on the model's grid, in mm or, where no file states them, all 1.
        scale: Intensity factors of its normalization.
        shift: Intensity offsets of its normalization.
        classes: Label values present.
        parts: Connected parts of the foreground, neighbors across corners counted as connected.
        labelled: Whether it has a label map; without, `label` is all 0.
        known: Whether its file states a voxel size.
        text: Its text, where texts steer; empty where it has none.
        facts: What is known of the attributes that steer.
    """

    case: str
    path: str
    source: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    classes: tuple[int, ...]
    parts: int
    labelled: bool = True
    known: bool = True
    text: str = ""
    facts: dict[str, str] = field(default_factory=dict)


def key_of(*parts: Any) -> str:
    """Short content hash of settings, to name what was computed from them.

    Args:
        *parts: Dataclasses or JSON-able values.

    Returns:
        Twelve hexadecimal digits.
    """
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]


def source_digest(case: Case) -> str:
    """Digest of a scan's files, to tell whether one was changed.

    Args:
        case: The scan.

    Returns:
        Twelve hexadecimal digits; they depend on names and contents, not on the folder.
    """
    contents: list[list[str]] = []
    for path in (*case.images, *([case.label] if case.label else [])):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]  # a DICOM series is a folder
        for file in files:
            try:
                contents.append([file.name, sha256_file(file)])
            except OSError:  # missing, unreadable or a folder: whoever reads the scan says so
                contents.append([file.name, ""])
    return key_of(contents)


def cache_scans(
    dataset: Dataset, cases: Iterable[Case], plan: Plan, folder: Path, *, divisor: int, skip_bad: bool, title: str
) -> list[CachedScan]:
    """Bring scans onto the model's grid and normalize them, once.

    Args:
        dataset: Where the cases come from.
        cases: Which of its cases.
        plan: Gives grid, size and normalization.
        folder: Run folder; the cache lies in `cache/scans-HASH`, in files whose names tell what they were made of.
        divisor: Sizes on the model's grid are padded to multiples of it.
        skip_bad: Note bad cases in ``dataset.rejected`` and go on, instead of raising.
        title: Name on the progress bar.

    Returns:
        What was cached, in the order of ``cases``; with ``skip_bad`` it may be empty.
    """
    grid = (plan.spacing, plan.orientation, plan.size, divisor)
    settings = key_of(CACHE_FORMAT, *grid, plan.normalization, plan.channel_names, plan.class_names)
    target = folder / "cache" / f"scans-{settings}"
    target.mkdir(parents=True, exist_ok=True)
    cases = list(cases)
    cached: dict[str, CachedScan] = {}
    sources: dict[str, str] = {}
    missing = []
    for case in tqdm(cases, desc=f"checking {title} scans", disable=None, leave=False, delay=3):
        sources[case.case] = source_digest(case)
        path = _entry_path(target, case.case, sources[case.case])
        if path.exists():
            cached[case.case] = _read_entry(path)
        else:
            missing.append(case)

    def check(case: Case, sample: Sample) -> None:
        source = case.images[0]
        needed = plan.denoiser.conditions.needs_labels and plan.tuning is None
        if sample.image is None or (sample.label is None and needed):
            raise BadInputError(f"{source}: expected an image and a label, got only one of them. Add the other.")
        if plan.spacing is not None and not sample.grid.known:
            raise BadInputError(
                f"{source}: expected a scan that states its voxel size (the plan resamples to {plan.spacing} mm), got "
                "a format without one. Give it as NIfTI, or set spacing to null in the plan."
            )
        require_orientation(source, sample.grid, plan.orientation)
        _check_spacing(source, sample.grid, plan)
        plan.normalization.fit(sample.image, source=source)

    samples = load_cases(dataset, missing, skip_bad=skip_bad, check=check)
    try:
        for sample in tqdm(samples, total=len(missing), desc=f"reading {title} scans", disable=not missing):
            path = _entry_path(target, sample.case, sources[sample.case])
            _write_entry(sample, sources[sample.case], plan, path, divisor)
            cached[sample.case] = _read_entry(path)
    except BadInputError:
        # None good among those missing is no reason to stop: a resumed run finds only the bad ones missing, and
        # validation can do without. Whether enough is left for training is for the caller to judge.
        if not skip_bad:
            raise
    found = []
    for case in cases:
        if case.case in cached:
            try:
                found.append(_with_words(cached[case.case], case, plan.read_conditions))
            except BadInputError as error:
                reason = f"case {case.case}: {error}"
                if not skip_bad:
                    raise BadInputError(reason) from error
                dataset.rejected.append(Rejection(case.case, reason))
    return found


def _with_words(scan: CachedScan, case: Case, conditions: ConditionsPlan) -> CachedScan:
    """The scan with what the metadata say of it, which is no part of its file."""
    facts = facts_of(case, tuple(conditions.attributes))
    if SPACING in conditions.attributes and SPACING not in facts and scan.known:
        facts[SPACING] = json.dumps(list(scan.spacing))
    encode_attributes(conditions.attributes, facts)  # refuses values that the plan does not know
    text = conditions.text.text_of(case) if conditions.text is not None else ""
    return dataclasses.replace(scan, text=text, facts=facts)


def _entry_path(folder: Path, case: str, source: str) -> Path:
    return folder / f"{case}-{source}.safetensors"


def _check_spacing(source: Path, grid: Grid, plan: Plan) -> None:
    """Refuse a scan whose voxels are far from the plan's: resampling would lose structures, or invent them."""
    if plan.spacing is None:
        return
    axes = place(grid, orientation=plan.orientation).axes[0]
    own = [grid.spacing[axis] for axis in axes]
    factors = [mine / wanted for mine, wanted in zip(own, plan.spacing, strict=True)]
    if max(factors) > SPACING_FACTOR or min(factors) < 1 / SPACING_FACTOR:
        got, wanted = (" x ".join(f"{value:.3g}" for value in row) for row in (own, plan.spacing))
        raise BadInputError(
            f"{source}: expected voxels within a factor {SPACING_FACTOR:g} of the plan's {wanted} mm, got {got} mm. "
            "Leave the scan out (--skip_bad does), or set another spacing in the plan."
        )


def _write_entry(sample: Sample, source: str, plan: Plan, path: Path, divisor: int) -> None:
    if sample.image is None:
        raise ValueError(f"{sample.case}: expected a sample that passed the check, got one without image")
    own = torch.zeros(sample.grid.shape, dtype=torch.int16) if sample.label is None else sample.label
    placement = place(
        sample.grid, spacing=plan.spacing, orientation=plan.orientation, min_size=plan.size, divisor=divisor
    )
    intensity = plan.normalization.fit(sample.image)
    image = to_model(intensity.forward(sample.image), placement, mode="linear", padding="reflect")
    label = to_model(own, placement, mode="nearest", padding="constant")
    values = torch.tensor(sorted(plan.class_names))
    entry = {
        "case": sample.case,
        "source": source,
        "shape": placement.resampled_shape,
        "spacing": placement.grid.spacing if sample.grid.known else (1.0,) * sample.grid.spatial_dims,
        "scale": intensity.scale,
        "shift": intensity.shift,
        "classes": own.unique().tolist(),
        "parts": count_parts(own),
        "labelled": sample.label is not None,
        "known": sample.grid.known,
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


def cache_variants(
    scans: list[CachedScan],
    encode: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    plan: DiffusionPlan,
    folder: Path,
    *,
    size: tuple[int, ...],
    variants: int,
    seed: int,
    title: str,
    edge: EdgeSettings | None = None,
) -> list[Path]:
    """Encode every scan in several versions, once: first as it was acquired, then augmented.

    A scan that is not larger than ``size`` is there as acquired once. A larger one is there in crops at random places,
    half of the versions as acquired, so that its borders are learned too; where only one version is asked for, as for
    validation, that is the center. Bent versions (``plan.elastic``) keep most of their grain, and count as acquired.

    Args:
        scans: Entries of the scan cache.
        encode: Tensors of :func:`read_scan` to the denoiser's clean sample ``(c, *latent size)``.
        plan: Bounds of the augmentation.
        folder: Where the files go; its name should tell all that they depend on.
        size: Voxels per axis that larger scans are cropped to.
        variants: Versions per scan.
        seed: Decides the draws, together with case and version.
        title: Name on the progress bar.
        edge: How edges are extracted from each version; None is without.

    Returns:
        One safetensors file per scan with ``x (V, c, ...)``, ``label (V, *size)``, ``valid (V, *size)``, ``augmented
        (V,)`` bool, which versions are not as acquired, and, if asked for, ``edge (V, *size)`` uint8, 255 the most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{scan.case}.safetensors" for scan in scans]
    todo = [(scan, path) for scan, path in zip(scans, paths, strict=True) if not path.exists()]
    for scan, path in tqdm(todo, desc=f"encoding {title}", disable=not todo):
        whole = read_scan(scan)
        larger = any(have > most for have, most in zip(whole["label"].shape, size, strict=True))
        acquired = max(1, variants // 2) if larger else 1
        rows = []
        for variant in range(variants):
            tensors = whole
            if variant >= acquired:
                tensors = augment(whole, plan, derive_seed(seed, "augment", scan.case, variant), scan.spacing)
            if edge is not None:
                # Of the whole scan, as at synthesis: thresholds are shares of all the edges in it.
                found = extract_edges(tensors["image"], edge, valid=tensors["valid"], spacing=scan.spacing)[0]
                tensors = tensors | {"edge": (255 * found).round().to(torch.uint8)}
            tensors = crop_to(tensors, size, stream(seed, "crop", scan.case, variant) if variants > 1 else None)
            row = {"x": encode(tensors).to(torch.float16), "label": tensors["label"], "valid": tensors["valid"]}
            rows.append(row | ({"edge": tensors["edge"]} if edge is not None else {}))
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        changed = torch.arange(variants) >= (variants if plan.elastic else acquired)
        save_tensors(stacked | {"augmented": changed}, path)
    return paths
