"""The Fréchet radiomic distance as a metric, and what makes the robust one robust, on scans made here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage

from medgen.metrics import FrechetRadiomicDistance
from medgen.metrics.protocols import PROTOCOLS
from medgen.metrics.robust_distance import _coordinates, _shrunk, frd_robust
from medgen.types import BadInputError


def _scans(count: int, seed: int, *, size: int = 40, dims: int = 2, blur: float = 1.0) -> torch.Tensor:
    """Smooth noise around a bright blob, whole gray values with a flat ground, as 8-bit pictures have."""
    source = np.random.default_rng(seed)
    axes = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * dims, indexing="ij"))
    made = []
    for _ in range(count):
        center = source.normal(scale=0.2, size=(dims,) + (1,) * dims)
        blob = np.exp(-((axes - center) ** 2).sum(0) * source.uniform(2, 5))
        noise = ndimage.gaussian_filter(source.normal(size=blob.shape), blur)
        image = np.round((blob + 0.3 * noise / noise.std() * blob) * 120)
        made.append(np.where(blob < 0.1, 0, image.clip(0, 255)))
    return torch.from_numpy(np.stack(made)[:, None])


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    return _scans(24, 0), _scans(20, 1, blur=1.6)


def _metric(real: torch.Tensor, synthetic: torch.Tensor, **options: object) -> FrechetRadiomicDistance:
    metric = FrechetRadiomicDistance(**options)  # type: ignore[arg-type]
    metric.update(real, real=True)
    metric.update(synthetic, real=False)
    return metric


def test_identical_sets_are_exactly_zero_apart(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    for options in ({}, {"protocol": "frd-v0"}):
        metric = _metric(sets[0], sets[0].flip(0), **options)
        assert metric.compute().item() == pytest.approx(0, abs=0 if not options else 1e-9)
    assert _metric(sets[0], sets[0], protocol="frd-v1").compute().item() < -20  # the logarithm of rounding errors


def test_robust_distance_is_symmetric_and_its_order_of_scans_does_not_matter(
    sets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    there, back = _metric(*sets).compute(), _metric(*sets[::-1]).compute()
    assert abs(there - back) < 1e-9
    assert there > 0
    assert _metric(sets[0].flip(0), sets[1]).compute().item() == there.item()
    assert abs(_metric(*sets, protocol="frd-v1").compute() - _metric(*sets[::-1], protocol="frd-v1").compute()) > 1e-3


def test_rounding_errors_and_single_precision_do_not_move_the_robust_distance(
    sets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    real, synthetic = sets
    before = _metric(real, synthetic).compute()
    noise = 1e-12 * torch.randn(real.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(_metric(real + noise, synthetic).compute() - before) < 1e-9
    assert abs(_metric(real.float(), synthetic.float()).compute() - before) < 1e-4 * before
    metric = _metric(real, synthetic)
    x, y = (torch.cat(part).numpy().reshape(-1, len(metric.columns)).astype(np.float32).astype(float) for part in
            (metric.real_features, metric.synthetic_features))  # fmt: skip
    assert frd_robust(x, y, metric.columns).value == pytest.approx(before.item(), rel=1e-4)


def test_robust_distance_of_one_distribution_is_zero_within_its_interval_at_any_size() -> None:
    source = np.random.default_rng(0)
    mixing = source.normal(size=(12, 60))
    names = [f"glcm_{index}" for index in range(60)]

    def draw(count: int) -> np.ndarray:
        return 10 + source.normal(size=(count, 12)) @ mixing + source.normal(size=(count, 60))

    found = [[frd_robust(draw(n), draw(n), names, permutations=39) for _ in range(6)] for n in (20, 60, 200)]
    for results in found:
        assert sum(result.interval[0] == 0 for result in results) >= 5  # type: ignore[index]
        assert np.mean([result.squared - result.bias for result in results]) == pytest.approx(0, abs=0.02)  # type: ignore[operator]
        assert np.median([result.p_value for result in results]) > 0.05  # type: ignore[type-var]
    # Before the correction, the same value falls with the size of the sets.
    assert np.mean([r.squared for r in found[0]]) > 4 * np.mean([r.squared for r in found[2]])


def test_a_real_shift_is_told_from_the_floor_by_twenty_scans(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, other = sets[0][:20], _scans(20, 7)
    floor = _metric(real, other).result()
    blurred = torch.from_numpy(ndimage.gaussian_filter(other.numpy(), (0, 0, 1.5, 1.5)))
    noisy = other + 15 * torch.randn(other.shape, generator=torch.Generator().manual_seed(1))
    assert floor.p_value > 0.05  # type: ignore[operator]
    for shifted in (blurred, noisy):
        result = _metric(real, shifted).result()
        assert result.p_value < 0.05  # type: ignore[operator]
        assert result.value > floor.interval[1]  # type: ignore[index]


def test_scans_of_a_patient_are_not_taken_for_independent_evidence() -> None:
    source = np.random.default_rng(3)
    names = [f"glcm_{index}" for index in range(20)]

    def patients(count: int) -> np.ndarray:  # eight nearly equal scans of each
        return 10 + np.repeat(source.normal(size=(count, 20)), 8, axis=0) + 0.1 * source.normal(size=(8 * count, 20))

    plain, grouped = [], []
    for _ in range(8):
        x, y = patients(6), patients(6)
        groups = tuple([f"{side}{row // 8}" for row in range(48)] for side in "ab")
        plain.append(frd_robust(x, y, names, permutations=99).p_value)
        grouped.append(frd_robust(x, y, names, groups=groups, permutations=99).p_value)  # type: ignore[arg-type]
    assert np.median(plain) < 0.05  # type: ignore[type-var]
    assert np.median(grouped) > 0.1  # type: ignore[type-var]


def test_shrunk_distance_equals_the_formula_in_full_space() -> None:
    source = np.random.default_rng(0)
    for n, m, d in ((9, 7, 30), (60, 50, 12)):
        a, b = source.normal(size=(n, d)) @ np.diag(np.linspace(0.5, 2, d)), source.normal(size=(m, d)) + 0.3
        strengths = []
        for part in (a, b):  # Ledoit & Wolf 2004, equations of section 3.2, scan by scan
            centered = part - part.mean(0)
            s = centered.T @ centered / len(part)
            level = np.trace(s) / d
            spread = ((s - level * np.eye(d)) ** 2).sum() / d
            noise = sum(((np.outer(row, row) - s) ** 2).sum() / d for row in centered) / len(part) ** 2
            strengths.append(min(noise / spread, 1))
        strength = np.mean(strengths)
        shrunk = []
        for part in (a, b):
            s = np.cov(part, rowvar=False)
            shrunk.append((1 - strength) * s + strength * np.trace(s) / d * np.eye(d))
        cross = np.trace(linalg.sqrtm(shrunk[0] @ shrunk[1])).real
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(shrunk[0]) + np.trace(shrunk[1]) - 2 * cross
        assert _shrunk(*_coordinates(a, b), d) == pytest.approx(expected / d, rel=1e-9)


def test_a_column_that_makes_up_most_of_the_distance_is_named() -> None:
    source = np.random.default_rng(0)
    x, y = 1 + 0.1 * source.normal(size=(30, 10)), 1 + 0.1 * source.normal(size=(30, 10))
    y[:, 3] += 5
    result = frd_robust(x, y, [f"glcm_{index}" for index in range(10)])
    assert next(iter(result.shares)) == "glcm_3"
    assert any("glcm_3 alone" in note for note in result.warnings)


def test_bad_scans_are_counted_with_their_reason(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, synthetic = sets
    constant = torch.full_like(real[:1], 7.0)
    missing = real[:1].clone()
    missing[0, 0, 3, 3] = torch.nan
    metric = _metric(real, synthetic)
    expected = metric.compute()
    with pytest.warns(UserWarning, match="a real scan is excluded: image: expected intensities that vary"):
        metric.update(constant, real=True)
    with pytest.warns(UserWarning, match="a synthetic scan is excluded: image: expected finite"):
        metric.update(missing, real=False)
    empty = torch.zeros(2, 40, 40, dtype=torch.int64)
    empty[1, 5, 5] = 1
    with pytest.warns(UserWarning, match="expected voxels of label 1"):
        metric.update(real[:2], real=True, mask=empty)
    assert (int(metric.real_excluded), int(metric.synthetic_excluded)) == (3, 1)
    assert sum(metric.excluded.values()) == 4
    metric._computed = None
    assert metric.compute().item() == expected.item()
    strict = FrechetRadiomicDistance(bad_scans="raise")
    with pytest.raises(BadInputError, match="constant image"):
        strict.update(constant, real=True)


def test_frd_v1_says_which_columns_are_rounding_noise(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    result = _metric(*sets, protocol="frd-v1").result()
    assert any("rounding noise in wavelet-LH_firstorder_Mean" in note for note in result.warnings)
    assert result.dropped_columns["diagnostics_Mask-original_VolumeNum"] == "constant over the real scans"


def test_volumes_colors_and_channels() -> None:
    volumes = _scans(6, 0, size=16, dims=3)
    metric = _metric(volumes[:3], volumes[3:], spatial_dims=3)
    assert len(metric.columns) == 13 * 77
    assert np.isfinite(metric.compute().item())
    gray = _scans(6, 0)
    colors = gray.repeat(1, 3, 1, 1)
    by_luminance = _metric(colors[:3], colors[3:])
    assert by_luminance.compute().item() == pytest.approx(_metric(gray[:3], gray[3:]).compute().item(), abs=1e-6)
    each = _metric(colors[:3], colors[3:], channels="each")
    assert each.columns[0] == "channel0_firstorder_10Percentile"
    assert len(each.columns) == 3 * len(by_luminance.columns)
    assert torch.cat(each.real_features).shape == (3 * len(each.columns),)


def test_a_mask_and_a_spacing_are_obeyed() -> None:
    scans = _scans(4, 0)
    mask = torch.zeros(4, 1, 40, 40, dtype=torch.uint8)
    mask[:, :, 10:30, 8:32] = 1
    plain, masked, coarse = FrechetRadiomicDistance(), FrechetRadiomicDistance(), FrechetRadiomicDistance()
    plain.update(scans, real=True)
    masked.update(scans, real=True, mask=mask)
    coarse.update(scans, real=True, mask=mask, spacing=(2.0, 2.0))
    rows = [torch.cat(metric.real_features) for metric in (plain, masked, coarse)]
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])


def test_reset_can_keep_the_real_scans(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    metric = _metric(sets[0][:5], sets[1][:5], reset_real_features=False)
    first = metric.compute().item()
    metric.reset()
    with pytest.raises(ValueError, match="at least 2 synthetic scans with features, got 0"):
        metric.compute()
    metric.update(sets[1][:5], real=False)
    assert metric.compute().item() == first
    forgetful = _metric(sets[0][:5], sets[1][:5])
    forgetful.reset()
    with pytest.raises(ValueError, match="at least 2 real scans"):
        forgetful.compute()


def test_refuses_what_does_not_fit(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="protocol: expected one of frd-v0, frd-v1, frd-robust, got 'v1'"):
        FrechetRadiomicDistance(protocol="v1")  # type: ignore[arg-type]
    metric = FrechetRadiomicDistance()
    with pytest.raises(ValueError, match=r"images: expected \(B, C, H, W\), got shape"):
        metric.update(sets[0][0], real=True)
    with pytest.raises(ValueError, match="expected 1 channel, or 3 colors in 2D, got 2"):
        metric.update(sets[0][:2].repeat(1, 2, 1, 1), real=True)
    metric.update(sets[0][:2], real=True)
    with pytest.raises(
        ValueError, match=r"expected synthetic scans in 2D with 1 channel\(s\) as those before, got 2D with 3"
    ):
        metric.update(sets[0][:2].repeat(1, 3, 1, 1), real=False)
    with pytest.raises(ValueError, match="mask: expected shape"):
        metric.update(sets[0][:2], real=False, mask=torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="at least 2 synthetic scans"):
        metric.compute()


_PROCESS = """
import dataclasses
from medgen.metrics import FrechetRadiomicDistance

scans = torch.load(f"{folder}/scans.pt")
metric = FrechetRadiomicDistance()
if rank == 0:  # the other process has no real scans
    metric.update(scans["real"], real=True)
    metric.update(scans["synthetic"][:1], real=False)
else:
    metric.update(scans["synthetic"][1:], real=False)
value = metric.compute().item()
assert metric.result() is metric.last_result
found = [value, dataclasses.asdict(metric.last_result)]
"""


def test_each_of_two_processes_has_the_value_and_the_details_of_one(
    sets: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, two_processes: Callable[[str], list[Any]]
) -> None:
    real, synthetic = sets[0][:10], sets[1][:9]
    torch.save({"real": real, "synthetic": synthetic}, tmp_path / "scans.pt")
    expected = _metric(real, synthetic).result()
    assert expected.interval is not None
    for value, result in two_processes(_PROCESS):
        assert value == expected.value
        assert result == json.loads(json.dumps(dataclasses.asdict(expected)))


def test_scans_added_after_a_result_are_in_the_next(sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    metric = _metric(sets[0][:4], sets[1][:3])
    assert metric.result().n_real == 4
    metric.update(sets[0][4:6], real=True)
    assert metric.result().n_real == 6


@pytest.mark.parametrize(("name", "dims", "count"), [("frd-v0", 2, 102), ("frd-v0", 3, 107), ("frd-v1", 2, 398),
                                                     ("frd-v1", 3, 1014), ("frd-robust", 2, 693)])  # fmt: skip
def test_protocols_have_the_published_numbers_of_features(name: str, dims: int, count: int) -> None:
    assert len(PROTOCOLS[name].columns(dims)) == count == len(set(PROTOCOLS[name].columns(dims)))
