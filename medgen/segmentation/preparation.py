"""The grid and the intensities at which segmenters see scans, fitted on the real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm

from medgen.data.case import Case, Dataset
from medgen.data.standard import normalize, read_scan
from medgen.seeding import draw
from medgen.segmentation.augmentation import Pair
from medgen.threads import side_by_side
from medgen.types import BadInputError

_LONGEST = {2: 128, 3: 96}  # voxels along an axis
_MEASURED = 16  # scans


@dataclass(frozen=True)
class Preparation:
    """How scans are brought to the grid of a segmenter.

    Attributes:
        spacing: Median voxel edges of the real scans in mm, in RAS order; scans without known spacing have these.
        target: Voxel edges of the segmenter's grid; as `spacing`, or larger where scans would be too large.
        patch: Voxels per axis that the segmenter sees; 2D scans are brought to exactly this size.
        bytes_per_scan: Memory of a prepared scan, about.
    """

    spacing: tuple[float, ...]
    target: tuple[float, ...]
    patch: tuple[int, ...]
    bytes_per_scan: int

    def __call__(self, case: Case, dataset: Dataset) -> Pair:
        """Read a scan.

        Args:
            case: One of the cases of the set.
            dataset: The set.

        Returns:
            Image ``(C, *spatial)`` float16 in [0, 1] and label ``(*spatial)`` uint8.

        Raises:
            BadInputError: If the scan cannot be used or has no label.
        """
        image, label, grid = read_scan(case, dataset)
        if label is None:
            raise BadInputError(f"{case.case}: expected a label, got none.")
        goal = self.patch
        if label.ndim == 3:
            own = grid.spacing if grid.known else self.spacing
            lengths = zip(label.shape, own, self.target, strict=True)
            goal = tuple(max(1, round(count * edge / target)) for count, edge, target in lengths)
        if tuple(label.shape) != goal:
            label = F.interpolate(label[None, None].float(), goal, mode="nearest-exact")[0, 0]
        return _resize(normalize(image, case, dataset), goal), label.to(torch.uint8)

    def image(self, case: Case, dataset: Dataset) -> torch.Tensor:
        """Read a scan whole, without its label map.

        Args:
            case: One of the cases of the set.
            dataset: The set.

        Returns:
            ``(C, *patch)`` float16 in [0, 1].

        Raises:
            BadInputError: If the scan cannot be used.
        """
        return _resize(normalize(read_scan(case, dataset)[0], case, dataset), self.patch)


def _resize(image: torch.Tensor, goal: tuple[int, ...]) -> torch.Tensor:
    if tuple(image.shape[1:]) != goal:
        smaller = any(n < m for n, m in zip(goal, image.shape[1:], strict=True))
        mode = "area" if smaller else ("bilinear" if len(goal) == 2 else "trilinear")
        image = F.interpolate(image.clamp(0, 1)[None], goal, mode=mode)[0]
    return image.clamp(0, 1).half()


def fit_preparation(cases: Sequence[Case], dataset: Dataset, seed: int) -> Preparation:
    """Choose the grid by some of the real scans: at most 128² pixels, or 96 voxels along the longest axis in 3D.

    Args:
        cases: The real scans that segmenters learn from.
        dataset: Their set.
        seed: Chooses those that are measured.

    Returns:
        The preparation.

    Raises:
        BadInputError: If one of the scans cannot be used.
    """
    dims = dataset.spatial_dims
    grids = [read_scan(cases[row], dataset)[2] for row in draw(range(len(cases)), _MEASURED, seed, "utility", "grids")]
    spacing, shape = (
        torch.tensor(facts, dtype=torch.float64).median(dim=0).values
        for facts in ([grid.spacing for grid in grids], [grid.shape for grid in grids])
    )
    target = spacing * (shape.max() / _LONGEST[dims]).clamp(min=1)
    size = shape * spacing / target
    if dims == 2:
        size = size.max().expand(2)
    edges = ((size / 16).round() * 16).clamp(32, _LONGEST[2] if dims == 2 else 48)
    each = math.prod(size.tolist()) * (2 * len(dataset.channel_names) + 1)
    return Preparation(
        tuple(spacing.tolist()), tuple(target.tolist()), tuple(int(edge) for edge in edges), math.ceil(each)
    )


def load_pairs(cases: Sequence[Case], dataset: Dataset, preparation: Preparation, name: str) -> list[Pair]:
    """Read scans for a segmenter, a few side by side.

    Args:
        cases: Which.
        dataset: Their set.
        preparation: How.
        name: Of the scans, for the progress bar.

    Returns:
        Image and label of each, in order.

    Raises:
        BadInputError: If one of the scans cannot be used.
    """
    with side_by_side() as pool:
        loaded = pool.map(lambda case: preparation(case, dataset), cases)
        return list(tqdm(loaded, desc=f"{name} scans for segmenters", total=len(cases), unit="scan"))
