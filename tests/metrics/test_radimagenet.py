from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from medgen.metrics.radimagenet import RadImageNetFeatures, _resnet50
from medgen.types import BadInputError

# With the weights of `fill_weights` on two color pictures of `smooth_scans` at 224 pixels: of torchvision 0.29's
# resnet50 after the preprocessing of RadImageNet's PyTorch example, and of the network and preprocessing of
# Warvito/radimagenet-models, which MAISI uses. Every 256th feature of the first picture, and the sums of both.
GOLDEN_TORCH = [569.27325, 732.22839, 886.79852, 456.98074, 581.26874, 591.10413, 1107.52209, 379.2803]
GOLDEN_TORCH_SUMS = [1822241.8326, 1867273.8483]
GOLDEN_KERAS = [0.0, 202.37297, 4.82989073, 799.776245, 1033.42957, 78.8365936, 6.50180674, 0.0]
GOLDEN_KERAS_SUMS = [663791.453845, 720847.943165]
_CHILDREN = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


class _Authors(nn.Module):
    """The authors' file numbers the children of the network."""

    def __init__(self) -> None:
        super().__init__()
        children = dict(_resnet50(keras=False).named_children())
        ordered = [
            children[name] for name in ("conv1", "bn1", "act", "maxpool", "layer1", "layer2", "layer3", "layer4")
        ]
        self.backbone = nn.Sequential(*ordered)


@pytest.mark.parametrize("keras", [False, True])
def test_features_equal_those_of_the_networks_that_the_weights_were_published_for(
    keras: bool,
    tmp_path: Path,
    fill_weights: Callable[[nn.Module], dict[str, torch.Tensor]],
    smooth_scans: Callable[..., torch.Tensor],
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(fill_weights(_resnet50(keras=True) if keras else _Authors()), path)
    extractor = RadImageNetFeatures(path, in_channels=3)
    features = extractor(smooth_scans(2, 3, 224, 224))[:, 0]
    golden, sums = (GOLDEN_KERAS, GOLDEN_KERAS_SUMS) if keras else (GOLDEN_TORCH, GOLDEN_TORCH_SUMS)
    assert features[0, ::256].tolist() == pytest.approx(golden, rel=1e-4, abs=1e-2)
    assert features.double().sum(dim=1).tolist() == pytest.approx(sums, rel=1e-5)
    assert {m.eps for m in extractor.modules() if isinstance(m, nn.BatchNorm2d)} == {1.001e-5 if keras else 1e-5}
    assert extractor.preprocessing["layout"].startswith("converted from Keras" if keras else "PyTorch")


def test_refuses_other_weights(tmp_path: Path) -> None:
    torch.save({"backbone.0.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "part.pth")
    with pytest.raises(BadInputError, match=r"part\.pth \(ResNet50 of RadImageNet\): .*missing \(bn1\.bias"):
        RadImageNetFeatures(tmp_path / "part.pth")
    with pytest.raises(ValueError, match="image_size: expected at least 1 pixel, got 0"):
        RadImageNetFeatures(tmp_path / "part.pth", image_size=0)
