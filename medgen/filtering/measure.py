"""What is measured of one labelled scan, real or synthetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from medgen.data.case import Case, Dataset
from medgen.data.io import read_grid
from medgen.data.standard import normalize, read_scan
from medgen.filtering import consistency, geometry, intensity, neighbors, size
from medgen.filtering.consistency import TOGETHER, Segmenters, dice
from medgen.metrics.descriptor import describe
from medgen.metrics.extractor import build_extractor
from medgen.threads import side_by_side
from medgen.types import BadInputError

KINDS = {**consistency.KINDS, **intensity.KINDS, **size.KINDS, **geometry.KINDS, **neighbors.KINDS}


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores and facts of one scan.

    Attributes:
        scores: Numbers in their own units, by ``kind:what``, such as ``volume:anterior``.
        classes: Names of the classes that the label shows.
        unseen: Names of those of which no segmenter finds a voxel in place.
        orientation: How the file stores its axes.
        features: ``(D,)`` of the extractor.
        descriptor: ``(C, G, G[, G])`` float16, by which copies are found.
        span: What its intensities span, in source units.
    """

    scores: dict[str, float]
    classes: frozenset[str]
    unseen: frozenset[str]
    orientation: str
    features: torch.Tensor
    descriptor: torch.Tensor
    span: float


@dataclass(frozen=True, eq=False)
class Instruments:
    """What scans are measured with.

    Attributes:
        class_names: Names by label value, those of the reference.
        segmenters: Cross-fitted on the reference; None measures no consistency.
        extractor: Maps ``(1, C, *spatial)`` in [0, 1] to ``(1, V, D)``.
        device: Where it runs.
    """

    class_names: dict[int, str]
    segmenters: Segmenters | None
    extractor: nn.Module
    device: torch.device

    def __call__(self, case: Case, dataset: Dataset, patient: str | None = None) -> Measured:
        """Measure one scan.

        Args:
            case: One of the cases of the set.
            dataset: The set.
            patient: Of a reference scan, or one made over its label map, whom its segmenter must not have seen; None
                for any other scan.

        Returns:
            What was measured.

        Raises:
            BadInputError: If the scan cannot be used or has no label.
        """
        image, label, grid = read_scan(case, dataset)
        if label is None:
            raise BadInputError(f"{case.case}: expected a label, got none. Gates judge labelled scans.")
        unit = normalize(image, case, dataset).clamp(0, 1)
        try:
            descriptor = describe(image[None])[0].half()
        except ValueError as error:
            raise BadInputError(f"{case.images[0]}: {error}") from error
        names = self.class_names
        shown = frozenset(names[value] for value in label.unique().tolist() if value)
        scores = {
            **intensity.class_intensities(image, unit, label, names, dataset.channel_names),
            **size.class_sizes(label, grid, names),
            **geometry.field_of_view(grid),
        }
        unseen: frozenset[str] = frozenset()
        if self.segmenters is not None:
            counts = self.segmenters.agreement(self.segmenters.preparation(case, dataset), patient)
            each, together = dice(counts)
            found = dict(zip((name for value, name in sorted(names.items()) if value), each, strict=True))
            scores |= {f"consistency:{name}": found[name] for name in found if name in shown}
            scores[f"consistency:{TOGETHER}"] = together
            unseen = frozenset(name for name in shown if not found[name] > 0)
        features = self.extractor(unit[None].to(self.device))[0].mean(dim=0).float().cpu()
        return Measured(
            scores=scores,
            classes=shown,
            unseen=unseen,
            orientation=geometry.orientation(read_grid(case.images[0])),
            features=features,
            descriptor=descriptor,
            span=intensity.intensity_range(image),
        )


def build_instruments(
    class_names: Mapping[int, str],
    channel_names: Mapping[int, str],
    spatial_dims: int,
    *,
    segmenters: Segmenters | None,
    device: torch.device,
) -> Instruments:
    """Instruments for scans of one kind.

    Args:
        class_names: Names by label value.
        channel_names: Names by channel.
        spatial_dims: 2 or 3.
        segmenters: Cross-fitted on the reference; None measures no consistency.
        device: Where networks run.

    Returns:
        The instruments, with medgen's own extractor of features.
    """
    dims: Any = spatial_dims
    extractor = build_extractor("efficientnet-lite0", spatial_dims=dims, in_channels=len(channel_names)).to(device)
    return Instruments(dict(class_names), segmenters, extractor, device)


def measure_all(
    instruments: Instruments, cases: Sequence[Case], dataset: Dataset, patients: Sequence[str | None], name: str
) -> Iterator[Measured | BadInputError]:
    """Measure scans, a few side by side.

    Args:
        instruments: What they are measured with.
        cases: Which.
        dataset: Their set.
        patients: As for :class:`Instruments`, of each.
        name: Of the scans, for the progress bar.

    Yields:
        What was measured of each, in order; the error of one that cannot be used.
    """

    def measure(row: int) -> Measured | BadInputError:
        try:
            return instruments(cases[row], dataset, patients[row])
        except BadInputError as error:
            return error

    with side_by_side() as pool:
        yield from tqdm(pool.map(measure, range(len(cases))), desc=f"{name} scans", total=len(cases), unit="scan")
