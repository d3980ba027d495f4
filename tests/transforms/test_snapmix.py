"""SnapMix: targets weighted by class activation maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.visualize import CAM, GradCAM
from scipy import stats
from skimage.transform import resize

from medgen.transforms.mixing import inside
from medgen.transforms.snapmix import RandSnapMix, RandSnapMixd
from medgen.types import BadInputError

SHAPES = [(16, 12), (8, 9, 7)]
K = 4


def flat_map(image, classes):
    return torch.ones(len(image), *image.shape[2:])


def batch(shape, count=6):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, K, (count,), generator=generator)
    return {"image": torch.rand(count, 2, *shape, generator=generator), "label": label}


@pytest.mark.parametrize("shape", SHAPES)
def test_snapmix_weighs_labels_by_the_percent_maps_of_the_boxes(shape):
    maps = torch.rand(6, 1, *shape) * 5 - 2
    data = batch(shape)
    mix = RandSnapMixd("image", "label", lambda image, classes: maps, K).set_random_state(7)
    target = mix(data)["label"]
    percent = maps[:, 0].numpy().astype(np.float64)
    percent -= percent.min(axis=tuple(range(1, percent.ndim)), keepdims=True)
    percent /= percent.sum(axis=tuple(range(1, percent.ndim)), keepdims=True)
    for row, partner in enumerate(mix.last.partner):
        own = 1 - percent[row][inside(mix.last.boxes[row])].sum()
        other = percent[partner][inside(mix.last.sources[row])].sum()
        wanted = np.zeros(K)
        wanted[data["label"][row]] += own
        wanted[data["label"][partner]] += other
        np.testing.assert_allclose(target[row], wanted, atol=1e-6)
    assert not np.allclose(target.sum(1), 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_snapmix_with_a_constant_map_weighs_by_voxels_and_resizes_as_scikit_image(shape):
    data = batch(shape)
    mix = RandSnapMix(flat_map, K).set_random_state(1)
    image, _ = mix(data["image"], data["label"])
    for row, partner in enumerate(mix.last.partner):
        box, source = mix.last.boxes[row], mix.last.sources[row]
        assert mix.last.own[row] == pytest.approx(1 - math.prod(b - a for a, b in box) / math.prod(shape))
        assert mix.last.other[row] == pytest.approx(math.prod(b - a for a, b in source) / math.prod(shape))
        part = data["image"][partner][inside(source)].numpy()
        size = (2, *(stop - start for start, stop in box))
        expected = data["image"][row].numpy().copy()
        expected[inside(box)] = resize(part, size, order=1, mode="edge", anti_aliasing=False)
        np.testing.assert_allclose(image[row], expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_snapmix_pastes_label_maps_hard_at_the_size_of_the_box(shape):
    label = torch.randint(0, K, (6, 1, *shape), generator=torch.Generator().manual_seed(1))
    image = batch(shape)["image"]
    mix = RandSnapMix(None, K).set_random_state(1)
    mixed, target = mix(image, label)
    assert target.dtype == label.dtype and not torch.equal(target, label)
    for row, partner in enumerate(mix.last.partner):
        box, source = mix.last.boxes[row], mix.last.sources[row]
        nearest = [
            np.floor((np.arange(stop - start) + 0.5) * (end - first) / (stop - start)).astype(int) + first
            for (start, stop), (first, end) in zip(box, source, strict=True)
        ]
        expected = label[row].numpy().copy()
        expected[inside(box)] = label[partner, 0].numpy()[np.ix_(*nearest)]
        assert np.array_equal(target[row], expected)
        share = math.prod(stop - start for start, stop in box) / math.prod(shape)
        assert (mix.last.own[row], mix.last.other[row]) == pytest.approx((1 - share, share))
    hot = torch.nn.functional.one_hot(label[:, 0], K).movedim(-1, 1).float()
    assert torch.equal(mix(image, hot, randomize=False)[1].argmax(1, keepdim=True), target)
    as_classes = RandSnapMix(flat_map, K).set_random_state(1)(image, torch.arange(6) % K)[0]
    assert torch.equal(mixed, as_classes)  # the scans do not depend on the kind of label


def test_labels_that_do_not_fit_are_refused():
    data = batch((8, 8))
    with pytest.raises(BadInputError, match="expected cam, which says where the class of a scan shows, got None"):
        RandSnapMix(None, K)(data["image"], data["label"])
    with pytest.raises(BadInputError, match=r"expected classes in \[0, 4\), got 4 to 4"):
        RandSnapMix(None, K)(data["image"], torch.full((6, 1, 8, 8), K))


def test_snapmix_draws_both_boxes_by_the_beta_distribution():
    mix = RandSnapMix(flat_map, 2, alpha=2.0).set_random_state(0)
    mix(torch.zeros(600, 1, 40, 40), torch.zeros(600, dtype=torch.int64))
    assert stats.kstest(mix.last.lam, stats.beta(2, 2).cdf).pvalue > 0.01
    for lam, box in zip(mix.last.lam, mix.last.boxes, strict=True):
        side = max(1, round(40 * math.sqrt(1 - lam)))
        assert all(stop - start == side or start == 0 or stop == 40 for start, stop in box)
    # With constant maps the weights are the shares of the two boxes, drawn alike.
    mean = [np.mean(shares) for shares in (1 - np.array(mix.last.own), mix.last.other)]
    assert mean[0] == pytest.approx(mean[1], rel=0.1)


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(2, 5, 3, 2, 1), torch.nn.BatchNorm2d(5), torch.nn.ReLU())
        self.fc = torch.nn.Linear(5, K)

    def forward(self, image):
        return self.fc(self.features(image).mean((2, 3)))


def test_snapmix_takes_the_maps_of_monai_the_right_way_up_and_leaves_the_network_alone():
    torch.manual_seed(0)
    network = Classifier().train()
    network.features[1].eval()
    data = batch((16, 12))
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def own_cam(image, classes):
        scores = torch.einsum("kc,bchw->bkhw", network.fc.weight, network.features.eval()(image))
        return (scores + network.fc.bias[:, None, None])[range(len(image)), classes]

    by_hand = RandSnapMix(own_cam, K).set_random_state(0)
    by_hand(data["image"], data["label"])
    network.train()
    network.features[1].eval()
    by_monai = RandSnapMix(CAM(network, "features", "fc"), K).set_random_state(0)
    by_monai(data["image"], data["label"])
    np.testing.assert_allclose(by_monai.last.own, by_hand.last.own, atol=1e-6)
    np.testing.assert_allclose(by_monai.last.other, by_hand.last.other, atol=1e-6)
    assert network.training and network.features.training and not network.features[1].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.grad is None for value in network.parameters())


def test_cross_entropy_takes_targets_that_do_not_sum_to_1():
    logits, target = torch.randn(5, K), torch.rand(5, K)
    by_hand = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, target), by_hand)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.ones(6, 3, 8, 8), r"expected maps \(6, \*grid\) from cam, got shape \(6, 3, 8, 8\)"),
        (torch.ones(5, 8, 8), "expected maps"),
        (None, "got type NoneType"),
        (torch.full((6, 8, 8), math.nan), "expected finite maps"),
    ],
)
def test_bad_maps_are_refused_and_leave_nothing_to_replay(maps, message):
    mix = RandSnapMix(lambda image, classes: maps, K)
    data = batch((8, 8))
    with pytest.raises(BadInputError, match=message):
        mix(data["image"], data["label"])
    assert mix.last is None


def test_maps_that_leave_gradients_are_refused():
    with pytest.raises(BadInputError, match="got GradCAM: use CAM"):
        RandSnapMix(GradCAM(Classifier(), "features"), K)
