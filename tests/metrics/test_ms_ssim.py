import pytest
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as oracle

from medgen.metrics import ms_ssim, num_scales
from medgen.metrics.ms_ssim import WEIGHTS


def _pair(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    for axis in range(2, len(shape)):  # neighbors resemble each other, as in a scan
        x = (x + x.roll(1, axis) + x.roll(2, axis)) / 3
    y = (0.7 * x + 0.3 * torch.rand(shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return x, y


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((2, 1, 24, 31), 2),
        ((2, 3, 48, 64), 3),
        ((2, 1, 128, 130), 4),
        ((1, 1, 180, 192), 5),
        ((1, 1, 24, 26, 25), 2),
        ((1, 1, 46, 45, 44), 3),
    ],
)
def test_equals_torchmetrics_where_that_runs(shape: tuple[int, ...], scales: int) -> None:
    # The oracle's float64 convolution unfolds a volume into gigabytes; its float32 cancels to four digits.
    large = len(shape) == 5 and shape[2] > 40
    x, y = (part.float() if large else part for part in _pair(shape))
    betas = tuple(weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales])
    # The oracle's window has 11 voxels for sigma 1.5 and the range is fixed, as here.
    expected = oracle(x, y, data_range=1.0, betas=betas, normalize="relu", reduction="none", kernel_size=11)
    assert num_scales(shape[2:]) == scales
    assert torch.allclose(ms_ssim(x, y), expected.to(x.dtype), rtol=2e-4 if large else 1e-6, atol=0)


def test_is_one_for_equal_scans_and_lower_for_stronger_noise() -> None:
    x, _ = _pair((1, 1, 32, 32, 32))
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) - 0.5
    values = [ms_ssim(x, x + amount * noise).item() for amount in (0.0, 0.1, 0.3)]
    assert values[0] == pytest.approx(1, abs=1e-12)
    assert values[0] > values[1] > values[2] > 0


def test_each_pair_of_a_batch_is_scored_alone() -> None:
    x, y = _pair((3, 1, 30, 30))
    alone = torch.cat([ms_ssim(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert torch.allclose(ms_ssim(x, y), alone, rtol=1e-12)


def test_scans_thinner_than_the_window_still_get_a_value() -> None:
    x, y = _pair((1, 1, 40, 40, 6))
    assert num_scales(x.shape[2:]) == 1
    assert 0 < ms_ssim(x, y).item() < 1


def test_opposite_structure_counts_as_zero_and_not_as_nan() -> None:
    x, _ = _pair((1, 1, 24, 24))
    assert ms_ssim(x, 1 - x).item() == 0


def test_refuses_pairs_of_different_shape_and_too_many_scales() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ms_ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9))
    with pytest.raises(ValueError, match="Use num_scales"):
        ms_ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), scales=5)
