"""Distances with what makes them readable: interval, real-versus-real floor, p-value, value at infinite n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from medgen.metrics.distances import NAMES, Distance, Pool, build_distance
from medgen.metrics.inference import Inference
from medgen.metrics.resampling import Groups, group_rows
from medgen.metrics.score import Score

_FEW = 20  # scans or patients below which even the interval says little

Features = torch.Tensor | np.ndarray
GroupIds = Sequence[object] | np.ndarray


def score_features(
    real: Features,
    synthetic: Features,
    *,
    distances: Sequence[str | Distance] = NAMES,
    real_groups: GroupIds | None = None,
    synthetic_groups: GroupIds | None = None,
    real_reference: Features | None = None,
    reference_groups: GroupIds | None = None,
    confidence: float = 0.95,
    resamples: int = 200,
    permutations: int = 200,
    floor_draws: int = 100,
    max_permutation_scans: int = 256,
    nearest_k: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Score]:
    """Distances between two feature sets, each with interval, floor, p-value and extrapolation.

    **Interval.** Half of the patients of either set are drawn without replacement, `resamples` times. The spread of the
    value over half-samples estimates its standard error at full size (the delete-half jackknife of Shao and Wu), and
    the interval is the value plus and minus Student's t times that. A bootstrap would repeat scans, which inflates the
    Fréchet bias and shrinks the balls of PRDC to nothing. What is covered is the value's expectation at this n; for
    ``kernel`` of independent scans, which has no bias, that is the truth. Measured coverage of 95 % intervals on
    Gaussians of known truth (ten settings: n from 20 to 200, d from 8 to 1280, shifted and scaled or equal, single
    scans or patients of five; 200 pairs of sets each): ``frechet`` 0.91 to 1.00, ``kernel`` 0.90 to 1.00,
    ``gaussian_kernel`` 0.89 to 1.00, ``precision``, ``recall`` and ``coverage`` 0.94 to 1.00, ``density`` 0.90 to 1.00,
    ``vendi`` 0.89 to 0.97. Near equal distributions the intervals are up to twice as wide as they need be. Shares
    (precision, recall, coverage), on which all half-samples may agree, get at least the width of a binomial one.

    **Floor.** With `real_reference` (say the training part, where `real` is the validation part), real against
    reference, with as many reference as synthetic scans if there are enough. Otherwise random halves of `real`, so at
    half of n. `value_at_floor_n` is the synthetic value at the very same sizes.

    **p-value.** Labels are permuted over the pooled patients. With P relabelings the smallest p-value is 1 / (P + 1),
    and twice that for ``density`` and ``vendi``, which a difference may put on either side. With patients in one set
    only, whose scans are correlated, the two sets are not exchangeable even for a perfect generator, and the p-value is
    too small.

    **Extrapolation.** Fréchet: a line in 1/n through values at six sizes from n to n/4 (Chong and Forsyth's FID∞);
    where the spectrum of the features is flat and n below d, the bias is no such line, which
    `floor_extrapolated`, whose truth is 0, then shows. Gaussian kernel: its estimator without the pairs of a scan with
    itself, which is unbiased, as ``kernel`` is, if the scans are independent; several scans of a patient are not.

    Memory grows with the square of the scans: some ``50 (N + M + K)^2`` bytes per view.

    Args:
        real: ``(N, D)`` or ``(N, V, D)`` features of real scans.
        synthetic: ``(M, D)`` or ``(M, V, D)`` features of synthetic scans.
        distances: Names (see :func:`medgen.metrics.distances.build_distance`) or own distances.
        real_groups: Identifier of each real scan's patient; None where each scan stands alone.
        synthetic_groups: Likewise for synthetic scans, such as the patient whose label map was used.
        real_reference: ``(K, D)`` or ``(K, V, D)`` features of other real scans, which the floor is taken to.
        reference_groups: Identifier of each of their patients.
        confidence: Level of the intervals, such as 0.95.
        resamples: Half-samples; 0 gives no interval.
        permutations: Relabelings of the test; 0 gives no p-value.
        floor_draws: Random halves, or subsets of the reference; 0 gives no floor.
        max_permutation_scans: The tests of ``frechet`` and ``vendi``, whose time grows with the cube of the scans, use
            a random subset of this many scans of a larger set.
        nearest_k: k of ``"prdc"``.
        seed: Of all draws; equal seeds give equal scores.
        progress: Whether to show a progress bar.

    Returns:
        One score per value, by its name.

    Raises:
        ValueError: If the sets differ in views or features, are too small, not finite, or an argument is out of range.

    References:
        Shao and Wu 1989, A general theory for jackknife variance estimation, Annals of Statistics 17; Chong and
        Forsyth 2020, arXiv:1911.07023, section 3.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a level between 0 and 1, got {confidence}.")
    for argument, count in (("resamples", resamples), ("permutations", permutations), ("floor_draws", floor_draws)):
        if count < 0 or count == 1:
            raise ValueError(f"{argument}: expected 0 or at least 2, got {count}.")
    if max_permutation_scans < 2:
        raise ValueError(f"max_permutation_scans: expected at least 2, got {max_permutation_scans}.")
    families = [build_distance(item, nearest_k=nearest_k) if isinstance(item, str) else item for item in distances]
    sets = {"real": real, "synthetic": synthetic}
    ids = {"real": real_groups, "synthetic": synthetic_groups}
    if real_reference is not None:
        sets["real_reference"], ids["real_reference"] = real_reference, reference_groups
    minimum = max([2, *(family.minimum for family in families)])
    checked = _check(sets, minimum)
    groups: dict[str, Groups] = {}
    offset = 0
    for name, features in checked.items():
        groups[name] = group_rows(ids[name], len(features), offset=offset, name=name.split("_")[-1] + "_groups")
        offset += len(features)
    pooled = torch.cat(list(checked.values()))
    inference = Inference(
        pools=[Pool(view) for view in pooled.unbind(dim=1)],
        families=families,
        groups=groups,
        confidence=confidence,
        seed=seed,
        bar=tqdm(desc="resamples", unit="draw", disable=not progress),
    )
    scores = inference.values()
    _add_warnings(scores, real_groups, reference_groups)
    inference.add_intervals(scores, resamples)
    inference.add_floors(scores, floor_draws)
    inference.add_p_values(scores, permutations, max_permutation_scans)
    inference.add_extrapolations(scores)
    inference.bar.close()
    return scores


def _check(sets: dict[str, Features], minimum: int) -> dict[str, torch.Tensor]:
    """All sets as ``(N, V, D)`` float64 on the CPU."""
    checked: dict[str, torch.Tensor] = {}
    for name, features in sets.items():
        tensor = torch.as_tensor(features).detach().cpu().double()
        tensor = tensor[:, None] if tensor.ndim == 2 else tensor
        if tensor.ndim != 3 or len(tensor) < minimum:
            raise ValueError(
                f"{name}: expected features (N, D) or (N, V, D) of at least {minimum} scans, got shape "
                f"{tuple(torch.as_tensor(features).shape)}. Add scans, or ask for other distances or a lower nearest_k."
            )
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).flatten(1).any(dim=1).sum())
            raise ValueError(
                f"{name}: expected finite features, got NaN or infinity in {bad} of {len(tensor)} scans. "
                "Leave these out."
            )
        checked[name] = tensor
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in checked.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"features: expected one number of views and features in all sets, got {shapes}. "
            "Extract all sets with the same extractor."
        )
    return checked


def _add_warnings(scores: dict[str, Score], real_groups: GroupIds | None, reference_groups: GroupIds | None) -> None:
    """What a reader should know whatever the draws show."""
    for name, score in scores.items():
        n, found = min(score.n_real, score.n_synthetic), []
        if name == "frechet" and n < score.d:
            found.append(
                f"n = {n} scans is less than d = {score.d} features: the Fréchet distance is mostly bias. "
                "Read it beside its floor, and never beside values of another n."
            )
        if n < _FEW:
            found.append(f"Only {n} scans a side: expect differences by chance.")
        else:
            patients = {"real": score.groups_real, "synthetic": score.groups_synthetic}
            few = [f"{count} {side}" for side, count in patients.items() if count < _FEW]
            if few:
                found.append(f"Only {' and '.join(few)} patients, who are what counts.")
        if real_groups is not None and reference_groups is not None:
            shared = len(set(real_groups) & set(reference_groups))
            if shared:
                found.append(f"{shared} patients are in both real and real_reference: the floor is too low.")
        scores[name] = replace(score, warnings=tuple(found))
