"""The physics of corruptions against closed forms, scikit-image, SciPy and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.transforms import GibbsNoise
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.data import shepp_logan_phantom
from skimage.transform import iradon, radon, resize

from medgen.transforms.physics import kspace, noise, optics, picture, projection


def generator(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


def test_rician_noise_in_air_has_the_mean_of_rayleigh() -> None:
    after = noise.rician(torch.zeros(1, 200, 200), 0.1, generator())
    assert float(after.mean()) == pytest.approx(0.1 * math.sqrt(math.pi / 2), rel=0.02)


def test_gaussian_noise_has_its_deviation() -> None:
    after = noise.gaussian(torch.ones(1, 200, 200), 0.1, generator())
    assert float(after.std()) == pytest.approx(0.1, rel=0.02)


def test_shot_noise_has_the_variance_of_counts() -> None:
    after = noise.shot(torch.full((1, 200, 200), 0.5), 50, generator())
    assert float(after.mean()) == pytest.approx(0.5, rel=0.01)
    assert float(after.var()) == pytest.approx(0.5 / 50, rel=0.05)


def test_speckle_of_a_constant_has_its_relative_deviation() -> None:
    after = noise.speckle(torch.full((1, 200, 200), 0.7), 0.2, generator())
    assert float(after.std() / after.mean()) == pytest.approx(0.2, rel=0.03)


@pytest.mark.parametrize(("attenuation", "dose"), [(0.0, 0.25), (2.0, 0.5), (4.0, 0.1)])
def test_thinned_counts_have_the_variance_of_the_lower_dose(attenuation: float, dose: float) -> None:
    photons = 1e6
    change = noise.thin(torch.full((300, 300), attenuation, dtype=torch.float64), photons, dose, generator())
    counts = photons * math.exp(-attenuation)
    electronic = 11 * (1 - dose**2) / (dose * counts) ** 2
    assert float(change.var()) == pytest.approx((1 - dose) / (dose * counts) + electronic, rel=0.03)
    assert abs(float(change.mean())) < 0.02 * float(change.std())


def test_full_dose_changes_nothing_even_where_no_photon_arrives() -> None:
    attenuation = torch.linspace(0, 30, 100, dtype=torch.float64)
    assert noise.thin(attenuation, 1e4, 1.0, generator()).abs().max() == 0
    assert torch.isfinite(noise.thin(attenuation, 1e4, 0.01, generator())).all()


def test_blur_of_a_point_is_the_gaussian() -> None:
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    after = optics.blur(point, 2.0, (1.0, 1.0))[0].numpy()
    edges = np.array([math.erf((place - 20.5) / (2 * math.sqrt(2))) / 2 for place in range(42)])
    expected = np.outer(np.diff(edges), np.diff(edges))
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_blur_is_alike_in_mm_and_keeps_a_constant_up_to_the_border() -> None:
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    after = optics.blur(point, 3.0, (1.0, 3.0))[0]
    rows = torch.arange(41.0) - 20
    assert float((after.sum(1) * rows**2).sum()) == pytest.approx(9.0, rel=0.03)
    assert float((after.sum(0) * (3 * rows) ** 2).sum()) == pytest.approx(9.0 + 9 / 12, rel=0.03)
    torch.testing.assert_close(optics.blur(torch.ones(2, 9, 1, 7), 2.0, (1.0,) * 3), torch.ones(2, 9, 1, 7))


@pytest.mark.parametrize("shape", [(40, 30), (20, 24, 18)])
def test_a_bias_field_is_smooth_and_has_its_spread(shape: tuple[int, ...]) -> None:
    fields = [optics.bias_field(torch.ones(1, *shape), 0.3, generator(seed))[0].log() for seed in range(6)]
    for field in fields:
        assert float(field.std()) == pytest.approx(0.3, rel=1e-3) and abs(float(field.mean())) < 1e-5
        # Third differences along an axis of a polynomial of degree 2 are 0.
        assert max(float(torch.diff(field, n=3, dim=axis).abs().max()) for axis in range(field.ndim)) < 1e-4
    across = [float(torch.diff(field.mean(dim=tuple(range(1, field.ndim)))).abs().max()) for field in fields]
    along = [float(torch.diff(field.mean(dim=tuple(range(field.ndim - 1)))).abs().max()) for field in fields]
    assert max(across) > 0.02 and max(along) > 0.02


def test_truncation_rings_by_nine_percent_and_is_that_of_monai() -> None:
    step = torch.full((1, 256, 256), 0.1)
    step[:, 64:192] = 1.1
    after = kspace.gibbs(step, 0.25)
    assert float(after.max() - 1.1) == pytest.approx(0.0895, abs=0.01)
    torch.testing.assert_close(after, GibbsNoise(1 - 0.25 / math.sqrt(2))(step).abs().as_tensor())


def test_ghosts_lie_where_the_period_says() -> None:
    line = torch.zeros(1, 64, 8)
    line[0, 30] = 1.0
    after = kspace.ghost(line, 0.2, 10, math.pi / 3, axis=0)[0, :, 0]
    frequencies = np.fft.fftfreq(64, 1 / 64)
    change = 1 + 2 * 0.2 * np.cos(2 * math.pi * frequencies * 10 / 64 + math.pi / 3)
    expected = np.abs(np.fft.ifft(np.fft.fft(line[0, :, 0].numpy()) * change)) / change[0]
    np.testing.assert_allclose(after, expected, atol=1e-6)
    assert sorted(torch.topk(after, 3).indices.tolist()) == [20, 30, 40]


@pytest.mark.parametrize("shape", [(1, 33, 40), (2, 16, 20, 12)])
def test_no_movement_is_the_same_scan(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape)
    torch.testing.assert_close(
        kspace.motion(image, 0.0, generator(), (1.0,) * (len(shape) - 1)), image, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("edge", [1.0, 2.0])
def test_a_shift_during_the_scan_is_the_phase_of_the_shift_theorem(edge: float) -> None:
    image = torch.zeros(1, 48, 40)
    image[0, 15:30, 12:28] = torch.rand(15, 16)
    poses = [kspace.Pose(30, 48, (0.0,), (3.0 * edge, 2.0))]
    after = kspace.move(image, poses, axis=0, spacing=(edge, 1.0))
    spectrum = np.fft.fftshift(np.fft.fft2(image[0].numpy()))
    first, second = np.meshgrid(np.arange(-24, 24), np.arange(-20, 20), indexing="ij")
    phase = np.exp(-2j * math.pi * (first * 3 / 48 + second * 2 / 40))
    phase[:30] = 1
    expected = np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum * phase)))
    np.testing.assert_allclose(after[0], expected, atol=2e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_turn_of_a_whole_scan_is_that_of_scipy_in_mm(axis: int) -> None:
    image = torch.from_numpy(ndimage.gaussian_filter(generator().rand(21, 21, 21), 2).astype(np.float32))[None]
    angles = [0.0, 0.0, 0.0]
    angles[axis] = 20.0
    poses = [kspace.Pose(0, 21, tuple(angles), (0.0, 0.0, 0.0))]
    after = kspace.move(image, poses, axis=0, spacing=(1.0, 1.0, 1.0))[0].numpy()
    planes = [(1, 2), (2, 0), (0, 1)]
    # SciPy puts the axes in order, which turns the other way for (2, 0).
    angle = -20 if axis == 1 else 20
    expected = ndimage.rotate(image[0].numpy(), angle, axes=planes[axis], reshape=False, mode="nearest")
    np.testing.assert_allclose(after[4:-4, 4:-4, 4:-4], expected[4:-4, 4:-4, 4:-4], atol=2e-3)
    poses = [kspace.Pose(0, 11, tuple(angles), (0.0, 0.0, 0.0))]
    coarse = kspace.move(image[:, ::2], poses, axis=0, spacing=(2.0, 1.0, 1.0))[0].numpy()
    np.testing.assert_allclose(coarse[2:-2, 5:-5, 5:-5], after[::2][2:-2, 5:-5, 5:-5], atol=0.01)


def test_the_middle_of_kspace_is_at_rest() -> None:
    poses = kspace.draw_poses(100, 2, 3.0, generator())
    lines = {line for pose in poses for line in range(pose.first, pose.stop)}
    assert lines == set(range(46)) | set(range(54, 100))
    assert all(math.hypot(*pose.translation) == pytest.approx(3.0) and abs(pose.rotation[0]) <= 3 for pose in poses)


def test_line_integrals_through_a_disc_are_its_chords() -> None:
    rows = np.arange(65) - 32.0
    disc = torch.from_numpy((np.hypot(rows[:, None], rows[None]) <= 20).astype(np.float32))[None]
    angles = torch.tensor([0.0, 0.4, math.pi / 2], dtype=torch.float64)
    paths = projection.project(disc, angles)[0]
    offsets = np.arange(paths.shape[1]) - (paths.shape[1] - 1) / 2
    chords = 2 * np.sqrt(np.clip(20.0**2 - offsets**2, 0, None))
    inside = np.abs(offsets) < 17
    np.testing.assert_allclose(paths.numpy()[:, inside], np.broadcast_to(chords[inside], (3, inside.sum())), atol=1.5)


def test_reconstruction_agrees_with_scikit_image_and_with_the_slice() -> None:
    image = resize(shepp_logan_phantom(), (64, 64), anti_aliasing=True)
    image = ndimage.gaussian_filter(image, 1.5)
    angles = torch.arange(120, dtype=torch.float64) * (math.pi / 120)
    slices = torch.from_numpy(image.astype(np.float32))[None]
    after = projection.back_project(projection.project(slices, angles), angles, (64, 64))[0].numpy()
    degrees = np.arange(120) * 1.5
    expected = iradon(radon(image, degrees, circle=False), degrees, filter_name="hann", circle=False, output_size=64)
    assert np.abs(after - expected).max() < 0.06 and np.abs(after - expected).mean() < 0.01
    assert np.abs(after - image).mean() < 0.02
    narrow = projection.project(slices[:, 10:50], angles)
    assert projection.back_project(narrow, angles, (40, 64)).shape == (1, 40, 64)


def disc(count: int) -> torch.Tensor:
    rows = (np.arange(count) - (count - 1) / 2) / count
    return torch.from_numpy((np.hypot(rows[:, None], rows[None]) <= 0.4).astype(np.float32))[None]


def test_noise_of_a_lower_dose_grows_as_theory_says_and_lies_where_rays_are_long() -> None:
    changes = [projection.low_dose(disc(64), dose, generator()) - disc(64) for dose in (0.5, 0.25)]
    middle = [float(change[0, 22:42, 22:42].std()) for change in changes]
    # Counts of the rays through the middle: 93 detector elements and 143 views, 30 cm of water.
    counts = 850 * 93**2 / 143 * math.exp(-5.8)
    expected = [(1 - dose) / (dose * counts) + 11 * (1 - dose**2) / (dose * counts) ** 2 for dose in (0.5, 0.25)]
    assert middle[1] / middle[0] == pytest.approx(math.sqrt(expected[1] / expected[0]), rel=0.15)
    assert middle[0] > 2 * float(changes[0][0, :6, :6].std())
    fine = projection.low_dose(disc(96), 0.25, generator())[0, 33:63, 33:63].std()
    assert float(fine) == pytest.approx(middle[1], rel=0.2)
    bar = torch.zeros(1, 32, 32)
    bar[:, 2:30, 2:10] = 1.0
    volume = torch.stack([bar, bar * 0.01], dim=-1)
    change = projection.low_dose(volume, 0.5, generator()) - volume
    assert change[..., 0].std() > 2 * change[..., 1].std()
    assert change[:, :, :12, 0].std() > 1.5 * change[:, :, 20:, 0].std()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_slices_lie_across_the_axis_that_is_named(axis: int) -> None:
    last = torch.rand(1, 20, 18, 4, generator=torch.Generator().manual_seed(0))
    turned = last.movedim(-1, axis % 3 + 1)
    for change in (
        lambda signal, axis: projection.low_dose(signal, 0.2, generator(), axis),
        lambda signal, axis: picture.compression(signal, 20, color=False, axis=axis),
    ):
        torch.testing.assert_close(change(turned, axis).movedim(axis % 3 + 1, -1), change(last, -1))


def test_stain_moves_the_densities_of_scikit_image_and_is_reversible() -> None:
    rng = generator(1)
    colors = torch.from_numpy(np.stack([rng.uniform(0.5, 0.9, (6, 6)) for _ in range(3)])).float()
    torch.testing.assert_close(picture.stain(colors, 0.0, generator()), colors, atol=1e-5, rtol=0)
    after = picture.stain(colors, 0.3, generator(2))
    draws = generator(2)
    factors, shifts = draws.uniform(-1, 1, 3), draws.uniform(-1, 1, 3)
    factors, shifts = 1 + 0.3 * factors / np.abs(factors).max(), 0.03 * shifts
    before, got = (rgb2hed(value.numpy().transpose(1, 2, 0)) for value in (colors, after))
    # scikit-image measures density in units of -log(1e-6), and cuts off what is negative.
    expected = before * factors + shifts / -math.log(1e-6)
    seen = (before > 0).all(-1) & (expected > 0).all(-1) & (after < 1).all(0).numpy()
    assert seen.sum() > 3
    np.testing.assert_allclose(got[seen], expected[seen], atol=2e-4)


def test_compression_of_colors_and_of_slices() -> None:
    colors = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(
        picture.compression(colors, 50, color=True), picture.compression(colors, 50, color=False), atol=0.01
    )
    volume = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0)) * 1.5
    after = picture.compression(volume, 30, color=False)
    torch.testing.assert_close(after[1:, ..., 2], picture.compression(volume[1:, ..., 2], 30, color=False))
    assert float((after - volume).abs().mean()) < 0.2
    bright = torch.full((1, 16, 16), 1.4)
    torch.testing.assert_close(picture.compression(bright, 30, color=False), bright, atol=0.01, rtol=0)
