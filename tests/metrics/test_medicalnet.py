from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from medgen.metrics import KernelDistance
from medgen.metrics.medicalnet import MedicalNetFeatures, _resnet
from medgen.types import BadInputError

# Of the network of Warvito/MedicalNet-models (MedicalNet's own, without its head) with the weights of `fill_weights` on
# two volumes of `smooth_scans`: every 64th feature of the first, and the sums of both.
GOLDEN_FEATURES = [1.1545583, 0.00497216, 1.3787533, 4.282228, 2.3375051, 7.4919772, 0.3826479, 1.8858373]
GOLDEN_SUMS = [931.1853313, 926.5543168]


def _names(blocks: list[int], *, bottleneck: bool, projects: bool) -> dict[str, torch.Tensor]:
    """Names of the weights of a ResNet, from which its kind is read."""
    names = [f"layer{layer}.{block}.conv1.weight" for layer, n in enumerate(blocks, 1) for block in range(n)]
    names += ["layer1.0.conv3.weight"] * bottleneck + ["layer2.0.downsample.0.weight"] * projects
    return dict.fromkeys(names, torch.zeros(1))


@pytest.fixture(scope="module")
def weights(
    tmp_path_factory: pytest.TempPathFactory, fill_weights: Callable[[nn.Module], dict[str, torch.Tensor]]
) -> Path:
    network, depth = _resnet(_names([1, 1, 1, 1], bottleneck=False, projects=True), "names")
    assert depth == 10
    path = tmp_path_factory.mktemp("medicalnet") / "resnet_10.pth"
    filled = {f"module.{name}": value for name, value in fill_weights(network).items()}
    torch.save({"state_dict": filled, "epoch": 7}, path)
    return path


def test_features_equal_those_of_medicalnets_own_network(
    weights: Path, smooth_scans: Callable[..., torch.Tensor]
) -> None:
    extractor = MedicalNetFeatures(weights)
    features = extractor(3 + 40 * smooth_scans(2, 1, 24, 28, 20))  # the unit of intensities does not matter
    assert features.shape == (2, 1, 512)
    assert features[0, 0, ::64].tolist() == pytest.approx(GOLDEN_FEATURES, rel=1e-3, abs=1e-4)
    assert features.sum(dim=(1, 2)).tolist() == pytest.approx(GOLDEN_SUMS, rel=1e-5)


def test_each_channel_is_a_view_and_a_constant_volume_has_features(weights: Path) -> None:
    extractor = MedicalNetFeatures(weights, in_channels=2)
    volumes = torch.rand(1, 2, 12, 12, 9, generator=torch.Generator().manual_seed(0))
    volumes[:, 1] = 5
    features = extractor(volumes)
    assert extractor.views == ("channel 0", "channel 1")
    assert torch.allclose(features[:, :1], MedicalNetFeatures(weights)(volumes[:, :1]), atol=1e-5)
    assert torch.isfinite(features).all()


def test_serves_a_metric_by_name(weights: Path) -> None:
    metric = KernelDistance("medicalnet", weights=weights, spatial_dims=3)
    volumes = torch.rand(4, 1, 9, 9, 9, generator=torch.Generator().manual_seed(0))
    metric.update(volumes[:2], real=True)
    metric.update(volumes[2:], real=False)
    assert torch.isfinite(metric.compute())


@pytest.mark.parametrize(
    ("blocks", "bottleneck", "projects", "depth"),
    [([2, 2, 2, 2], False, False, 18), ([3, 4, 6, 3], False, False, 34), ([3, 4, 6, 3], True, True, 50)],
)
def test_reads_the_depth_from_the_names_and_dilates_the_last_two_layers(
    blocks: list[int], bottleneck: bool, projects: bool, depth: int
) -> None:
    network, found = _resnet(_names(blocks, bottleneck=bottleneck, projects=projects), "names")
    assert found == depth
    with torch.no_grad():
        x = network.eval().maxpool(network.conv1(torch.rand(1, 1, 32, 32, 32)))  # type: ignore[operator]
        for layer, edge in (("layer1", 8), ("layer2", 4), ("layer3", 4), ("layer4", 4)):
            x = getattr(network, layer)(x)
            assert x.shape[2:] == (edge, edge, edge)
    assert {m.dilation[0] for m in network.layer4.modules() if isinstance(m, nn.Conv3d) and m.kernel_size[0] == 3} == {
        4
    }  # type: ignore[union-attr]


def test_refuses_other_weights_and_scans(weights: Path, tmp_path: Path) -> None:
    torch.save(_names([2, 1, 1, 1], bottleneck=False, projects=True), tmp_path / "odd.pth")
    with pytest.raises(
        BadInputError, match=r"expected a MedicalNet ResNet of depth 10, 18.*got layers of \[2, 1, 1, 1\]"
    ):
        MedicalNetFeatures(tmp_path / "odd.pth")
    torch.save(_names([1, 1, 1, 1], bottleneck=False, projects=True), tmp_path / "part.pth")
    with pytest.raises(BadInputError, match=r"part\.pth \(MedicalNet ResNet10\): .*missing \(bn1\.bias"):
        MedicalNetFeatures(tmp_path / "part.pth")
    with pytest.raises(ValueError, match="spatial_dims: expected 3, for MedicalNet sees volumes only, got 2"):
        MedicalNetFeatures(weights, spatial_dims=2)
    extractor = MedicalNetFeatures(weights)
    with pytest.raises(ValueError, match=r"image: expected shape \(B, 1, H, W, D\), got \(1, 2, 8, 8, 8\)"):
        extractor(torch.zeros(1, 2, 8, 8, 8))
    with pytest.raises(ValueError, match="image: expected finite intensities"):
        extractor(torch.full((1, 1, 8, 8, 8), float("nan")))
