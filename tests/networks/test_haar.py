"""The Haar transform against PyWavelets' definition by hand, and its orthonormality."""

import pytest
import torch

from medgen.networks.haar import HaarTransform, haar_matrix


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_basis_is_orthonormal(size):
    matrix = haar_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


def test_the_basis_of_four_is_the_textbook_one():
    a = 0.5**0.5
    expected = torch.tensor([[0.5] * 4, [0.5, 0.5, -0.5, -0.5], [a, -a, 0, 0], [0, 0, a, -a]], dtype=torch.float64)
    torch.testing.assert_close(haar_matrix(4), expected)


@pytest.mark.parametrize(("dims", "channels", "block"), [(2, 1, 4), (2, 3, 2), (3, 1, 2), (3, 2, 4)])
def test_all_coefficients_give_the_image_back(dims, channels, block):
    transform = HaarTransform(dims, channels, block, channels * block**dims)
    image = torch.randn(2, channels, *[2 * block] * dims, generator=torch.Generator().manual_seed(0))
    coefficients = transform(image)
    torch.testing.assert_close(transform.inverse(coefficients), image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coefficients.square().sum(), image.square().sum())


def test_a_quarter_of_the_coefficients_is_the_image_at_half_resolution():
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    transform = HaarTransform(2, 1, 4, 4)
    half = torch.nn.functional.avg_pool2d(image, 2)
    expected = torch.nn.functional.interpolate(half, scale_factor=2, mode="nearest")
    torch.testing.assert_close(transform.inverse(transform(image)), expected)


def test_coefficients_past_the_voxels_are_zero():
    coefficients = HaarTransform(2, 1, 2, 6)(torch.ones(1, 1, 4, 4))
    assert (coefficients[:, 4:] == 0).all()
    assert (coefficients[:, 0] == 2).all()
