"""A Fréchet radiomic distance that is symmetric, free of the bias of small sets, and comes with a test."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from scipy import linalg

from medgen.metrics.radiomic_distance import RadiomicDistance, rank_shares, require_two
from medgen.seeding import stream
from medgen.threads import side_by_side

# A column varies by at least this share of its typical size, or its variation is taken for noise.
_FLOOR = 1e-3
# Typical sizes are not taken to be smaller than this: intensities in percent of the scan's standard deviation.
_SMALLEST_INTENSITY = 1.0
_SMALLEST_SKEWNESS = 0.01
_SMALLEST = 1e-9
_INTENSITIES = (
    "10Percentile",
    "90Percentile",
    "InterquartileRange",
    "Maximum",
    "Mean",
    "MeanAbsoluteDeviation",
    "Median",
    "Minimum",
    "Range",
    "RobustMeanAbsoluteDeviation",
    "RootMeanSquared",
)
# Parts of a set that are left out in turn for the interval; fewer of larger sets, where each costs more.
_PARTS, _PARTS_OF_LARGE, _LARGE = 20, 10, 400
_FEWEST_PARTS = 8  # with fewer, the jackknife says nothing
_TESTED = 60  # scans of a set that the permutation test takes at most; it is repeated often
# Random splits for the bias, for up to so many scans of both sets together: it varies less in larger, costlier sets.
_BIAS_SPLITS = ((120, 199), (400, 49), (math.inf, 19))


def frd_robust(
    x: np.ndarray,
    y: np.ndarray,
    names: Sequence[str],
    *,
    groups: tuple[Sequence[object], Sequence[object]] | None = None,
    permutations: int = 199,
    seed: int = 0,
) -> RadiomicDistance:
    """Squared Fréchet distance per feature, symmetric and free of the bias of small sets.

    Features are compressed by ``asinh(x / typical size)``, divided by their standard deviation within the sets (with a
    floor), and their covariances shrunk towards multiples of the identity (Ledoit & Wolf 2004). From the distance is
    taken off what two sets of one distribution would have at these sizes: its mean over random splits of the scans
    around their sets' means. So ``squared - bias`` is 0 on average for equal distributions at any number of scans;
    the value is that, not below 0. 1 means that the average feature is off by about one standard deviation.

    The p-value is that of a permutation test on at most 60 scans a set; the 95 % interval is a jackknife over up to 20
    parts. With `groups`, the scans of a patient stay together in all three (but for one patient where the sides meet),
    as they are no independent evidence; where only one set has patients, the p-value is too small all the same.

    Args:
        x: ``(N, D)`` features of one set.
        y: ``(M, D)`` features of the other.
        names: Names of the columns.
        groups: Patient of each scan of both sets, where known.
        permutations: Random splits for the test.
        seed: Of the splits.

    Returns:
        The distance; exactly 0 for identical sets.

    Raises:
        ValueError: If fewer than two scans of a set have all features.
    """
    known = np.isfinite(x).any(axis=0) & np.isfinite(y).any(axis=0)
    dropped = {name: "not defined for any scan of a set" for name, keep in zip(names, known, strict=True) if not keep}
    kept = [name for name, keep in zip(names, known, strict=True) if keep]
    whole = [np.isfinite(part[:, known]).all(axis=1) for part in (x, y)]
    rows = (int((~whole[0]).sum()), int((~whole[1]).sum()))
    a, b = (part[keep][:, known].astype(np.float64) for part, keep in zip((x, y), whole, strict=True))
    require_two(a, b)
    sizes = (len(a), len(b))
    patients = [_patients(groups, index, keep) for index, keep in enumerate(whole)]
    # One order of sets and scans, so that the value does not depend on which set came first.
    orders = [np.lexsort(part.T[::-1]) for part in (a, b)]
    a, b = a[orders[0]], b[orders[1]]
    patients = [part[order] for part, order in zip(patients, orders, strict=True)]
    if (len(b), b.tobytes()) < (len(a), a.tobytes()):
        a, b, patients = b, a, patients[::-1]
    unit = _typical_sizes(np.concatenate([a, b]), kept)
    a, b = np.arcsinh(a / unit), np.arcsinh(b / unit)
    scale = _scale(a, b)
    za, zb = a / scale, b / scale
    features = len(kept)
    bias, p_value = 0.0, 1.0
    interval: tuple[float, float] | None = (0.0, 0.0)
    with side_by_side() as pool:
        ca, cb = _coordinates(za, zb)
        squared = _shrunk(ca, cb, features)
        if squared > 0:
            bias = _bias(ca, cb, features, patients, seed, pool)
            p_value = _p_value(a, b, patients, permutations, seed, pool)
            spread = 1.96 * _jackknife_error(ca, cb, features, patients, seed, pool)
            found = (max(0.0, squared - bias - spread), max(0.0, squared - bias + spread))
            interval = found if spread < math.inf else None
    terms = (za.mean(0) - zb.mean(0)) ** 2 + (za.std(0) - zb.std(0)) ** 2
    shares, notes = rank_shares(terms, kept)
    for name, count, part in zip(("real", "synthetic"), rows, (x, y), strict=True):
        if count:
            missing = np.isnan(part[:, known]).sum(axis=0)
            notes.append(
                f"{count} of {len(part)} {name} scans are left out, because a feature is not defined for them, such as "
                f"{kept[int(missing.argmax())]}"
            )
    if dropped:
        first = next(iter(dropped))
        notes.append(f"{len(dropped)} features are left out, because no scan of a set has them, such as {first}")
    if interval is None:
        notes.append(f"no interval: fewer than {_FEWEST_PARTS} scans or patients in a set")
    return RadiomicDistance(
        protocol="frd-robust",
        value=max(0.0, squared - bias),
        squared=squared,
        n_real=sizes[0],
        n_synthetic=sizes[1],
        columns=len(kept),
        dropped_columns=dropped,
        dropped_rows=rows,
        interval=interval,
        p_value=p_value,
        bias=bias,
        shares=shares,
        warnings=tuple(notes),
    )


def _typical_sizes(both: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Median size of each feature over both sets, ``(D,)``, not below what its kind can mean."""
    least = np.full(len(names), _SMALLEST)
    for index, name in enumerate(names):
        _, group, feature = name.rsplit("_", 2) if name.count("_") > 1 else ("", *name.split("_"))
        if group == "firstorder" and feature in _INTENSITIES:
            least[index] = _SMALLEST_INTENSITY
        elif feature == "Skewness":
            least[index] = _SMALLEST_SKEWNESS
    return np.maximum(np.median(np.abs(both), axis=0), least)


def _scale(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Standard deviation of each feature within the sets, ``(D,)``, with the floor."""
    return np.sqrt((a.var(axis=0, ddof=1) + b.var(axis=0, ddof=1)) / 2 + _FLOOR**2)


def _coordinates(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in an orthonormal basis of all scans, which is smaller than the features where those are more."""
    if len(a) + len(b) >= a.shape[1]:
        return a, b
    basis = np.linalg.qr(np.concatenate([a, b]).T, mode="reduced")[0]
    return a @ basis, b @ basis


def _shrunk(a: np.ndarray, b: np.ndarray, features: int) -> float:
    """Squared Fréchet distance per feature with shrunk covariances, from the scans' coordinates ``(N, R)``.

    Outside the span of all scans both covariances are multiples of the identity, so the work is done inside it.
    """
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    a, b = a - mean_a, b - mean_b
    rank = a.shape[1]
    intensities = [_ledoit_wolf(part, features) for part in (a, b)]
    strength = (intensities[0] + intensities[1]) / 2
    levels = [strength * (part**2).sum() / (len(part) - 1) / features for part in (a, b)]
    gap = mean_a - mean_b
    roots = []
    total = 0.0
    for part, level in zip((a, b), levels, strict=True):
        covariance = (1 - strength) / (len(part) - 1) * (part.T @ part)
        covariance[np.diag_indices(rank)] += level
        total += float(np.trace(covariance))
        roots.append(_root(covariance))
    # Of any roots A A^T and B B^T, the singular values of A^T B are those of the product of the symmetric roots.
    overlap = linalg.svdvals(roots[0].T @ roots[1], check_finite=False).sum()
    outside = (features - rank) * (math.sqrt(levels[0]) - math.sqrt(levels[1])) ** 2
    squared = float(gap @ gap) + total - 2 * float(overlap) + outside
    # Below this, the difference of the traces is rounding.
    return 0.0 if squared <= 1e-11 * (total + features * sum(levels)) else squared / features


def _root(covariance: np.ndarray) -> np.ndarray:
    """A with ``A A^T`` the covariance: by Cholesky, ten times as fast as by eigenvalues, where it has full rank."""
    try:
        return linalg.cholesky(covariance, lower=True, check_finite=False)
    except linalg.LinAlgError:
        values, vectors = linalg.eigh(covariance, check_finite=False)
        return vectors * np.sqrt(values.clip(0))


def _ledoit_wolf(centered: np.ndarray, features: int) -> float:
    """Intensity of the shrinkage, 0 to 1: Ledoit & Wolf 2004, section 3.2, from inner products of the scans."""
    count = len(centered)
    gram = centered @ centered.T
    level = np.trace(gram) / count / features
    square = (gram**2).sum() / count**2 / features
    spread = square - level**2
    noise = ((np.diag(gram) ** 2).sum() / features - count * square) / count**2
    return float(np.clip(noise / spread, 0, 1)) if spread > 0 else 1.0


def _patients(groups: tuple[Sequence[object], Sequence[object]] | None, index: int, keep: np.ndarray) -> np.ndarray:
    """Name of the patient of each kept scan; without groups, every scan is a patient."""
    if groups is None:
        return np.asarray([f"{index} {row}" for row in np.flatnonzero(keep)])
    names = np.asarray([str(name) for name in groups[index]])
    if len(names) != len(keep):
        raise ValueError(f"groups: expected one name for each of {len(keep)} scans, got {len(names)}.")
    return names[keep]


def _splits(patients: np.ndarray, count: int, seed: int, name: str) -> Iterator[np.ndarray]:
    """Random orders of the scans in which those of a patient stay together."""
    source = stream(seed, "frd", name)
    # By first appearance, not by name: the order of the scans is fixed, and names may differ from run to run.
    _, first, codes = np.unique(patients, return_index=True, return_inverse=True)
    codes = np.argsort(np.argsort(first))[codes]
    for _ in range(count):
        place = torch.randperm(len(first), generator=source).numpy()
        yield np.argsort(place[codes], kind="stable")


def _bias(a: np.ndarray, b: np.ndarray, features: int, patients: list[np.ndarray], seed: int, pool: Executor) -> float:
    """Mean distance of random splits of the residuals: what the sizes of the sets alone make."""
    counts = [max(2, len(np.unique(names))) for names in patients]
    # Residuals around a mean of few patients are too small by what that mean took along.
    residuals = np.concatenate(
        [(part - part.mean(0)) * math.sqrt(count / (count - 1)) for part, count in zip((a, b), counts, strict=True)]
    )
    repeats = next(splits for largest, splits in _BIAS_SPLITS if len(residuals) <= largest)
    orders = _splits(np.concatenate(patients), repeats, seed, "bias")
    return float(np.mean(list(pool.map(lambda order: _split_distance(residuals, order, len(a), features), orders))))


def _split_distance(scans: np.ndarray, order: np.ndarray, size: int, features: int) -> float:
    """Distance of the first `size` scans of an order to the others."""
    return _shrunk(scans[order[:size]], scans[order[size:]], features)


def _p_value(
    a: np.ndarray, b: np.ndarray, patients: list[np.ndarray], permutations: int, seed: int, pool: Executor
) -> float:
    """Share of random splits of all scans that are at least as far apart, counting the observed one."""
    chosen = [
        np.sort(next(_splits(names, 1, seed, f"test {side}"))[:_TESTED])
        for side, names in zip(("first", "second"), patients, strict=True)
    ]
    a, b = a[chosen[0]], b[chosen[1]]
    both = np.concatenate([a, b])
    # The same for every split, so that it is taken off once.
    scale = np.sqrt(both.var(axis=0, ddof=1) + _FLOOR**2)
    features = both.shape[1]
    both = np.concatenate(_coordinates(a / scale, b / scale))
    observed = _split_distance(both, np.arange(len(both)), len(a), features)
    names = np.concatenate([names[rows] for names, rows in zip(patients, chosen, strict=True)])
    orders = _splits(names, permutations, seed, "test")
    # A split that only swaps the sides has the observed value, up to rounding.
    least = observed * (1 - 1e-9)
    found = pool.map(lambda order: _split_distance(both, order, len(a), features), orders)
    return (1 + sum(value >= least for value in found)) / (permutations + 1)


def _jackknife_error(
    a: np.ndarray, b: np.ndarray, features: int, patients: list[np.ndarray], seed: int, pool: Executor
) -> float:
    """Standard error by leaving out one of up to 20 parts of each set at a time."""
    variance = 0.0
    most = _PARTS if len(a) + len(b) <= _LARGE else _PARTS_OF_LARGE
    for index, side in enumerate(("first", "second")):
        count = min(most, len(np.unique(patients[index])))
        if count < _FEWEST_PARTS:
            return math.inf
        order = next(_splits(patients[index], 1, seed, f"parts {side}"))
        # Whole patients to a part: the part of a patient's first scan in the order.
        _, first, codes = np.unique(patients[index][order], return_index=True, return_inverse=True)
        parts = np.empty(len(order), dtype=np.int64)
        parts[order] = (np.argsort(np.argsort(first)) % count)[codes]

        def without(part: int, index: int = index, parts: np.ndarray = parts) -> float:
            left, right = (rows[parts != part] if side == index else rows for side, rows in enumerate((a, b)))
            return _shrunk(left, right, features)

        values = list(pool.map(without, range(count)))
        variance += (count - 1) / count * float(((np.asarray(values) - np.mean(values)) ** 2).sum())
    return math.sqrt(variance)
