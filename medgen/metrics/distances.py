"""Every distance between two feature sets as arithmetic on the inner products of the pooled scans.

One Gram matrix of all scans holds what each distance between any two subsets of them needs: its resamples then cost
index arithmetic, whatever the length of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import torch

from medgen.metrics.features import cosines
from medgen.metrics.frechet import frechet_distance_from_features, frechet_distance_from_products
from medgen.metrics.gaussian_kernel import SCALE, gaussian_kernel
from medgen.metrics.kernel import polynomial_kernel
from medgen.metrics.prdc import NAMES as PRDC_NAMES
from medgen.metrics.prdc import prdc_from_radii, squared_distances
from medgen.metrics.vendi import vendi_from_cosines

# A random quarter of 96 neighbors very rarely holds fewer than five.
_NEIGHBORS = 96
Tail = Literal["upper", "lower", "both"]


class Pool:
    """Features of all scans, and the matrices of all pairs, each made when it is first asked for.

    Args:
        features: ``(P, D)``, finite.
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features.detach().cpu().double()

    @cached_property
    def gram(self) -> torch.Tensor:
        """``(P, P)`` inner products."""
        return self.features @ self.features.T

    @cached_property
    def centered_gram(self) -> torch.Tensor:
        """``(P, P)`` inner products about the common mean, which lose fewer digits in differences."""
        centered = self.features - self.features.mean(dim=0)
        return centered @ centered.T

    @cached_property
    def squared_distances(self) -> torch.Tensor:
        """``(P, P)`` squared Euclidean distances."""
        return squared_distances(self.centered_gram)

    @cached_property
    def neighbors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared distances ``(P, L)`` to the nearest scans, ascending, and their rows; each scan itself is first."""
        distances = self.squared_distances.clone().fill_diagonal_(-1)
        nearest = distances.topk(min(_NEIGHBORS, len(distances)), largest=False)
        return nearest.values.clamp(min=0), nearest.indices

    @cached_property
    def cosines(self) -> torch.Tensor:
        """``(P, P)`` inner products of the features at unit norm."""
        return cosines(self.gram)

    @cached_property
    def polynomial(self) -> torch.Tensor:
        """``(P, P)`` kernel of :func:`medgen.metrics.kernel.kernel_distance`."""
        return polynomial_kernel(self.gram, self.features.shape[1])

    @cached_property
    def gaussian(self) -> torch.Tensor:
        """``(P, P)`` kernel of :func:`medgen.metrics.gaussian_kernel.gaussian_kernel_distance`."""
        return gaussian_kernel(self.cosines)


Pair = tuple[torch.Tensor, torch.Tensor]  # rows of real and of synthetic scans in the pool
Evaluate = Callable[[Pool, Sequence[Pair]], torch.Tensor]


@dataclass(frozen=True)
class Distance:
    """A family of values that compare the scans of two lists of rows.

    Attributes:
        names: Names of its values.
        evaluate: Maps the pool and a list of pairs of rows, ``(N,)`` real and ``(M,)`` synthetic ones, to
            ``(number of pairs, len(names))``.
        tails: For each value, on which side of the values for equal distributions a difference puts it.
        bounds: For each value, its range.
        minimum: Fewest scans of a set.
        cubic: Whether the time of one pair grows with the cube of the scans, so that a test of many takes a subset.
        at_infinity: How the value at infinite n is found: ``linear`` in 1/n, ``unbiased`` where it does not depend on
            n, ``formula`` where another estimator is free of n, ``unknown``.
        exact: What gives the reported value, where `evaluate` trades digits for speed.
        unbiased: That other estimator.
    """

    names: tuple[str, ...]
    evaluate: Evaluate
    tails: tuple[Tail, ...]
    bounds: tuple[tuple[float, float], ...]
    minimum: int = 2
    cubic: bool = False
    at_infinity: Literal["linear", "unbiased", "formula", "unknown"] = "unknown"
    exact: Evaluate | None = None
    unbiased: Evaluate | None = None


def from_function(
    name: str,
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | float],
    *,
    tail: Tail = "upper",
    bounds: tuple[float, float] = (-float("inf"), float("inf")),
    linear_in_1_over_n: bool = False,
    cubic: bool = False,
) -> Distance:
    """A distance of the user's own, so that it gets an interval, a floor and a p-value as well.

    Args:
        name: Its name.
        function: Maps real ``(N, D)`` and synthetic ``(M, D)`` features to a number; it is called hundreds of times.
        tail: On which side of the values for equal distributions a difference puts it.
        bounds: Range of its values.
        linear_in_1_over_n: Whether its bias falls as 1/n, so that it can be extrapolated.
        cubic: Whether it is slow for many scans, so that its permutation test is to take a subset.

    Returns:
        The distance, for :func:`medgen.metrics.statistics.score_features`.
    """

    def evaluate(pool: Pool, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(function(pool.features[x], pool.features[y]), dtype=torch.float64).reshape(1)

    at_infinity: Literal["linear", "unknown"] = "linear" if linear_in_1_over_n else "unknown"
    return Distance((name,), partial(_each, evaluate), (tail,), (bounds,), at_infinity=at_infinity, cubic=cubic)


def build_distance(name: str, *, nearest_k: int = 5) -> Distance:
    """Distance by name, with the default settings of its pure function.

    Args:
        name: ``"frechet"``, ``"kernel"``, ``"gaussian_kernel"``, ``"prdc"`` (four values) or ``"vendi"`` (the diversity
            of the second set alone).
        nearest_k: k of ``"prdc"``.

    Returns:
        The distance.

    Raises:
        ValueError: If the name is not known, or k is less than 1.
    """
    infinity = float("inf")
    positive = ((0.0, infinity),)
    if name == "frechet":
        return Distance(
            ("frechet",),
            _frechet,
            ("upper",),
            positive,
            cubic=True,
            at_infinity="linear",
            exact=_frechet_exact,
        )
    if name == "kernel":
        return Distance(("kernel",), _kernel, ("upper",), ((-infinity, infinity),), at_infinity="unbiased")
    if name == "gaussian_kernel":
        unbiased = partial(_gaussian, unbiased=True)
        return Distance(("gaussian_kernel",), _gaussian, ("upper",), positive, at_infinity="formula", unbiased=unbiased)
    if name == "prdc":
        if nearest_k < 1:
            raise ValueError(f"nearest_k: expected at least 1, got {nearest_k}.")
        return Distance(
            PRDC_NAMES,
            partial(_each, partial(_prdc, nearest_k=nearest_k)),
            ("lower", "lower", "both", "lower"),
            ((0.0, 1.0), (0.0, 1.0), (0.0, infinity), (0.0, 1.0)),
            minimum=nearest_k + 1,
        )
    if name == "vendi":
        return Distance(("vendi",), partial(_each, _vendi), ("both",), ((1.0, infinity),), cubic=True)
    raise ValueError(f"distance: expected one of {', '.join(NAMES)}, got {name!r}.")


NAMES = ("frechet", "kernel", "gaussian_kernel", "prdc", "vendi")


def _block(matrix: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return matrix.index_select(0, x).index_select(1, y)


def _each(
    evaluate: Callable[[Pool, torch.Tensor, torch.Tensor], torch.Tensor], pool: Pool, pairs: Sequence[Pair]
) -> torch.Tensor:
    """Values of pairs one by one."""
    return torch.stack([evaluate(pool, x, y) for x, y in pairs])


def _frechet(pool: Pool, pairs: Sequence[Pair]) -> torch.Tensor:
    if pool.features.shape[1] < min(len(rows) for pair in pairs for rows in pair):
        return _frechet_exact(pool, pairs)  # the covariances are then smaller than the Gram matrix
    sums, gram = _block_sums(pool.centered_gram, pairs), pool.centered_gram
    means = (sums.xx / sums.n**2, sums.yy / sums.m**2)
    values = [
        frechet_distance_from_products(_block(gram, x, y), *scalars)
        for (x, y), *scalars in zip(pairs, *means, sums.trace_x, sums.trace_y, strict=True)
    ]
    return torch.stack(values)[:, None]


def _frechet_exact(pool: Pool, pairs: Sequence[Pair]) -> torch.Tensor:
    values = [frechet_distance_from_features(pool.features[x], pool.features[y]) for x, y in pairs]
    return torch.stack(values)[:, None]


class _Sums(NamedTuple):
    """Of the blocks of a symmetric matrix that pairs of row lists pick, each ``(number of pairs,)``."""

    n: torch.Tensor
    m: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor
    trace_x: torch.Tensor
    trace_y: torch.Tensor


def _block_sums(matrix: torch.Tensor, pairs: Sequence[Pair]) -> _Sums:
    """Sums and traces of the blocks of all pairs in one product."""
    first, second = torch.zeros(2, len(pairs), len(matrix), dtype=matrix.dtype)
    for index, (x, y) in enumerate(pairs):
        first[index, x], second[index, y] = 1, 1
    by_first, by_second = first @ matrix, second @ matrix
    return _Sums(
        n=first.sum(dim=1),
        m=second.sum(dim=1),
        xx=(by_first * first).sum(dim=1),
        xy=(by_first * second).sum(dim=1),
        yy=(by_second * second).sum(dim=1),
        trace_x=first @ matrix.diagonal(),
        trace_y=second @ matrix.diagonal(),
    )


def _squared_mmds(kernel: torch.Tensor, pairs: Sequence[Pair], *, unbiased: bool) -> torch.Tensor:
    """:func:`medgen.metrics.kernel.squared_mmd` of all pairs, which needs the sums of blocks only."""
    n, m, xx, xy, yy, trace_x, trace_y = _block_sums(kernel, pairs)
    if unbiased:
        within = (xx - trace_x) / (n * (n - 1)) + (yy - trace_y) / (m * (m - 1))
        return (within - 2 * xy / (n * m))[:, None]
    return (xx / n**2 + yy / m**2 - 2 * xy / (n * m)).clamp(min=0)[:, None]


def _kernel(pool: Pool, pairs: Sequence[Pair]) -> torch.Tensor:
    return _squared_mmds(pool.polynomial, pairs, unbiased=True)


def _gaussian(pool: Pool, pairs: Sequence[Pair], *, unbiased: bool = False) -> torch.Tensor:
    return SCALE * _squared_mmds(pool.gaussian, pairs, unbiased=unbiased)


def _prdc(pool: Pool, x: torch.Tensor, y: torch.Tensor, *, nearest_k: int) -> torch.Tensor:
    radii = [_squared_radii(pool, rows, nearest_k) for rows in (x, y)]
    return prdc_from_radii(radii[0], _block(pool.squared_distances, x, y), radii[1], nearest_k=nearest_k)


def _squared_radii(pool: Pool, rows: torch.Tensor, nearest_k: int) -> torch.Tensor:
    """``(len(rows),)`` squared distances to the k-th nearest neighbor among `rows`.

    Neighbors in the pool are sorted once. A subset mostly finds its k nearest among the first of them; where it does
    not, its own distances are searched.
    """
    distances, order = pool.neighbors
    member = torch.zeros(len(order), dtype=torch.bool)
    member[rows] = True
    found = member[order[rows]].cumsum(dim=1) > nearest_k  # from the k-th neighbor on; the scan itself is the first
    radii = distances[rows, found.int().argmax(dim=1)]
    missing = ~found[:, -1]
    if bool(missing.any()):
        radii[missing] = _block(pool.squared_distances, rows[missing], rows).kthvalue(nearest_k + 1, dim=1).values
    return radii


def _vendi(pool: Pool, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return vendi_from_cosines(_block(pool.cosines, y, y)).reshape(1)
