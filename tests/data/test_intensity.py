"""Intensity maps, against NumPy and analytic cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgen.data.intensity import IntensityMap, Normalization
from medgen.types import BadInputError


def scan(channels: int = 2) -> torch.Tensor:
    noise = torch.randn(channels, 9, 10, 11, generator=torch.Generator().manual_seed(0))
    gain = torch.tensor([40.0, 3.0, 700.0])[:channels].view(-1, 1, 1, 1)
    return noise * gain + 2 * gain


def test_percentiles_of_each_channel_land_on_the_ends() -> None:
    image = scan()
    model = Normalization().fit(image).forward(image)
    for channel, values in zip(model, image, strict=True):
        low, high = np.percentile(values.numpy(), [0.5, 99.5])
        expected = np.clip(2 * (values.numpy() - low) / (high - low) - 1, -1, 1)
        np.testing.assert_allclose(channel.numpy(), expected, atol=1e-5)


def test_one_map_for_all_channels_keeps_color_balance() -> None:
    image = scan(3)
    fitted = Normalization(low=0, high=100, per_channel=False).fit(image)
    assert len(set(fitted.scale)) == 1 and len(fitted.scale) == 3
    model = fitted.forward(image)
    assert float(model.min()) == pytest.approx(-1) and float(model.max()) == pytest.approx(1)
    contrast = (image[0] - image[2]) / (image.max() - image.min()) * 2
    torch.testing.assert_close(model[0] - model[2], contrast, atol=1e-5, rtol=0)


def test_a_window_is_the_same_for_every_scan_and_clips() -> None:
    normalization = Normalization("window", low=-160, high=240)
    image = torch.tensor([-1000.0, -160, 40, 240, 3000]).view(1, 5, 1)
    fitted = normalization.fit(image)
    torch.testing.assert_close(fitted.forward(image).flatten(), torch.tensor([-1.0, -1, 0, 1, 1]))
    assert fitted == normalization.fit(image + 17)


def test_zscore_fills_the_range_with_three_standard_deviations() -> None:
    image = scan(1)
    model = Normalization("zscore").fit(image).forward(image)
    expected = np.clip((image.numpy() - image.numpy().mean()) / image.numpy().std() / 3, -1, 1)
    np.testing.assert_allclose(model.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["percentile", "window", "zscore"])
def test_the_inverse_gives_source_units_back(method: str) -> None:
    image = scan(3)
    low, high = (0.0, 100.0) if method == "percentile" else (-1e4, 1e4)
    fitted = Normalization(method, low=low, high=high).fit(image)
    inside = fitted.forward(image).abs() < 1
    torch.testing.assert_close(fitted.inverse(fitted.forward(image))[inside], image[inside], atol=1e-2, rtol=1e-4)


def test_a_narrow_range_far_from_zero_keeps_its_levels() -> None:
    image = (torch.arange(64) + 1_700_000).float().view(1, 8, 8)
    fitted = Normalization(low=0, high=100).fit(image)
    model = fitted.forward(image).flatten()
    torch.testing.assert_close(model, torch.linspace(-1, 1, 64), atol=1e-6, rtol=0)
    assert torch.equal(fitted.inverse(fitted.forward(image)), image)


def test_a_map_refuses_another_number_of_channels() -> None:
    with pytest.raises(ValueError, match=r"expected 2 channels first, got shape \(3, 4, 4\)"):
        IntensityMap((1.0, 1.0), (0.0, 0.0)).forward(torch.zeros(3, 4, 4))


@pytest.mark.parametrize("method", ["percentile", "window", "zscore"])
def test_a_constant_image_is_refused(method: str) -> None:
    with pytest.raises(BadInputError, match="image: expected varying intensities, got the constant 5"):
        Normalization(method).fit(torch.full((1, 4, 4), 5.0))


def test_a_constant_channel_is_named() -> None:
    image = scan(3)
    image[1] = 0
    with pytest.raises(BadInputError, match="channel 1: expected varying intensities, got the constant 0"):
        Normalization().fit(image)


def test_percentiles_that_coincide_are_refused_with_the_remedy() -> None:
    image = torch.zeros(1, 40, 40)
    image[0, 3, 4] = 9
    with pytest.raises(BadInputError, match=r"got 0 for both. Set wider percentiles \(0 and 100\)"):
        Normalization().fit(image)
    assert Normalization(low=0, high=100).fit(image).forward(image)[0, 3, 4] == 1


def test_a_scan_outside_the_window_is_refused() -> None:
    with pytest.raises(BadInputError, match="expected intensities inside the window -160 to 240, got 1000 to 1063"):
        Normalization("window", low=-160, high=240).fit(torch.arange(1000.0, 1064).view(1, 8, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    image = scan(1)
    image[0, 1, 2, 3] = value
    with pytest.raises(BadInputError, match="expected finite intensities, got NaN or infinity"):
        Normalization().fit(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "minmax"}, "expected percentile, window or zscore, got 'minmax'"),
        ({"low": 99.0, "high": 1.0}, "expected low < high, got low 99.0, high 1.0"),
        ({"low": -5.0}, "expected percentiles in 0-100"),
        ({"method": "window", "low": 3.0, "high": 3.0}, "expected low < high"),
    ],
)
def test_settings_that_bound_no_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalization(**arguments)
