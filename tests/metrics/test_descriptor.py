import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from medgen.metrics.descriptor import band_pass, describe


def _standardized(images: torch.Tensor) -> torch.Tensor:
    dims = tuple(range(2, images.ndim))
    return (images - images.mean(dim=dims, keepdim=True)) / images.std(dim=dims, keepdim=True, correction=0)


def _images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(2, 3, 130, 91), (1, 1, 40, 64)])
def test_resamples_as_torch_does_with_antialiasing(shape: tuple[int, ...]) -> None:
    images = _images(*shape)
    expected = F.interpolate(images, size=(64, 64), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(describe(images), _standardized(expected), atol=2e-4, rtol=0)


def test_enlarges_volumes_as_torch_does() -> None:
    images = _images(2, 1, 12, 20, 32)
    expected = F.interpolate(images, size=(32, 32, 32), mode="trilinear", align_corners=False)
    torch.testing.assert_close(describe(images), _standardized(expected), atol=2e-4, rtol=0)


def test_brightness_and_contrast_of_a_channel_drop_out_even_far_from_zero() -> None:
    images = _images(2, 2, 20, 20).double()
    moved = images * torch.tensor([3e-3, 40.0]).view(1, 2, 1, 1) + torch.tensor([1e6, -5.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(describe(moved), describe(images), atol=1e-4, rtol=0)


def test_a_constant_channel_beside_another_becomes_zero() -> None:
    images = _images(1, 2, 16, 16)
    images[:, 1] = 7
    assert describe(images)[:, 1].abs().max() == 0


def test_band_pass_equals_scipy() -> None:
    image = describe(_images(1, 1, 32, 32, 32))
    weight = {
        sigma: ndimage.gaussian_filter(np.ones((32,) * 3), sigma, mode="constant", truncate=10) for sigma in (1, 4)
    }
    expected = [
        ndimage.gaussian_filter(image[0, 0].double().numpy(), sigma, mode="constant", truncate=10) / weight[sigma]
        for sigma in (1, 4)
    ]
    result = band_pass(image, low=1, high=4)[0, 0].numpy()
    np.testing.assert_allclose(result, expected[0] - expected[1], atol=1e-4)


def test_refuses_what_cannot_be_described() -> None:
    images = _images(3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"expected a batch \(B, C, H, W\[, D\]\).*got shape \(8, 8\)"):
        describe(images[0, 0])
    with pytest.raises(ValueError, match="at least 4 voxels"):
        describe(images[..., :3])
    with pytest.raises(ValueError, match=r"constant scan\(s\) \[1\] of the batch"):
        describe(images * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1))
    images[2, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in scan\(s\) \[2\]"):
        describe(images)
