"""Share of synthetic scans that are copies of training scans, as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from medgen.metrics.copies import OWN_GROUP, CopySearch, find_copies
from medgen.metrics.descriptor import GRID, describe
from medgen.metrics.set_metric import SetMetric
from medgen.seeding import derive_seed

QUANTILES = (0.05, 0.5, 0.95)


class Memorization(SetMetric):
    """Share of synthetic scans that are copies of real ones, however flipped, turned, cropped, noisy or rescaled.

    Keeps one descriptor of half-precision numbers a scan, whatever its size: 8 KiB per channel in 2D, 64 KiB in 3D.
    A copy is a scan whose similarity to some real scan is beyond what real scans of different patients reach. It sees
    copies of whole scans only: a copied organ in a new surrounding, a contrast turned upside down, a quarter turn, or
    a broad empty margin that one of the two does not have, can go unseen. Scans drawn over the label map of a training
    scan share its anatomy, so they come closer to it than scans drawn over other maps do. Nearly empty pictures, such
    as two bright cells on black, can be laid on one another and be false alarms.

    Measured at the default rate on real scans of patients left out, false alarms were 0 of 499 cardiac MR slices, 0 of
    221 hippocampus MR volumes, 0 of 259 chest X-rays, and 5 of 168 pictures of cell nuclei (3 %), a mixture of
    fluorescence, histology and brightfield, for which the rate does not hold.

    Args:
        false_alarm_rate: Share of synthetic scans that may be taken for copies where there are none, for scans of one
            kind (see :func:`medgen.metrics.copies.copy_threshold`).
        grid: Edge of the descriptor in cells, a multiple of 4. None: 64 in 2D, 32 in 3D.
        **kwargs: As for :class:`medgen.metrics.set_metric.SetMetric`: ``reset_real_features`` and torchmetrics' own.

    Attributes:
        higher_is_better: False.
        real_descriptors: Descriptors of the real scans, float16: flat, so that processes without scans can join.
        synthetic_descriptors: Descriptors of the synthetic scans.
        real_groups: Hashed patients of the real scans, int64; -1 is shared with nobody.

    Example:
        >>> import torch
        >>> scans = torch.rand(30, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> metric = Memorization()
        >>> metric.update(scans[:25], real=True)
        >>> metric.update(scans[20:].flip(-1), real=False)  # half of these are in both
        >>> metric.compute()["copies"].item()
        0.5
    """

    higher_is_better = False

    real_descriptors: list[torch.Tensor]
    synthetic_descriptors: list[torch.Tensor]
    real_groups: list[torch.Tensor]

    def __init__(self, *, false_alarm_rate: float = 0.005, grid: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < false_alarm_rate <= 0.5:
            raise ValueError(f"false_alarm_rate: expected above 0 and at most 0.5, got {false_alarm_rate}.")
        if grid is not None and (grid < 16 or grid % 4):
            raise ValueError(f"grid: expected a multiple of 4 from 16 on, got {grid}.")
        self.false_alarm_rate, self.grid = false_alarm_rate, grid
        self._found: CopySearch | None = None
        for name in ("real_descriptors", "synthetic_descriptors"):
            self._add_flat_state(name, torch.float16)
        self._add_flat_state("real_groups", torch.int64)

    def update(self, images: torch.Tensor, real: bool, groups: Sequence[object] | None = None) -> None:
        """Add a batch of scans of one shape; the next batch may have another.

        Args:
            images: ``(B, C, H, W[, D])`` in any units.
            real: Whether the scans are real, that is, training scans.
            groups: For real scans, the patient of each: scans of one patient may be alike without being copies. None:
                each scan is of a patient of its own.

        Raises:
            ValueError: If the scans differ in channels or dimension from those before, are not finite, are constant, or
                the groups do not fit them.
        """
        name = "real" if real else "synthetic"
        if groups is not None and (not real or len(groups) != len(images)):
            raise ValueError(
                f"groups: expected one for each of {len(images)} real scans, got {len(groups)} for {name} ones. "
                "Give groups with real scans only, one a scan."
            )
        descriptors = describe(images, grid=self.grid)
        self.kind = self._check_kind(images, name)
        getattr(self, f"{name}_descriptors").append(descriptors.half().flatten())
        if real:
            ids = [OWN_GROUP] * len(images) if groups is None else [derive_seed("group", str(g)) for g in groups]
            self.real_groups.append(torch.tensor(ids, dtype=torch.int64, device=self.kind.device))
        self._found = None

    def compute(self) -> dict[str, torch.Tensor]:
        """Copies among everything that was added.

        Returns:
            Float64 tensors: ``copies``, share of synthetic scans that are copies; ``threshold``, the similarity from
            which they are; ``real_copies``, share of real scans of which another patient has a copy (a leak, or a false
            alarm where there is none); ``nearest_ratio_quantiles`` ``(3,)``, the 5, 50 and 95 % quantiles of the ratio
            of :class:`CopySearch`, near 1 for new scans and near 0 for copies; ``auth_pct`` in [0, 100], the percentage
            of ratios above 1 (:func:`medgen.metrics.authenticity.auth_pct` under these distances).

        Raises:
            ValueError: If either set has fewer than two scans, or the real scans are of one patient.
        """
        real, synthetic = (self._descriptors(name) for name in ("real", "synthetic"))
        if min(len(real), len(synthetic)) < 2:
            raise ValueError(
                "Memorization: expected at least 2 real and 2 synthetic scans, "
                f"got {(len(real), len(synthetic))}. Call update with more scans."
            )
        groups = self._flat("real_groups")
        found = find_copies(real, synthetic, groups=groups, false_alarm_rate=self.false_alarm_rate)
        self._found = found
        quantiles = torch.tensor(QUANTILES, dtype=torch.float64, device=found.ratio.device)
        return {
            "copies": found.is_copy.double().mean(),
            "threshold": torch.tensor(found.threshold, dtype=torch.float64, device=found.ratio.device),
            "real_copies": (found.closest_real.similarity > found.threshold).double().mean(),
            "nearest_ratio_quantiles": torch.quantile(found.ratio, quantiles),
            "auth_pct": 100 * (found.ratio > 1).double().mean(),
        }

    def search(self) -> CopySearch:
        """What lies behind :meth:`compute`, scan by scan, in the order of the updates (of process 0 first).

        Returns:
            Matches and verdicts, for a gallery of the closest pairs.

        Raises:
            ValueError: As for :meth:`compute`.
        """
        if self._found is None:
            self._computed = None
            self.compute()
        if self._found is None:
            raise RuntimeError("Memorization: expected compute to search for copies, got no result.")
        return self._found

    def reset(self) -> None:
        """Forget the scans; the real ones only if ``reset_real_features``."""
        super().reset()
        self._found = None

    def _descriptors(self, name: str) -> torch.Tensor:
        """Descriptors ``(N, C, G, G[, G])`` of a set, N 0 before any scan."""
        flat = self._flat(f"{name}_descriptors")
        dims, channels = self.kind.tolist()
        return flat.view(-1, channels, *[self.grid or GRID[dims]] * dims) if dims else flat
