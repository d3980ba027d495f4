import math

import numpy as np
import pytest
import torch
from scipy.stats import gumbel_r
from torch.nn import functional as F

from medgen.metrics import find_copies
from medgen.metrics.copies import copy_threshold
from medgen.metrics.descriptor import describe
from medgen.metrics.matching import closest


def _scans(n: int, seed: int = 0, shape: tuple[int, ...] = (24, 24)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    own = torch.randn(n, 1, *[8] * len(shape), generator=generator)
    shared = torch.randn(1, 1, *[8] * len(shape), generator=torch.Generator().manual_seed(1000))
    return F.interpolate(own + shared, size=shape, mode=mode)


@pytest.mark.parametrize("rate", [0.005, 0.05])
def test_the_threshold_is_the_quantile_of_the_law_of_maxima(rate: float) -> None:
    law = gumbel_r(loc=0.7, scale=0.08)
    similarity = torch.from_numpy(np.tanh(law.ppf((np.arange(4000) + 0.5) / 4000)))
    expected = math.tanh(law.ppf(1 - rate))
    assert copy_threshold(similarity, false_alarm_rate=rate) == pytest.approx(expected, abs=1e-4)


def test_a_few_duplicates_among_the_real_scans_hardly_move_the_threshold() -> None:
    similarity = torch.from_numpy(np.tanh(np.random.default_rng(0).normal(0.7, 0.1, 200)))
    clean = copy_threshold(similarity)
    similarity[:10] = 1.0
    assert copy_threshold(similarity) == pytest.approx(clean, abs=0.02)


def test_copies_are_what_exceeds_the_threshold_of_the_real_scans() -> None:
    images = _scans(40)
    noise = 0.1 * torch.randn(8, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    synthetic = torch.cat([images[10:18].flip(2) + noise, _scans(12, seed=2)])
    real, made = describe(images), describe(synthetic)
    found = find_copies(real, made)
    assert found.is_copy.tolist() == [True] * 8 + [False] * 12
    assert found.closest.index[:8].tolist() == list(range(10, 18))
    assert found.threshold == copy_threshold(closest(real, real, exclude=torch.eye(40, dtype=torch.bool)).similarity)
    distances = [
        math.sqrt(2 - 2 * float(value))
        for value in (found.closest.similarity[9], found.closest_real.similarity[found.closest.index[9]])
    ]
    assert found.ratio[9].item() == pytest.approx(distances[0] / distances[1])


def test_scans_of_one_patient_do_not_set_the_threshold() -> None:
    patients = _scans(25)
    noise = 0.05 * torch.randn(50, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    images = describe(patients.repeat_interleave(2, dim=0) + noise)
    groups = torch.arange(25).repeat_interleave(2)
    made = describe(_scans(5, seed=2))
    with pytest.warns(UserWarning, match="If several are of one patient, say so by groups"):
        careless = find_copies(images, made)
    careful = find_copies(images, made, groups=groups)
    assert careless.threshold > 0.99 > 0.9 > careful.threshold
    assert (groups[careful.closest_real.index] != groups).all()
    alone = find_copies(images, made, groups=torch.where(groups == 0, -1, groups))
    assert alone.closest_real.index[:2].tolist() == [1, 0]


def test_volumes_of_unlike_shapes_compare() -> None:
    images = [_scans(1, seed, (18 + seed % 3, 22 - seed % 4, 16)) for seed in range(20)]
    real = torch.cat([describe(image) for image in images])
    found = find_copies(real, torch.cat([describe(images[4].flip(3)), describe(_scans(1, 50, (20, 20, 20)))]))
    assert found.is_copy.tolist() == [True, False]
    assert found.closest.index[0] == 4


def test_refuses_or_warns_where_real_scans_say_too_little() -> None:
    real = describe(_scans(4))
    with pytest.raises(ValueError, match=r"at least 2 patients, got 1 of 4 scan\(s\)"):
        find_copies(real, real, groups=torch.zeros(4))
    with pytest.raises(ValueError, match="one for each of 4 real scans"):
        find_copies(real, real, groups=torch.zeros(3))
    with pytest.raises(ValueError, match="N >= 2"):
        copy_threshold(torch.zeros(1))
    with pytest.raises(ValueError, match="false_alarm_rate: expected above 0"):
        copy_threshold(torch.zeros(5), false_alarm_rate=0)
    with pytest.warns(UserWarning, match="^copies: the threshold rests on 4 real scans or patients only"):
        find_copies(real, real)
