from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from scipy.stats import entropy, gmean

from medgen.test_time.aggregate import Consensus
from medgen.types import BadInputError


def predictions(count: int = 7, seed: int = 0, shape: tuple[int, ...] = (12, 10)) -> torch.Tensor:
    """``(count, 3, *shape)`` probabilities that agree in part."""
    draw = torch.Generator().manual_seed(seed)
    common = 3 * torch.randn(1, 3, *shape, generator=draw)
    return (common + torch.randn(count, 3, *shape, generator=draw)).softmax(dim=1)


@pytest.mark.parametrize("shape", [(12, 10), (6, 5, 4)])
def test_maps_are_those_of_all_predictions_held_together(shape: tuple[int, ...]) -> None:
    p = predictions(shape=shape)
    consensus = Consensus()
    assert all(consensus.add(row) for row in p)
    found = consensus.result()
    mean = p.double().mean(dim=0)
    torch.testing.assert_close(found.probability.double(), mean, atol=1e-6, rtol=0)
    assert torch.equal(found.label, mean.argmax(dim=0))
    torch.testing.assert_close(found.variance.double(), p.double().var(dim=0, correction=0), atol=1e-6, rtol=0)
    total, each = entropy(mean.numpy(), axis=0), entropy(p.double().numpy(), axis=1).mean(axis=0)
    np.testing.assert_allclose(found.entropy, total, atol=1e-5)
    np.testing.assert_allclose(found.mutual_information, total - each, atol=1e-5)
    votes = torch.nn.functional.one_hot(p.argmax(dim=1), 3).sum(dim=0)
    assert torch.equal(votes.gather(-1, found.vote[..., None])[..., 0], votes.max(dim=-1).values)
    volumes = np.array([[float((row.argmax(0) == k).sum()) for k in (1, 2)] for row in p])
    np.testing.assert_allclose(found.volume_cv, volumes.std(axis=0, ddof=1) / volumes.mean(axis=0))
    assert (found.views, found.dropped) == (7, 0)


def test_pairwise_dice_is_that_of_all_pairs() -> None:
    labels = predictions().argmax(dim=1)
    consensus = Consensus()
    for row in labels:
        consensus.add(torch.nn.functional.one_hot(row, 3).movedim(-1, 0).float())
    pairs = list(itertools.combinations(labels, 2))
    pooled, single = [], []
    for k in (1, 2):
        shared = sum(float(((a == k) & (b == k)).sum()) for a, b in pairs)
        sizes = sum(float((a == k).sum() + (b == k).sum()) for a, b in pairs)
        pooled.append(2 * shared / sizes)
        masks = [torch.stack([(row == k)[None] for row in column]).float() for column in zip(*pairs, strict=True)]
        single.append(float(compute_dice(*masks).mean()))
    found = consensus.result().pairwise_dice
    np.testing.assert_allclose(found, pooled, rtol=1e-12)
    np.testing.assert_allclose(found, single, atol=5e-3)  # the mean over pairs, which is near


def test_geometric_mean_and_vote_combine_as_they_say() -> None:
    p = predictions()
    logit, vote = Consensus(combination="logit"), Consensus(combination="vote")
    for row in p:
        logit.add(row)
        vote.add(row)
    wanted = gmean(p.double().numpy(), axis=0)
    np.testing.assert_allclose(logit.result().probability, wanted / wanted.sum(axis=0), atol=1e-5)
    assert torch.equal(logit.label(), torch.from_numpy(wanted).argmax(dim=0))
    assert torch.equal(vote.label(), vote.result().vote)


def test_confidence_weighs_sure_predictions_more() -> None:
    sure, unsure = (torch.zeros(2, 4, 4) for _ in range(2))
    sure[1], sure[0] = 0.99, 0.01
    unsure[1], unsure[0] = 0.45, 0.55
    weights = [1 - float(entropy([p, 1 - p])) / math.log(2) for p in (0.99, 0.45)]
    consensus = Consensus(weighting="confidence")
    consensus.add(sure)
    consensus.add(unsure)
    wanted = (weights[0] * 0.99 + weights[1] * 0.45) / sum(weights)
    assert float(consensus.result().probability[1, 0, 0]) == pytest.approx(wanted, abs=1e-5)


def test_outliers_are_dropped_and_counted() -> None:
    p = predictions()
    other = predictions(seed=5)[0]
    kept, all_of_them = Consensus(outlier_dice=0.7), Consensus()
    for row in p[:4]:
        assert kept.add(row) and all_of_them.add(row)
    assert not kept.add(other) and all_of_them.add(other)
    assert kept.add(p[4])
    found = kept.result()
    assert (found.views, found.dropped) == (5, 1)
    torch.testing.assert_close(found.probability, p[:5].mean(dim=0))
    # A prediction without any class is an outlier among those that have one, and not among its like.
    empty = torch.zeros_like(p[0])
    empty[0] = 1
    assert not kept.add(empty)
    empties = Consensus(outlier_dice=0.7)
    assert all(empties.add(empty) for _ in range(5))


def test_one_prediction_has_no_spread() -> None:
    consensus = Consensus()
    consensus.add(predictions()[0])
    found = consensus.result()
    assert found.pairwise_dice.isnan().all() and found.volume_cv.isnan().all()
    assert not found.variance.any() and float(found.mutual_information.max()) < 1e-6


def test_memory_does_not_grow_with_the_views() -> None:
    p = predictions(4, shape=(32, 32))
    sizes = []
    for count in (4, 64):
        consensus = Consensus(combination="logit", outlier_dice=0.5)
        for index in range(count):
            consensus.add(p[index % 4])
        sizes.append(len(pickle.dumps(vars(consensus))))
    # All that is kept of a prediction are the volumes of its classes.
    assert sizes[1] - sizes[0] < 60 * 2 * 16 < p[0].numel()


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        (torch.randn(3, 8, 8), "probabilities that sum to 1"),
        (torch.full((3, 8, 8), math.nan), "probabilities that sum to 1"),
        (torch.ones(1, 8, 8), "two classes or more"),
        (torch.full((3, 8, 9), 1 / 3), "expected the shape of those before"),
    ],
)
def test_what_is_no_prediction_is_refused(prediction: torch.Tensor, words: str) -> None:
    consensus = Consensus()
    consensus.add(torch.full((3, 8, 8), 1 / 3))
    with pytest.raises(BadInputError, match=words):
        consensus.add(prediction)


@pytest.mark.parametrize(
    "options",
    [
        {"combination": "median"},
        {"weighting": "size"},
        {"outlier_dice": 1.5},
        {"weighting": "confidence", "combination": "vote"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_unknown_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(BadInputError, match=next(iter(options))):
        Consensus(**options)
