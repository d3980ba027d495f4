import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from medgen.metrics import PRDC, FrechetDistance, GaussianKernelDistance, KernelDistance, VendiScore
from medgen.metrics.feature_metric import FeatureMetric

ALL: list[Callable[..., FeatureMetric]] = [FrechetDistance, KernelDistance, GaussianKernelDistance, PRDC, VendiScore]
each = pytest.mark.parametrize("kind", ALL)


class _Projection(nn.Module):
    num_features = 5

    def __init__(self, pixels: int = 12) -> None:
        super().__init__()
        weight = torch.randn(pixels, self.num_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("weight", weight)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(1).double() @ self.weight


def _images(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def _values(metric: FeatureMetric) -> list[float]:
    value = metric.compute()
    return [item.item() for item in (value.values() if isinstance(value, dict) else [value])]


# Three batches on the first process, one on the second, none of the real scans there: states must meet all the same.
_PROCESS = """
from torch import nn
from medgen.metrics import PRDC, FrechetDistance, GaussianKernelDistance, KernelDistance, VendiScore
real = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
synthetic = torch.rand(17, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double() ** 2
found = {}
for kind in (FrechetDistance, KernelDistance, GaussianKernelDistance, PRDC, VendiScore):
    metric = kind(nn.Flatten(), num_features=4)
    if rank == 0:
        for batch in (*real.split(8),):
            metric.update(batch, real=True)
        metric.update(synthetic[:4], real=False)
    else:
        metric.update(synthetic[4:], real=False)
    value = metric.compute()
    found[kind.__name__] = [v.item() for v in (value.values() if isinstance(value, dict) else [value])]
    metric.update(synthetic[:3], real=False)  # after compute each process has its own states again
"""


def test_states_of_two_processes_add_up(two_processes: Callable[[str], list[Any]]) -> None:
    real = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    synthetic = torch.rand(17, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double() ** 2
    outputs = two_processes(_PROCESS)
    assert outputs[0] == outputs[1]
    for together in outputs:
        for kind in ALL:
            metric = kind(nn.Flatten(), num_features=4)
            metric.update(real, real=True)
            metric.update(synthetic, real=False)
            assert together[metric.__class__.__name__] == pytest.approx(_values(metric), rel=1e-9)


@each
def test_batches_add_up_to_the_whole(kind: Callable[..., FeatureMetric]) -> None:
    whole, parts = kind(_Projection()), kind(_Projection())
    for real, images in ((True, _images(20, 0)), (False, _images(15, 1) ** 2)):
        whole.update(images, real=real)
        for batch in images.split(4):
            parts.update(batch, real=real)
    assert _values(parts) == pytest.approx(_values(whole), rel=1e-9)


@each
def test_reset_forgets_all_or_keeps_the_real_scans(kind: Callable[..., FeatureMetric]) -> None:
    metric = kind(_Projection(), reset_real_features=False)
    metric.update(_images(20, 0), real=True)
    metric.update(_images(20, 1) ** 2, real=False)
    first = _values(metric)
    metric.reset()
    metric.update(_images(20, 1) ** 2, real=False)
    assert _values(metric) == pytest.approx(first, rel=1e-12)
    forgetful = kind(_Projection())
    forgetful.update(_images(20, 0), real=True)
    forgetful.reset()
    with pytest.raises(ValueError, match=r"got \(0, 0\)"):
        forgetful.compute()
    forgetful.update(torch.rand(20, 1, 3, 4), real=True)  # another kind of scan is welcome now


@each
def test_works_on_volumes_of_any_channel_count_and_beside_a_network_in_training(
    kind: Callable[..., FeatureMetric],
) -> None:
    network = nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), nn.Dropout(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    network.train()
    before = copy.deepcopy(network.state_dict())
    metric = kind(network, num_features=6)
    metric.train()
    volumes = torch.rand(14, 4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    metric.update(volumes[:7], real=True)
    metric.update(volumes[7:], real=False)
    again = metric.clone()
    assert _values(again) == _values(metric)
    assert network[2].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@each
def test_refuses_scans_of_another_kind(kind: Callable[..., FeatureMetric]) -> None:
    metric = kind(_Projection())
    metric.update(_images(3, 0), real=True)
    with pytest.raises(ValueError, match=r"expected synthetic scans in 2D with 3 channel\(s\) as those before"):
        metric.update(torch.rand(3, 1, 4, 3), real=False)
    with pytest.raises(ValueError, match=r"got 3D with 3\. Compare sets of one kind"):
        metric.update(torch.rand(3, 3, 2, 2, 1), real=False)
    with pytest.raises(ValueError, match=r"images: expected \(B, C, H, W\) or \(B, C, H, W, D\), got shape \(3, 4\)"):
        metric.update(torch.rand(3, 4), real=False)


@each
def test_the_default_network_says_which_argument_fits_the_scans(kind: Callable[..., FeatureMetric]) -> None:
    metric = kind()
    with pytest.raises(
        ValueError,
        match=r"expected shape \(B, 1, H, W\), got \(2, 1, 8, 8, 8\)\. For such scans, pass spatial_dims=3 and",
    ):
        metric.update(torch.zeros(2, 1, 8, 8, 8), real=True)
    with pytest.raises(ValueError, match=r"pass spatial_dims=2 and in_channels=3\."):
        metric.update(torch.zeros(2, 3, 8, 8), real=True)
    scans = torch.zeros(2, 1, 8, 8)
    metric.update(scans, real=True)  # what was refused has left no trace
    scans[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 2 scans\. Leave these out, or mend them\."):
        metric.update(scans, real=False)


@each
def test_refuses_the_number_that_torchmetrics_takes_for_a_network(kind: Callable[..., FeatureMetric]) -> None:
    with pytest.raises(TypeError, match=r"feature: expected one of .* or a torch module, got 2048\. For the 2048 feat"):
        kind(feature=2048)


def test_reset_without_real_scans_keeps_nothing() -> None:
    metric = KernelDistance(_Projection(), reset_real_features=False)
    metric.update(_images(3, 0), real=False)
    metric.reset()
    metric.update(torch.rand(3, 1, 3, 4), real=True)


@each
def test_refuses_too_few_scans_and_nan(kind: Callable[..., FeatureMetric]) -> None:
    metric = kind(_Projection())
    metric.update(_images(1, 0), real=True)
    metric.update(_images(1, 0), real=False)
    with pytest.raises(ValueError, match=r"expected at least \d .*scans.*, got \(1, 1\)"):
        metric.compute()
    with pytest.raises(ValueError, match=r"expected finite features, got NaN or infinity\. Check the synthetic scans"):
        metric.update(_images(2, 0) * float("nan"), real=False)


@each
def test_refuses_features_that_change_their_shape_or_are_no_vectors(kind: Callable[..., FeatureMetric]) -> None:
    metric = kind(nn.Flatten(), num_features=12)
    metric.update(_images(3, 0), real=True)
    with pytest.raises(ValueError, match=r"expected \(1, 12\) views and features .*got \(1, 48\)"):
        metric.update(torch.rand(3, 3, 4, 4), real=False)
    with pytest.raises(ValueError, match=r"expected output \(B, D\) or \(B, V, D\) for 3 scans.*Pool the output"):
        kind(nn.Identity(), num_features=3).update(_images(3, 0), real=True)


@each
def test_refuses_to_be_called_with_one_batch(kind: Callable[..., FeatureMetric]) -> None:
    with pytest.raises(TypeError, match=r"expected update\(images, real=...\) and then compute\(\)"):
        kind(_Projection())(_images(3, 0), real=True)
