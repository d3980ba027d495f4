"""How rare a labelled scan is among real ones, and how many synthetic scans fill the tail of the real set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from medgen.metrics.features import check_feature_sets

NEAREST = 5


def describe_classes(
    label: torch.Tensor, classes: int, *, image: torch.Tensor | None = None, voxel_volume: float = 1.0
) -> torch.Tensor:
    """Which classes a label map shows, how large they are, and how bright the image is in them.

    No network takes part: features of networks tell real scans from synthetic ones, so that in them nearly every
    synthetic scan seems rare, whatever it shows.

    Args:
        label: ``(*spatial)`` class indices.
        classes: K, the background included.
        image: ``(C, *spatial)`` intensities on the scale of all scans that are compared; None leaves brightness out.
        voxel_volume: Of a voxel, in mm³ or any unit that all scans share.

    Returns:
        ``(2 (K - 1) + C K,)`` float64: for each class but the background 1 or 0 for shown or not, then the logarithm of
        its volume, then for each class the mean intensity of each channel; NaN where the class is not shown.
    """
    counts = torch.bincount(label.flatten().long(), minlength=classes).double()
    shown = counts > 0
    size = torch.where(shown, (counts * voxel_volume).log(), math.nan)
    parts = [shown[1:].double(), size[1:]]
    if image is not None:
        flat, index = image.flatten(1).double(), label.flatten().long()
        sums = torch.zeros(len(flat), len(counts), dtype=torch.float64).index_add_(1, index, flat)
        parts.append((sums / counts).flatten())  # 0 / 0 is NaN
    return torch.cat(parts)


def standardize(reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Features in standard deviations of the reference; what a scan does not have lies at the mean.

    Args:
        reference: ``(N, D)`` of the real set; NaN where a scan has no such feature.
        features: ``(M, D)`` to bring to that scale, NaN likewise.

    Returns:
        ``(M, D)`` float64 without NaN. What does not vary in the reference keeps its own unit.

    Raises:
        ValueError: If the sets differ in ``D``.
    """
    if reference.ndim != 2 or features.ndim != 2 or reference.shape[1] != features.shape[1]:
        raise ValueError(
            f"standardize: expected (N, D) and (M, D), got {tuple(reference.shape)} and {tuple(features.shape)}. "
            "Describe both sets alike."
        )
    reference, features = reference.double(), features.double()
    known = ~reference.isnan()
    count = known.sum(dim=0).clamp(min=1)
    mean = torch.where(known, reference, 0).sum(dim=0) / count
    std = (torch.where(known, reference - mean, 0).square().sum(dim=0) / count).sqrt()
    return torch.where(features.isnan(), 0, (features - mean) / torch.where(std > 1e-9, std, 1))


def rarity(
    features: torch.Tensor,
    reference: torch.Tensor,
    *,
    groups: Sequence[object],
    reference_groups: Sequence[object],
    nearest_k: int = NEAREST,
) -> torch.Tensor:
    """Distance of each scan to its k-th nearest real scan of another patient: the larger, the lower the density there.

    The density is about ``k / (N V r^D)`` for distance r in D dimensions, V the volume of the unit ball (Loftsgaarden
    and Quesenberry 1965, equation 3).

    Args:
        features: ``(M, D)``, without NaN.
        reference: ``(N, D)`` of the real set.
        groups: Patient of each of the M scans; of a synthetic one that of its label map.
        reference_groups: Patient of each of the N.
        nearest_k: k.

    Returns:
        ``(M,)`` float64.

    Raises:
        ValueError: If the sets do not compare, or a scan has fewer than k real ones of other patients.
    """
    features, reference = check_feature_sets("rarity", features, reference, minimum=1)
    if len(groups) != len(features) or len(reference_groups) != len(reference):
        raise ValueError(
            f"groups: expected one for each of {len(features)} and {len(reference)} scans, got {len(groups)} and "
            f"{len(reference_groups)}."
        )
    number = {name: index for index, name in enumerate(dict.fromkeys([*groups, *reference_groups]))}
    own, others = (torch.tensor([number[name] for name in names]) for names in (groups, reference_groups))
    same = own[:, None] == others
    if nearest_k < 1 or int((~same).sum(dim=1).min()) < nearest_k:
        raise ValueError(
            f"nearest_k: expected 1 to {int((~same).sum(dim=1).min())}, the real scans of other patients, got "
            f"{nearest_k}. Add scans."
        )
    distances = torch.cdist(features, reference, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.masked_fill(same.to(distances.device), math.inf).kthvalue(nearest_k, dim=1).values


@dataclass(frozen=True, eq=False)
class Tail:
    """What :func:`find_tail` found.

    Attributes:
        real: ``(N,)`` rarity of each real scan.
        synthetic: ``(M,)`` rarity of each synthetic scan.
        threshold: Rarity at which the tail of the real set begins.
        limit: Rarity of its rarest scan; what lies beyond is nothing that the real set knows.
        in_tail: ``(M,)`` which synthetic scans lie between the two and are sound.
    """

    real: torch.Tensor
    synthetic: torch.Tensor
    threshold: float
    limit: float
    in_tail: torch.Tensor

    @property
    def share(self) -> float:
        """Share of the synthetic scans that fill the tail."""
        return float(self.in_tail.double().mean())


def find_tail(
    real: torch.Tensor,
    synthetic: torch.Tensor,
    *,
    groups: Sequence[object],
    synthetic_groups: Sequence[object],
    sound: torch.Tensor | None = None,
    share: float = 0.1,
    nearest_k: int = NEAREST,
) -> Tail:
    """Which synthetic scans lie where the real set is thinnest, and are still scans.

    Noise is rare too. A scan therefore counts only if it lies no farther from the real scans than the rarest of these
    does from the others, and if it is sound: shows what its label says, by a segmenter that was trained on real scans.

    Args:
        real: ``(N, D)`` of :func:`describe_classes`, one row a scan.
        synthetic: ``(M, D)`` likewise.
        groups: Patient of each real scan: a patient's own scans say nothing of how usual he is.
        synthetic_groups: Patient whose label map each synthetic scan was made for, or anything else where there is
            none; not compared with that patient's scans either, as a copy of a rare scan is rare.
        sound: ``(M,)`` bool; None takes all for sound.
        share: Share of the real set that is its tail, in (0, 1).
        nearest_k: k of :func:`rarity`.

    Returns:
        The tail, and who is in it.

    Raises:
        ValueError: If the share is out of range or the sets do not compare.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected above 0 and below 1, got {share}. 0.1 is the lowest decile.")
    rows, made = standardize(real, real), standardize(real, synthetic)
    of_real, of_synthetic = (
        rarity(features, rows, groups=names, reference_groups=groups, nearest_k=nearest_k)
        for features, names in ((rows, groups), (made, synthetic_groups))
    )
    threshold, limit = float(of_real.quantile(1 - share)), float(of_real.max())
    inside = (of_synthetic > threshold) & (of_synthetic <= limit)
    if sound is not None:
        if sound.shape != inside.shape:
            raise ValueError(f"sound: expected {tuple(inside.shape)}, got {tuple(sound.shape)}.")
        inside &= sound.to(inside.device, torch.bool)
    return Tail(of_real, of_synthetic, threshold, limit, inside)
