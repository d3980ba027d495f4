import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from medgen.metrics import FrechetDistance, frechet_distance_from_features


class _Projection(nn.Module):
    """A fixed linear feature extractor with the attribute that torchmetrics wants as well."""

    num_features = 6

    def __init__(self, pixels: int) -> None:
        super().__init__()
        weight = torch.randn(self.num_features, pixels, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(1).to(self.weight.dtype) @ self.weight.T


def _images(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_equals_torchmetrics_with_the_same_features() -> None:
    real, synthetic = _images(40, 0), _images(30, 1) ** 2
    metric, oracle = FrechetDistance(_Projection(48).double()), FrechetInceptionDistance(_Projection(48).double())
    oracle.set_dtype(torch.float64)
    for module in (metric, oracle):
        module.update(real, real=True)
        module.update(synthetic, real=False)
    assert metric.compute().item() == pytest.approx(oracle.compute().item(), rel=1e-6)


def test_batches_add_up_to_the_whole() -> None:
    real, synthetic = _images(20, 0), _images(20, 1) ** 2
    metric = FrechetDistance(_Projection(48))
    for part in real.split(7):
        metric.update(part, real=True)
    for part in synthetic.split(3):
        metric.update(part, real=False)
    feature = _Projection(48)
    expected = frechet_distance_from_features(feature(real), feature(synthetic)).item()
    assert metric.compute().item() == pytest.approx(expected, rel=1e-9)


def test_views_are_averaged() -> None:
    class TwoViews(_Projection):
        views = ("one", "two")

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            features = super().forward(image)
            return torch.stack([features, 2 * features], dim=1)

    real, synthetic = _images(20, 0), _images(20, 1) ** 2
    values = []
    for feature in (_Projection(48), TwoViews(48)):
        metric = FrechetDistance(feature)
        metric.update(real, real=True)
        metric.update(synthetic, real=False)
        values.append(metric.compute().item())
    assert values[1] == pytest.approx((1 + 4) / 2 * values[0], rel=1e-9)


def test_reset_can_keep_the_real_scans() -> None:
    metric = FrechetDistance(_Projection(48), reset_real_features=False)
    metric.update(_images(20, 0), real=True)
    metric.update(_images(20, 1) ** 2, real=False)
    first = metric.compute().item()
    metric.reset()
    metric.update(_images(20, 1) ** 2, real=False)
    assert metric.compute().item() == pytest.approx(first, rel=1e-12)
    assert int(metric.real_count) == 20


def test_refuses_too_few_scans_and_wrong_features() -> None:
    metric = FrechetDistance(_Projection(48))
    metric.update(_images(1, 0), real=True)
    with pytest.raises(ValueError, match="at least 2 real and 2 synthetic"):
        metric.compute()
    with pytest.raises(ValueError, match="Set num_views and num_features"):
        FrechetDistance(nn.Flatten(), num_features=5).update(_images(2, 0), real=True)
    with pytest.raises(ValueError, match="Pass num_features=D"):
        FrechetDistance(nn.Flatten())
    with pytest.raises(ValueError, match="finite features"):
        FrechetDistance(nn.Flatten(), num_features=48).update(_images(2, 0) * float("nan"), real=True)
    with pytest.raises(ValueError, match="got 'dino'"):
        FrechetDistance("dino")
