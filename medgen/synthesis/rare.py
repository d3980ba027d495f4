"""Which label maps are rare: by the classes that they show and by how large these are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medgen.data.dataset import load_label
from medgen.generator import Generator
from medgen.metrics.rarity import NEAREST, describe_classes, rarity, standardize
from medgen.seeding import derive_seed
from medgen.synthesis.plan import SourceFile
from medgen.types import BadInputError

MOST = 20.0  # times as often as the median map


def rare_weights(files: Sequence[SourceFile], generator: Generator) -> list[float]:
    """How often each label map is to be drawn so that all sizes are shown alike, not as often as they occur.

    The weight is the inverse of the density of maps around it, by the distance to the fifth nearest in the space of
    classes shown and logarithms of their volumes (:func:`medgen.metrics.rarity.rarity`), relative to the median map
    and at most 20.

    Whose maps they are is not known here: slices of one patient, which are alike, count as so many maps.

    Args:
        files: The label maps.
        generator: The model, for its classes.

    Returns:
        A positive number for each.

    Raises:
        BadInputError: If there are fewer than 6 maps, or most of them are alike.
    """
    if len(files) <= NEAREST:
        raise BadInputError(
            f"label_sampling 'rare': expected {NEAREST + 1} or more label maps, by which rare ones can be told, got "
            f"{len(files)}. Add some, or take them 'in_turn'."
        )
    known = True
    in_mm: list[torch.Tensor] = []
    shares: list[torch.Tensor] = []
    for file in files:
        sample = load_label(file.path, generator.config.class_names)
        if sample.label is None:
            raise BadInputError(f"{file.path}: expected a label map, got none. Check the file.")
        index, spacing = generator.label_to_index(sample.label), torch.tensor(sample.grid.spacing, dtype=torch.float64)
        known &= sample.grid.known
        for rows, volume in ((in_mm, float(spacing.prod())), (shares, 1 / index.numel())):
            rows.append(describe_classes(index, generator.num_classes, voxel_volume=volume))
    sizes = torch.stack(in_mm if known else shares)  # without a voxel size, the share of the field of view
    features = standardize(sizes, sizes)
    alone = range(len(files))
    distance = rarity(features, features, groups=alone, reference_groups=alone)
    if (usual := distance.median()) == 0:
        raise BadInputError(
            "label_sampling 'rare': expected label maps that differ in the sizes of their classes, got most of them "
            "alike. Leave copies out, or take them 'in_turn'."
        )
    dimensions = int((features.std(dim=0) > 1e-9).sum())
    weights = (distance / usual).pow(dimensions).clamp(max=MOST)
    return weights.clamp(min=torch.finfo(torch.float32).tiny).tolist()


def draw_by_weight(weights: Sequence[float], count: int, seed: int) -> list[int]:
    """Rows drawn as often as their weights ask, as evenly as can be.

    The draws are the points ``frac(u + i phi)``, phi the golden section, on the line of cumulated weights: each row is
    drawn about as often as expected, from the first few draws on.

    Args:
        weights: Positive, one a row.
        count: How many draws.
        seed: Decides u.

    Returns:
        The rows. More draws begin with the same ones.
    """
    ends = torch.tensor(weights, dtype=torch.float64).cumsum(dim=0)
    offset = derive_seed(seed, "label_sampling") / 2**63
    points = (offset + torch.arange(count, dtype=torch.float64) * ((5**0.5 - 1) / 2)) % 1
    return torch.searchsorted(ends, points * ends[-1], right=True).clamp(max=len(weights) - 1).tolist()
