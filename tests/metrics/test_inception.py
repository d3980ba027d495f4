from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from medgen.metrics import frechet_distance_from_features, published_name
from medgen.metrics.inception import InceptionFeatures, InceptionV3, resize_as_tensorflow1
from medgen.types import BadInputError

# Of torch-fidelity 0.4.0 (FeatureExtractorInceptionV3, layer 2048) with the weights of `fill_weights` on the 8-bit
# pictures of `smooth_scans`: every 256th feature of the first, the sums of both, and the FID of 4 pictures and their
# squares. The real weights can neither be shipped nor fetched.
GOLDEN_FEATURES = [0.0, 0.05358046, 0.25873405, 0.31132704, 0.2593843, 3.11281824, 0.06247603, 0.23554575]
GOLDEN_SUMS = [2957.27307072, 3267.39887287]
GOLDEN_FID = 357.83798609350913


@pytest.fixture(scope="module")
def weights(
    tmp_path_factory: pytest.TempPathFactory, fill_weights: Callable[[nn.Module], dict[str, torch.Tensor]]
) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(fill_weights(InceptionV3()), path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> InceptionFeatures:
    return InceptionFeatures(weights, in_channels=3)


def test_features_equal_those_of_torch_fidelity(
    network: InceptionFeatures, smooth_scans: Callable[..., torch.Tensor]
) -> None:
    features = network(smooth_scans(2, 3, 40, 56))
    assert features.shape == (2, 1, 2048)
    assert features[0, 0, ::256].tolist() == pytest.approx(GOLDEN_FEATURES, abs=2e-5)
    assert features.sum(dim=(1, 2)).tolist() == pytest.approx(GOLDEN_SUMS, rel=1e-5)


def test_the_frechet_distance_equals_the_fid_of_torch_fidelity(
    network: InceptionFeatures, smooth_scans: Callable[..., torch.Tensor]
) -> None:
    pictures = smooth_scans(4, 3, 40, 56)
    value = frechet_distance_from_features(network(pictures)[:, 0], network(pictures**2)[:, 0]).item()
    assert value == pytest.approx(GOLDEN_FID, rel=1e-6)


def test_rounds_intensities_to_eight_bits(
    network: InceptionFeatures, smooth_scans: Callable[..., torch.Tensor]
) -> None:
    levels = (smooth_scans(1, 3, 32, 32) * 255).round()
    assert torch.equal(network(levels / 255), network(((levels + 0.4) / 255).clamp(max=1)))


def test_gray_scans_are_pictures_of_three_equal_channels(weights: Path, network: InceptionFeatures) -> None:
    gray = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    features = InceptionFeatures(weights)(gray)
    assert torch.allclose(features, network(gray.expand(-1, 3, -1, -1)), atol=1e-5)


def test_resizes_as_tensorflow_1_did() -> None:
    # tf.compat.v1.image.resize_bilinear of [1, 2, 4] to 6 columns, by its formula: column i lies at i / 2.
    image = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3).expand(-1, -1, 3, -1)
    assert resize_as_tensorflow1(image, 6)[0, 0, 0].tolist() == [1, 1.5, 2, 3, 4, 4]
    assert torch.equal(resize_as_tensorflow1(image.mT, 6), resize_as_tensorflow1(image, 6).mT)
    assert resize_as_tensorflow1(torch.arange(8.0).view(1, 1, 1, 8).expand(-1, -1, 8, -1), 4)[0, 0, 0].tolist() == [
        0,
        2,
        4,
        6,
    ]


def test_only_pictures_have_a_fid(weights: Path, network: InceptionFeatures) -> None:
    assert published_name("frechet", network) == "FID"
    assert published_name("kernel", network) == "KID"
    assert published_name("gaussian_kernel", network) == "Gaussian kernel distance (inception)"
    volumes = InceptionFeatures(weights, spatial_dims=3)
    assert volumes.views == ("sagittal", "coronal", "axial")
    assert published_name("frechet", volumes) == "Fréchet distance (inception)"


def test_refuses_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(
        BadInputError,
        match=r"other\.pth \(Inception-v3 of FID\): .* missing \(Conv2d_1a_3x3.*1 of another shape \(fc\.w",
    ):
        InceptionFeatures(path)
