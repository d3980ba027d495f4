"""Fréchet distances over radiomic features as frd-score computes them, and the record that every protocol gives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_V0_RANGE = 7.45670747756958  # to which v0 stretches every feature
_ROUNDING = 1e-9  # a column that stays below in both sets is rounding noise of a mean that is 0
_SHARE = 0.5  # of the distance, from which on a single column is named


@dataclass(frozen=True)
class RadiomicDistance:
    """One distance and what it rests on.

    Attributes:
        protocol: Name of the protocol, without which the value means nothing.
        value: The distance, in the unit of its protocol.
        squared: Squared Fréchet distance of the normalized features, before the protocol's last step.
        n_real: Real scans used.
        n_synthetic: Synthetic scans used.
        columns: Number of features used.
        dropped_columns: Reason for each feature that was not used.
        dropped_rows: Real and synthetic scans that were not used for a feature that is not a number.
        interval: 95 % interval of the value; None where the protocol has none.
        p_value: Of the hypothesis that both sets come from one distribution; None where the protocol has none.
        bias: What `squared` is on average for two sets of one distribution at these sizes; None as above.
        shares: Part of the sum of one-dimensional distances that each of the ten strongest features makes up.
        warnings: What a reader of the value should know.
    """

    protocol: str
    value: float
    squared: float
    n_real: int
    n_synthetic: int
    columns: int
    dropped_columns: dict[str, str] = field(default_factory=dict)
    dropped_rows: tuple[int, int] = (0, 0)
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    bias: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def frd_v0(x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> RadiomicDistance:
    """Distance of Osuala et al. 2024 as frd-score 1.0.1 computes it: joint min-max, raw squared distance.

    Args:
        x: ``(N, D)`` features of the real scans.
        y: ``(M, D)`` features of the synthetic scans.
        names: Names of the columns.

    Returns:
        The squared distance; a not-a-number becomes the middle of the range, as there.

    Raises:
        ValueError: If a set has fewer than two scans.
    """
    require_two(x, y)
    both = np.concatenate([x, y]).astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # columns without a number
        low, high = np.nanmin(both, axis=0), np.nanmax(both, axis=0)
    width = high - low
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = (both - low) / width * _V0_RANGE
    scaled = np.where((width == 0) | np.isnan(scaled), _V0_RANGE / 2, scaled)
    squared = _squared(scaled[: len(x)], scaled[len(x) :])
    return _plain("frd-v0", squared, squared, scaled[: len(x)], scaled[len(x) :], names, {}, (0, 0))


def frd_v1(x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> RadiomicDistance:
    """Distance of Konz, Osuala et al. 2026 as frd-score 1.0.1 computes it: ``ln d²``, z-scores by the real scans.

    Not symmetric. The paper's equation 3 is half of it.

    Args:
        x: ``(N, D)`` features of the real scans.
        y: ``(M, D)`` features of the synthetic scans.
        names: Names of the columns.

    Returns:
        ``ln d²``; -inf for identical sets, as there. Its warnings name the columns that hold only rounding noise.

    Raises:
        ValueError: If fewer than two scans of a set have all features.
    """
    rows = tuple(int(np.isnan(part).any(axis=1).sum()) for part in (x, y))
    # Single precision and the order of these steps decide which columns are exactly constant.
    x32, y32 = (part[~np.isnan(part).any(axis=1)].astype(np.float32) for part in (x, y))
    require_two(x32, y32)
    mean, deviation = np.nanmean(x32, axis=0), np.nanstd(x32, axis=0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zx, zy = (x32 - mean) / deviation, (y32 - mean) / deviation
    used = np.isfinite(zx).all(axis=0) & np.isfinite(zy).all(axis=0)
    if not used.any():
        raise ValueError("frd-v1: expected a feature that varies over the real scans, got none. Add different scans.")
    dropped = {name: "constant over the real scans" for name, keep in zip(names, used, strict=True) if not keep}
    zx, zy, kept = zx[:, used], zy[:, used], [name for name, keep in zip(names, used, strict=True) if keep]
    squared = _squared(zx, zy)
    noise = np.flatnonzero(
        (np.abs(x32[:, used]).max(axis=0) < _ROUNDING) & (np.abs(y32[:, used]).max(axis=0) < _ROUNDING)
    )
    hangs = [kept[index] for index in noise]
    notes = [f"rests on rounding noise in {', '.join(hangs)}, where frd-score's own value does too"] if hangs else []
    for name, count, part in zip(("real", "synthetic"), rows, (x, y), strict=True):
        if count:
            notes.append(f"{count} of {len(part)} {name} scans are left out, because a feature is not defined for them")
    value = math.log(squared) if squared > 0 else -math.inf
    return _plain("frd-v1", value, squared, zx, zy, kept, dropped, (rows[0], rows[1]), notes)


def require_two(x: np.ndarray, y: np.ndarray) -> None:
    """Refuse sets of fewer than two scans.

    Args:
        x: ``(N, D)`` features of one set.
        y: ``(M, D)`` features of the other.

    Raises:
        ValueError: If a set has fewer than two scans.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(
            f"FRD: expected at least 2 real and 2 synthetic scans with all features, got {len(x)} and {len(y)}. "
            "Add scans."
        )


def _squared(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Fréchet distance of Gaussians fitted to two sets; the mean term in the sets' own precision."""
    difference = x.mean(axis=0) - y.mean(axis=0)
    centered = [(part - part.mean(axis=0, dtype=np.float64)) / math.sqrt(len(part) - 1) for part in (x, y)]
    cross = np.linalg.svd(centered[0] @ centered[1].T, compute_uv=False).sum()
    return float(difference @ difference) + float(sum((part**2).sum() for part in centered) - 2 * cross)


def _plain(
    protocol: str,
    value: float,
    squared: float,
    zx: np.ndarray,
    zy: np.ndarray,
    names: Sequence[str],
    dropped: dict[str, str],
    rows: tuple[int, int],
    notes: Sequence[str] = (),
) -> RadiomicDistance:
    x, y = zx.astype(np.float64), zy.astype(np.float64)
    shares, found = rank_shares((x.mean(0) - y.mean(0)) ** 2 + (x.std(0) - y.std(0)) ** 2, names)
    return RadiomicDistance(
        protocol, value, squared, len(zx), len(zy), len(names), dropped, rows, shares=shares, warnings=(*notes, *found)
    )


def rank_shares(terms: np.ndarray, names: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """The ten largest shares of the one-dimensional distances, and a warning for one above half.

    Args:
        terms: ``(D,)`` distance of each feature.
        names: Names of the features.

    Returns:
        Share by name, largest first, and the warnings.
    """
    total = terms.sum()
    if total == 0:
        return {}, []
    order = np.argsort(-terms, kind="stable")[:10].tolist()
    shares = {names[index]: float(terms[index] / total) for index in order}
    first = names[order[0]]
    notes = [f"{first} alone makes up {shares[first]:.0%} of the distance"] if shares[first] > _SHARE else []
    return shares, notes
