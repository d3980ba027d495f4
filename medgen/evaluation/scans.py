"""One pass over a folder: of every scan its features, its radiomics and its descriptor, and not its voxels."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from medgen.data.case import Case, Dataset, Rejection
from medgen.data.standard import normalize, read_scan
from medgen.evaluation.cache import FeatureCache
from medgen.metrics.descriptor import GRID, describe
from medgen.metrics.frd import features as radiomic_features
from medgen.metrics.protocols import PROTOCOLS
from medgen.provenance import sha256_array
from medgen.threads import side_by_side
from medgen.types import BadInputError, Grid

Region = Literal["whole", "label"]
# Raise when features of equal scans change, so that older caches are not read.
_VERSION = 2
_BATCH = 16  # pictures that go through the network together


@dataclass(frozen=True)
class Recipe:
    """What is computed of every scan.

    Attributes:
        network: Extractor of the features.
        stamp: What identifies it and its preprocessing.
        device: Where the network runs.
        protocols: Protocols of the Fréchet radiomic distance.
        region: Where radiomic features are taken.
        cache: Where results are kept.
        workers: Scans that are read and measured side by side.
    """

    network: nn.Module
    stamp: dict[str, Any]
    device: torch.device
    protocols: tuple[str, ...]
    region: Region
    cache: FeatureCache
    workers: int


@dataclass(eq=False)
class Scans:
    """The scans of one set that could be read, without their voxels.

    Attributes:
        dataset: The set.
        cases: The N scans.
        features: ``(N, V, D)`` float32.
        radiomics: ``(N, F)`` float64 for each protocol; a row of NaN where a scan has no features.
        excluded: For each protocol, how many scans have no features, by reason.
        descriptors: ``(N, C, G, G[, G])`` float16, by which copies are found.
        shapes: Spatial shape of each.
        labels: Digest of the label map of each, or None.
        classes: Label values that each label map shows, without the background.
    """

    dataset: Dataset
    cases: list[Case] = field(default_factory=list)
    features: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    radiomics: dict[str, np.ndarray] = field(default_factory=dict)
    excluded: dict[str, dict[str, int]] = field(default_factory=dict)
    descriptors: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    classes: list[frozenset[int]] = field(default_factory=list)

    @property
    def groups(self) -> list[str]:
        """Patient of each scan; a scan of unknown patient is one of its own."""
        return [case.group or f"case {case.case}" for case in self.cases]

    def rows(self, names: set[str]) -> list[int]:
        """Rows of the named cases.

        Args:
            names: Identifiers of cases.

        Returns:
            Rows in the order of `cases`.
        """
        return [index for index, case in enumerate(self.cases) if case.case in names]


@dataclass(eq=False)
class _Measured:
    """What is known of one scan; `image` only as long as the network has not seen it."""

    case: Case
    keys: dict[str, str]
    shape: tuple[int, ...]
    label: str | None
    classes: frozenset[int]
    descriptor: np.ndarray
    radiomics: dict[str, np.ndarray]
    reasons: dict[str, str]
    features: np.ndarray | None = None
    image: torch.Tensor | None = None


def measure(dataset: Dataset, recipe: Recipe, name: str, *, skip_bad: bool) -> Scans:
    """Measure every scan of a folder; memory holds a few scans at a time.

    Args:
        dataset: The set.
        recipe: What to compute.
        name: Of the set, for the progress bar.
        skip_bad: Note scans that cannot be used in ``dataset.rejected`` and go on.

    Returns:
        The measured scans.

    Raises:
        BadInputError: If a scan cannot be used and is not to be skipped, or fewer than two are left.
    """
    scans = Scans(dataset)
    done: list[_Measured] = []
    waiting: dict[tuple[int, ...], list[_Measured]] = {}
    running: deque[Future[None]] = deque()
    with (
        tqdm(desc=f"{name} scans", total=len(dataset.cases), unit="scan") as bar,
        side_by_side(recipe.workers) as pool,
    ):

        def extract(shape: tuple[int, ...]) -> None:
            running.append(pool.submit(_extract, waiting.pop(shape), recipe))
            if len(running) > recipe.workers:
                running.popleft().result()

        for measured in _ahead(pool, dataset, recipe, skip_bad=skip_bad):
            done.append(measured)
            if measured.image is not None:
                shape = tuple(measured.image.shape)
                waiting.setdefault(shape, []).append(measured)
                if len(waiting[shape]) * _pictures(measured.image) >= _BATCH:
                    extract(shape)
                elif sum(map(len, waiting.values())) >= 2 * _BATCH:  # many shapes: memory is to stay bounded
                    extract(max(waiting, key=lambda shape: len(waiting[shape])))
            bar.update()
        for shape in list(waiting):
            extract(shape)
        for future in running:
            future.result()
    if len(done) < 2:
        raise BadInputError(f"{dataset.root}: expected at least 2 usable {name} scans, got {len(done)}. Add scans.")
    scans.cases = [item.case for item in done]
    scans.shapes = [item.shape for item in done]
    scans.labels = [item.label for item in done]
    scans.classes = [item.classes for item in done]
    scans.features = torch.from_numpy(np.stack([item.features for item in done if item.features is not None]))
    scans.descriptors = torch.from_numpy(np.stack([item.descriptor for item in done]))
    for protocol in recipe.protocols:
        scans.radiomics[protocol] = np.stack([item.radiomics[protocol] for item in done])
        scans.excluded[protocol] = dict(Counter(item.reasons[protocol] for item in done if item.reasons[protocol]))
    return scans


def _pictures(image: torch.Tensor) -> int:
    """A volume is many pictures already."""
    return _BATCH if image.ndim == 4 else 1


def _ahead(pool: Executor, dataset: Dataset, recipe: Recipe, *, skip_bad: bool) -> Iterator[_Measured]:
    """Measured scans in the order of the folder, a few ahead of the caller."""
    ahead: deque[tuple[Case, Future[_Measured]]] = deque()
    cases = iter(dataset.cases)
    while True:
        while len(ahead) < 2 * recipe.workers and (case := next(cases, None)) is not None:
            ahead.append((case, pool.submit(_measure, case, dataset, recipe)))
        if not ahead:
            return
        case, future = ahead.popleft()
        try:
            yield future.result()
        except BadInputError as error:
            if not skip_bad:
                raise BadInputError(f"{error} Or leave out all scans that cannot be used: --skip_bad.") from error
            rejection = Rejection(case.case, str(error))
            if rejection not in dataset.rejected:
                dataset.rejected.append(rejection)


def _measure(case: Case, dataset: Dataset, recipe: Recipe) -> _Measured:
    """What is known of one scan before the network sees it."""
    files = [*case.images, *([case.label] if case.label else [])]
    missing = [path for path in files if not path.is_file() and not path.is_dir()]
    if missing:
        raise BadInputError(f"{missing[0]}: expected a file, got none. Add it, or take case {case.case} off the list.")
    kind = {"version": _VERSION, "channels": sorted(dataset.channel_names.values()), "dims": dataset.spatial_dims}
    stamps: dict[str, dict[str, Any]] = {
        "features": {**kind, **recipe.stamp},
        "descriptor": {**kind, "grid": GRID[dataset.spatial_dims]},
        **{name: {**kind, "protocol": name, "region": recipe.region} for name in recipe.protocols},
    }
    flat = [part for path in files for part in (sorted(path.rglob("*")) if path.is_dir() else [path]) if part.is_file()]
    keys = {name: FeatureCache.digest(flat, stamp) for name, stamp in stamps.items()}
    known = {name: recipe.cache.get(key) for name, key in keys.items()}
    if (found := known["descriptor"]) is not None and all(known[name] for name in recipe.protocols):
        arrays, facts = found
        measured = _Measured(
            case=case,
            keys=keys,
            shape=tuple(int(size) for size in facts["shape"].split()),
            label=facts["label"] or None,
            classes=frozenset(map(int, facts["classes"].split())),
            descriptor=arrays["descriptor"],
            radiomics={name: known[name][0]["row"] for name in recipe.protocols},  # type: ignore[index]
            reasons={name: known[name][1]["reason"] for name in recipe.protocols},  # type: ignore[index]
        )
        if (features := known["features"]) is not None:
            measured.features = features[0]["features"]
            return measured
        image, _, _ = read_scan(case, dataset)
    else:
        image, label, grid = read_scan(case, dataset)
        measured = _first_look(case, keys, image, label, grid, recipe)
    measured.image = normalize(image, case, dataset)
    if known["features"] is not None:
        measured.features, measured.image = known["features"][0]["features"], None
    return measured


def _first_look(
    case: Case, keys: dict[str, str], image: torch.Tensor, label: torch.Tensor | None, grid: Grid, recipe: Recipe
) -> _Measured:
    """Descriptor and radiomic features of a scan that no cache knows."""
    try:
        descriptor = describe(image[None])[0].half().numpy()
    except ValueError as error:
        raise BadInputError(f"{case.images[0]}: {error}") from error
    facts = {
        "shape": " ".join(map(str, image.shape[1:])),
        "label": "" if label is None else sha256_array(label),
        "classes": "" if label is None else " ".join(str(value) for value in label.unique().tolist() if value),
    }
    radiomics, reasons = {}, {}
    pixels = image.numpy().astype(np.float64)
    for name in recipe.protocols:
        radiomics[name], reasons[name] = _radiomics(pixels, label, grid, name, recipe.region)
        recipe.cache.put(keys[name], {"row": radiomics[name]}, {"reason": reasons[name]})
    recipe.cache.put(keys["descriptor"], {"descriptor": descriptor}, facts)
    return _Measured(
        case=case,
        keys=keys,
        shape=tuple(image.shape[1:]),
        label=facts["label"] or None,
        classes=frozenset(map(int, facts["classes"].split())),
        descriptor=descriptor,
        radiomics=radiomics,
        reasons=reasons,
    )


def _radiomics(
    pixels: np.ndarray, label: torch.Tensor | None, grid: Grid, name: str, region: Region
) -> tuple[np.ndarray, str]:
    """Row of one protocol, and why it is empty."""
    protocol = PROTOCOLS[name]
    spacing = grid.spacing if grid.known else None
    channels = "luminance" if len(pixels) == 1 or (len(pixels) == 3 and pixels.ndim == 3) else "each"
    width = len(protocol.columns(pixels.ndim - 1)) * (len(pixels) if channels == "each" else 1)
    if region == "label" and label is None:
        return np.full(width, np.nan), "no label"
    mask = None if region == "whole" or label is None else (label > 0).numpy().astype(np.uint8)
    try:
        return radiomic_features(pixels, mask, protocol=protocol, spacing=spacing, channels=channels), ""
    except BadInputError as error:
        return np.full(width, np.nan), str(error)


def _extract(batch: Sequence[_Measured], recipe: Recipe) -> None:
    """Run the network over scans of one shape and keep what it gives."""
    images = torch.stack([item.image for item in batch if item.image is not None])
    rows = recipe.network(images.to(recipe.device)).float().cpu().numpy()
    for item, row in zip(batch, rows, strict=True):
        item.features, item.image = row, None
        recipe.cache.put(item.keys["features"], {"features": row})
