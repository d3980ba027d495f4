"""One scan as metrics and segmenters see it: axes in RAS order, intensities by the percentiles of the scan."""

from __future__ import annotations

from dataclasses import replace

import torch

from medgen.data.case import RGB, Case, Dataset
from medgen.data.dataset import load_case
from medgen.data.geometry import place, to_model
from medgen.data.intensity import Normalization
from medgen.types import BadInputError, Grid, Sample


def read_scan(case: Case, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor | None, Grid]:
    """One scan as all metrics see it: in RAS order where its orientation is known.

    Args:
        case: One of the cases of the set.
        dataset: The set.

    Returns:
        Image ``(C, *spatial)`` in source units, label ``(*spatial)`` or None, and their grid.

    Raises:
        BadInputError: If the scan cannot be used.
    """
    sample = load_case(case, dataset)
    if sample.image is None:
        raise BadInputError(f"{dataset.root}: expected an image for case {sample.case}, got none.")
    placement = place(sample.grid)
    image = to_model(sample.image, placement, mode="linear", padding="constant")
    label = None
    if sample.label is not None:
        label = to_model(sample.label[None], placement, mode="nearest", padding="constant")[0]
    return image, label, placement.grid


def normalize(image: torch.Tensor, case: Case, dataset: Dataset) -> torch.Tensor:
    """Intensities as the networks see them.

    Args:
        image: ``(C, *spatial)`` in source units.
        case: The scan, for messages.
        dataset: Its set: colors are scaled together, channels one by one.

    Returns:
        ``(C, *spatial)`` in [0, 1], by the percentiles of the scan.
    """
    intensity = Normalization(per_channel=dataset.channel_names != RGB).fit(image, source=case.images[0])
    return (intensity.forward(image) + 1) / 2


def for_display(case: Case, dataset: Dataset) -> Sample:
    """One scan as it is drawn.

    Args:
        case: One of the cases of the set.
        dataset: The set.

    Returns:
        A sample with image in [0, 1] and without label, in RAS order.
    """
    image, _, grid = read_scan(case, dataset)
    return replace(load_case(case, dataset), grid=grid, image=normalize(image, case, dataset), label=None)
