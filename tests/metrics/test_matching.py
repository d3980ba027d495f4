import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from medgen.metrics import apply_pose, summarize_pose
from medgen.metrics.descriptor import band_pass, describe
from medgen.metrics.matching import closest


def scans(n: int, shape: tuple[int, ...], *, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Scans of one organ: half of what they show is common to all, at several scales; in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(1000)
    images = torch.zeros(n, channels, *shape)
    for cells in (4, 8, 12):
        size = (cells,) * len(shape)
        own = torch.randn(n, channels, *size, generator=generator)
        shared = torch.randn(1, channels, *size, generator=common)
        images += F.interpolate(own + shared, size=shape, mode="bilinear" if len(shape) == 2 else "trilinear")
    low, high = images.amin(), images.amax()
    return (images - low) / (high - low)


def _turned(image: torch.Tensor, degrees: float, axes: tuple[int, int]) -> torch.Tensor:
    """Turned by scipy, so that the convention of angles comes from outside."""
    turned = ndimage.rotate(image.numpy(), degrees, axes=(axes[0] + 1, axes[1] + 1), reshape=False, order=1)
    return torch.from_numpy(turned)


@pytest.mark.parametrize(
    ("shape", "channels", "axes"), [((48, 64), 1, (0, 1)), ((40, 40), 3, (0, 1)), ((24, 32, 20), 1, (0, 2))]
)
def test_finds_a_flipped_and_turned_copy(shape: tuple[int, ...], channels: int, axes: tuple[int, int]) -> None:
    real = scans(12, shape, channels=channels)
    noise = 0.03 * torch.randn(channels, *shape, generator=torch.Generator().manual_seed(1))
    copy = 0.7 * _turned(real[7].flip(1), 6, axes) + 0.1 + noise
    found = closest(describe(copy[None]), describe(real))
    summary = summarize_pose(found.pose[0], shape, shape)
    assert found.index.item() == 7
    assert summary.flipped == (0,)
    assert summary.rotation == pytest.approx(6, abs=1.5)
    others = closest(describe(copy[None]), describe(real), exclude=torch.arange(12)[None] == 7)
    assert found.similarity.item() > 0.9 > 0.8 > others.similarity.item()


@pytest.mark.parametrize("shape", [(60, 60), (28, 36, 30)])
def test_finds_a_copy_that_was_cropped_at_a_corner_and_one_that_was_stretched(shape: tuple[int, ...]) -> None:
    real = scans(12, shape)
    cropped = real[3]
    for axis, size in enumerate(shape, start=1):
        cropped = cropped.narrow(axis, 0, round(0.85 * size))
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    stretched = F.interpolate(real[4:5], size=[round(1.3 * size) for size in shape], mode=mode)
    found = closest(torch.cat([describe(cropped[None]), describe(stretched)]), describe(real))
    assert found.index.tolist() == [3, 4]
    assert found.similarity.min() > 0.95
    # The corner at which the crop begins lies at the corner of the whole scan, its other corner at 0.7 of -1 to 1.
    corners = (
        found.pose[0]
        @ torch.cat([torch.tensor([[-1.0], [1.0]]).expand(2, len(shape)), torch.ones(2, 1)], dim=1).T.double()
    )
    expected = 2 * torch.tensor([round(0.85 * size) / size for size in shape], dtype=torch.float64) - 1
    torch.testing.assert_close(corners[:, 0], -torch.ones(len(shape), dtype=torch.float64), atol=0.05, rtol=0)
    torch.testing.assert_close(corners[:, 1], expected, atol=0.05, rtol=0)


def test_similarity_is_the_correlation_of_the_aligned_scans() -> None:
    real = describe(scans(6, (40, 40)))
    query = describe(scans(1, (40, 40), seed=5))
    found = closest(query, real)
    filtered = band_pass(torch.cat([query, real]), low=1, high=4)
    aligned = apply_pose(filtered[1 + found.index], found.pose)[0, 0].numpy()
    axis = (2 * np.arange(64) + 1) / 64 - 1
    inside = np.hypot(axis[:, None], axis) <= 0.95
    expected = np.corrcoef(filtered[0, 0].numpy()[inside], aligned[inside])[0, 1]
    assert found.similarity.item() == pytest.approx(expected, abs=1e-4)


def test_no_other_pose_around_does_better() -> None:
    real = describe(scans(1, (40, 40)))
    query = describe(_turned(scans(1, (40, 40))[0], 4, (0, 1))[None])
    found = closest(query, real)
    filtered = band_pass(torch.cat([query, real]), low=1, high=4)
    axis = (2 * torch.arange(64) + 1) / 64 - 1
    inside = (axis[:, None].square() + axis.square()).sqrt() <= 0.95
    for change in torch.eye(6, dtype=torch.float64).view(6, 2, 3):
        for sign in (-0.02, 0.02):
            aligned = apply_pose(filtered[1:], found.pose + sign * change)[0, 0]
            other = np.corrcoef(filtered[0, 0][inside].numpy(), aligned[inside].numpy())[0, 1]
            assert other < found.similarity.item()


def test_excluded_pairs_are_not_matched_and_batches_do_not_matter() -> None:
    real = describe(scans(8, (32, 32)))
    free = closest(real, real)
    assert free.index.tolist() == list(range(8))
    exclude = torch.eye(8, dtype=torch.bool)
    found = closest(real, real, exclude=exclude)
    assert (found.index != torch.arange(8)).all()
    alone = closest(real[5:6], real, exclude=exclude[5:6])
    assert alone.index[0] == found.index[5]
    assert alone.similarity[0].item() == pytest.approx(found.similarity[5].item(), abs=1e-4)
    again = closest(real, real, exclude=exclude)
    assert torch.equal(again.similarity, found.similarity)
    assert torch.equal(again.pose, found.pose)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_of_few_scans_none_matches_one_that_is_excluded(count: int) -> None:
    real = describe(scans(count, (32, 32)))
    found = closest(real, real, exclude=torch.eye(count, dtype=torch.bool))
    assert (found.index != torch.arange(count)).all()
    assert (found.similarity < 0.95).all()  # of another scan, not of itself


def test_refuses_sets_that_do_not_compare() -> None:
    flat, deep = describe(scans(2, (16, 16))), describe(scans(2, (16, 16, 16)))
    for query, reference in ((flat, deep), (flat, flat.expand(-1, 3, -1, -1)), (flat, flat[:0])):
        with pytest.raises(ValueError, match="of one dimension, channels and grid"):
            closest(query, reference)
    with pytest.raises(ValueError, match="a scan that excludes all others"):
        closest(flat, flat, exclude=torch.ones(2, 2, dtype=torch.bool))
