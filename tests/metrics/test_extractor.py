import json

import pytest
import torch
from torch import nn

from medgen.metrics import (
    EfficientNetLite0Features,
    FeatureExtractor,
    FrechetDistance,
    ModuleFeatures,
    build_extractor,
    published_name,
    stamp,
)
from medgen.metrics.extractor import sha256_state_dict, wrap_module
from medgen.types import BadInputError


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_module_runs_in_eval_mode_and_keeps_its_own() -> None:
    network = _network().train()
    network[2].eval()  # a mode that the user set for one part only
    extractor = ModuleFeatures(network, name="mine", preprocessing={"resize": "none"})
    image = torch.rand(5, 1, 8, 8)
    assert extractor.num_features is None
    features = extractor(image)
    assert features.shape == (5, 1, 4)
    assert extractor.num_features == 4
    assert torch.equal(features[:, 0], _network().eval()(image))
    assert [part.training for part in network] == [True, True, False, True, True]
    assert not features.requires_grad


def test_is_stamped_with_name_hash_and_preprocessing() -> None:
    extractor = ModuleFeatures(_network(), name="mine", preprocessing={"resize": "none"}, num_features=4)
    assert isinstance(extractor, FeatureExtractor)
    record = json.loads(json.dumps(stamp(extractor)))
    assert record == {
        "name": "mine",
        "weights_sha256": sha256_state_dict(_network()),
        "num_features": 4,
        "views": ["image"],
        "preprocessing": {"resize": "none"},
    }
    assert len(record["weights_sha256"]) == 64
    default = stamp(EfficientNetLite0Features())
    assert json.loads(json.dumps(default))["preprocessing"]["image_size"] == 224


def test_the_hash_sees_values_names_types_and_shapes() -> None:
    one = nn.Linear(2, 3)
    digests = {sha256_state_dict(one)}
    with torch.no_grad():
        one.weight[0, 0] += 1
    digests |= {sha256_state_dict(one), sha256_state_dict(one.double()), sha256_state_dict(nn.Sequential(one))}
    zeros = nn.Module()
    for dtype in (torch.int32, torch.float32):  # equal bytes
        zeros.register_buffer("value", torch.zeros(3, dtype=dtype))
        digests.add(sha256_state_dict(zeros))
    assert len(digests) == 6
    assert sha256_state_dict(_network().bfloat16()) == sha256_state_dict(_network().bfloat16())


def test_an_extractor_is_not_wrapped_again() -> None:
    extractor = EfficientNetLite0Features()
    assert wrap_module(extractor) is extractor
    wrapped = wrap_module(nn.Flatten(), num_features=3, num_views=2)
    assert isinstance(wrapped, ModuleFeatures)
    assert (wrapped.name, wrapped.num_features, wrapped.views) == ("Flatten", 3, ("view 0", "view 1"))
    assert isinstance(FrechetDistance(nn.Flatten(), num_features=3).feature, ModuleFeatures)


def test_builds_by_name() -> None:
    extractor = build_extractor("efficientnet-lite0", spatial_dims=3, in_channels=2, image_size=32, slices_per_plane=2)
    assert isinstance(extractor, EfficientNetLite0Features)
    assert len(extractor.views) == 6


def test_names_of_published_distances_are_kept_for_their_features() -> None:
    extractor = EfficientNetLite0Features()
    assert published_name("frechet", extractor) == "Fréchet distance (efficientnet-lite0)"
    assert published_name("kernel", extractor) == "Kernel distance (efficientnet-lite0)"
    assert published_name("coverage", extractor) == "Coverage (efficientnet-lite0)"
    clip = ModuleFeatures(nn.Flatten(), name="clip-vit-large-patch14-336")
    assert published_name("gaussian_kernel", clip) == "CMMD"
    assert published_name("gaussian_kernel", extractor) == "Gaussian kernel distance (efficientnet-lite0)"


def test_refuses_bad_names_and_missing_weights() -> None:
    with pytest.raises(BadInputError, match=r"feature: expected one of efficientnet-lite0, inception, .*got 'dino'"):
        build_extractor("dino")
    for name in ("inception", "radimagenet", "medicalnet"):
        with pytest.raises(BadInputError, match=f"{name}: expected a local weight file, got none. Pass weights=PATH"):
            build_extractor(name)
    with pytest.raises(BadInputError, match="efficientnet-lite0: expected no weights"):
        build_extractor("efficientnet-lite0", weights="x.pth")
    with pytest.raises(ValueError, match=r"expected output \(B, D\) or \(B, V, D\) for 2 scans, got \(2, 1, 4, 4\)"):
        ModuleFeatures(nn.Identity())(torch.zeros(2, 1, 4, 4))
