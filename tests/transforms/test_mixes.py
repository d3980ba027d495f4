"""Mixes of two samples of a batch: MixUp, CutMix, SnapMix, bidirectional copy-paste."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.transforms import Compose, CutMix, MixUp
from scipy import stats

from medgen.transforms.copy_paste import RandBidirectionalCopyPaste, RandBidirectionalCopyPasted
from medgen.transforms.cutmix import RandCutMix, RandCutMixd
from medgen.transforms.mixing import Mix, draw_box, inside
from medgen.transforms.mixup import RandMixUp, RandMixUpd
from medgen.transforms.snapmix import RandSnapMixd
from medgen.types import BadInputError

SHAPES = [(16, 12), (8, 9, 7)]
K = 4


def flat_map(image, classes):
    return torch.ones(len(image), *image.shape[2:])


# One of each, as the dictionary version, with the label map where it takes one, else with classes.
MIXES = {
    "mixup": lambda **more: RandMixUpd("image", "label", K, **more),
    "cutmix": lambda **more: RandCutMixd("image", "label", K, **more),
    "snapmix": lambda **more: RandSnapMixd("image", "label", flat_map, K, **more),
    "copy_paste": lambda **more: RandBidirectionalCopyPasted("image", "label", K, **more),
}


def batch(shape, count=6, seed=0, classes=False):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, K, (count,) if classes else (count, 1, *shape), generator=generator)
    return {"image": torch.rand(count, 2, *shape, generator=generator), "label": label}


def marked(shape, count=6):
    """Images that say of each voxel from which sample it is."""
    return torch.arange(count, dtype=torch.float32).reshape(-1, 1, *[1] * len(shape)).expand(-1, 1, *shape).clone()


def one_hot(label):
    hot = np.eye(K, dtype=np.float32)[label.numpy()]
    return torch.from_numpy(hot if label.ndim == 1 else np.moveaxis(hot[:, 0], -1, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [False, True])
def test_mixup_is_the_weighted_sum_that_it_records(shape, classes):
    data = batch(shape, classes=classes)
    mix = RandMixUpd("image", "label", K).set_random_state(1)
    result = mix(data)
    partner = list(mix.last.partner)
    assert sorted(partner) == list(range(6)) and all(row != other for row, other in enumerate(partner))
    hot = one_hot(data["label"])
    for row, (other, lam) in enumerate(zip(partner, mix.last.lam, strict=True)):
        for key, values in {"image": data["image"], "label": hot}.items():
            torch.testing.assert_close(result[key][row], lam * values[row] + (1 - lam) * values[other])
    assert result["label"].dtype == torch.float32
    torch.testing.assert_close(result["label"].sum(1), torch.ones_like(result["label"].sum(1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_mixup_of_images_is_that_of_monai(shape):
    data = batch(shape)
    mix = RandMixUp(K).set_random_state(3)
    image, _ = mix(data["image"], data["label"])
    oracle = MixUp(batch_size=6)
    oracle._params = (torch.tensor(mix.last.lam, dtype=torch.float32), np.array(mix.last.partner), [])
    torch.testing.assert_close(image, oracle.apply(data["image"]))


def test_one_hot_and_weighted_labels_are_mixed_as_they_are():
    data = batch((8, 8))
    hot = {**data, "label": one_hot(data["label"])}
    mixes = [RandMixUpd("image", "label", k).set_random_state(1) for k in (K, None)]
    torch.testing.assert_close(mixes[0](data)["label"], mixes[1](hot)["label"])
    weights = torch.tensor([[0.2, 0.8], [1.0, 1.0]])
    mix = RandMixUp().set_random_state(0)
    _, target = mix(data["image"][:2], weights)
    torch.testing.assert_close(target[0], mix.last.lam[0] * weights[0] + (1 - mix.last.lam[0]) * weights[1])


@pytest.mark.parametrize("alpha", [0.4, 2.0])
def test_lambda_has_the_beta_distribution(alpha):
    image, label = torch.zeros(3000, 1, 2, 2), torch.zeros(3000, dtype=torch.int64)
    for mix in (RandMixUp(2, alpha), RandCutMix(2, alpha)):
        mix.set_random_state(5)(image, label)
        assert stats.kstest(mix.last.lam, stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_cutmix_pastes_the_box_that_it_records_and_counts_its_voxels(shape):
    image = marked(shape, 40)
    classes = torch.arange(40) % K
    mix = RandCutMix(K).set_random_state(2)
    mixed, target = mix(image, classes)
    for row in range(40):
        partner, box = mix.last.partner[row], mix.last.boxes[row]
        expected = image[row].clone()
        expected[inside(box)] = partner
        assert torch.equal(mixed[row], expected)
        # What the target says is counted in the mixed image, not taken from the box.
        wanted = torch.zeros(K)
        for sample in (row, partner):
            wanted[classes[sample]] += (mixed[row] == sample).sum() / mixed[row].numel()
        torch.testing.assert_close(target[row], wanted)
        for length, (start, stop) in zip(shape, box, strict=True):
            side = max(1, round(length * (1 - mix.last.lam[row]) ** (1 / len(shape))))
            assert 0 <= start < stop <= length
            assert stop - start == side or start == 0 or stop == length
    assert any(start == 0 or stop == shape[0] for ((start, stop), *_) in mix.last.boxes)
    torch.testing.assert_close(target.sum(1), torch.ones(40))


def test_boxes_lie_evenly_and_are_clipped_at_the_border():
    state = np.random.RandomState(0)
    covered = np.zeros(32)
    for _ in range(4000):
        ((start, stop),) = draw_box(state, (32,), 0.25)
        covered[start:stop] += 1
    # A side of 8 covers a voxel from 8 centers, but from 5 and 4 at the ends, where the others lie outside.
    expected = np.array([5, 6, 7, *[8] * 25, 7, 6, 5, 4]) / 32
    np.testing.assert_allclose(covered / 4000, expected, atol=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_cutmix_pastes_label_maps_hard(shape):
    data = batch(shape)
    data["image"] = data["label"].float()
    result = RandCutMixd("image", "label").set_random_state(0)(data)
    assert result["label"].dtype == data["label"].dtype
    assert torch.equal(result["image"], result["label"].float())
    assert not torch.equal(result["label"], data["label"])
    hot = RandCutMixd("image", "label", K).set_random_state(0)({**data, "label": one_hot(data["label"])})
    assert torch.equal(hot["label"], one_hot(result["label"]))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_cutmix_pastes_what_that_of_monai_pastes_into_the_same_box():
    image = torch.rand(2, 1, 16, 16)
    box = ((3, 11), (6, 14))
    mix = RandCutMix(K)
    mix.last = Mix((16, 16), (1, 0), (0.75, 0.75), (0.75, 0.75), (0.25, 0.25), boxes=(box, box))
    mixed, target = mix(image, torch.tensor([0, 1]), randomize=False)
    oracle = CutMix(batch_size=2)
    oracle._params = (torch.tensor([0.75, 0.75]), np.array([1, 0]), [3, 6])
    assert torch.equal(mixed, oracle.apply(image))
    assert torch.equal(target, torch.tensor([[0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0]]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pairing", ["random", "halves"])
def test_copy_paste_swaps_a_box_so_that_doing_it_again_brings_everything_back(shape, pairing):
    data = batch(shape)
    mix = RandBidirectionalCopyPaste(K, pairing=pairing).set_random_state(4)
    image, label = mix(data["image"], data["label"])
    again = mix(image, label, randomize=False)
    assert torch.equal(again[0], data["image"]) and torch.equal(again[1], data["label"])
    sizes = [round(2 / 3 * length) for length in shape]
    assert all([stop - start for start, stop in box] == sizes for box in mix.last.boxes)
    origin, _ = mix(marked(shape), data["label"], randomize=False)
    for row, partner in enumerate(mix.last.partner):
        assert (origin[row] == partner).sum() == math.prod(sizes)
        assert (origin[row] == row).sum() == math.prod(shape) - math.prod(sizes)
        assert torch.equal(label[row], torch.where(origin[row] == row, data["label"][row], data["label"][partner]))
        assert pairing == "random" or (row < 3) != (partner < 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_copy_paste_weighs_classes_by_the_voxels_that_it_swaps(shape):
    image = marked(shape, 7)
    classes = torch.arange(7) % K
    mix = RandBidirectionalCopyPaste(K).set_random_state(2)
    mixed, target = mix(image, classes)
    for row, partner in enumerate(mix.last.partner):
        wanted = torch.zeros(K)
        for sample in {row, partner}:
            wanted[classes[sample]] += (mixed[row] == sample).sum() / mixed[row].numel()
        torch.testing.assert_close(target[row], wanted)
    assert sum(row == partner for row, partner in enumerate(mix.last.partner)) == 1
    hot = mix(image, one_hot(classes), randomize=False)[1]
    assert torch.equal(hot, target) and target.dtype == torch.float32
    with pytest.raises(BadInputError, match="expected num_classes"):
        RandBidirectionalCopyPaste()(image, classes)


def test_copy_paste_leaves_one_scan_of_an_odd_batch():
    data = batch((8, 8), 5)
    mix = RandBidirectionalCopyPasted("image", "label").set_random_state(0)
    result = mix(data)
    (left,) = [row for row, partner in enumerate(mix.last.partner) if row == partner]
    assert torch.equal(result["image"][left], data["image"][left])


@pytest.mark.parametrize("name", MIXES)
def test_draws_depend_on_the_seed_alone_and_can_be_replayed(name):
    data = batch((8, 9, 7), classes=name == "snapmix")
    given = {key: value.clone() for key, value in data.items()}
    torch_state = torch.get_rng_state()
    first, second = (MIXES[name]() for _ in range(2))
    Compose([first]).set_random_state(11)
    Compose([second]).set_random_state(11)
    result = first(data)
    repeated = second(data)
    assert first.last == second.last
    changed = first(data)
    assert first.last != second.last
    fresh = MIXES[name]()
    fresh.last = second.last
    for other in (repeated, fresh(data, randomize=False)):
        assert all(torch.equal(result[key], other[key]) for key in data)
    assert not torch.equal(changed["image"], result["image"])
    assert all(torch.equal(data[key], given[key]) for key in data)
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("name", MIXES)
def test_prob_says_how_many_samples_are_mixed_and_the_others_stay(name):
    data = batch((4, 4), 400, classes=name == "snapmix")
    mix = MIXES[name](prob=0.3).set_random_state(0)
    result = mix(data)
    mixed = set(mix.last.rows)
    assert 0.2 < len(mixed) / 400 < 0.4
    for row in sorted(set(range(400)) - mixed):
        assert torch.equal(result["image"][row], data["image"][row])
        assert not mix.last.boxes or mix.last.boxes[row] == ((0, 0), (0, 0))
        assert (mix.last.lam[row], mix.last.own[row], mix.last.other[row]) == (1, 1, 0)
    never = MIXES[name](prob=0)(data)
    assert torch.equal(never["image"], data["image"])
    hard = name in ("cutmix", "copy_paste")
    assert torch.equal(never["label"], data["label"] if hard else one_hot(data["label"]))


@pytest.mark.parametrize("name", MIXES)
def test_affines_and_further_keys_are_kept(name):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    classes = name == "snapmix"
    samples = [
        {"image": MetaTensor(torch.rand(1, 6, 6, 6), affine=affine), "case": f"case {row}"}
        | {"label": row % K if classes else MetaTensor(torch.full((1, 6, 6, 6), float(row % K)), affine=affine)}
        for row in range(4)
    ]
    data = list_data_collate(samples)
    result = MIXES[name]()(data)
    assert isinstance(result["image"], MetaTensor) and result["case"] == data["case"]
    assert torch.equal(result["image"].affine, data["image"].affine)
    assert result["image"].shape == data["image"].shape
    if not classes:
        assert isinstance(result["label"], MetaTensor)
        assert torch.equal(result["label"].affine, data["label"].affine)


def test_all_images_get_the_same_mix():
    data = batch((8, 8))
    data["second"] = data["image"][:, :1] + 10
    result = RandCutMixd(["image", "second"], "label").set_random_state(0)(data)
    torch.testing.assert_close(result["second"], result["image"][:, :1] + 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandMixUpd("image", "label", K, alpha=0), "expected alpha above 0, got 0"),
        (lambda: RandCutMixd("image", "label", K, alpha=-1), "expected alpha above 0, got -1"),
        (lambda: RandSnapMixd("image", "label", flat_map, K, alpha=math.nan), "expected alpha above 0, got nan"),
        (lambda: RandBidirectionalCopyPasted("image", "label", beta=1), r"expected beta in \(0, 1\), got 1"),
        (lambda: RandBidirectionalCopyPasted("image", "label", pairing="all"), "expected pairing 'random' or 'halves'"),
        (lambda: RandMixUp(K, prob=1.5), r"expected prob in \[0, 1\], got 1.5"),
        (lambda: RandMixUp(1), "expected num_classes of 2 or more"),
        (lambda: RandMixUpd(["image", "label"], "label"), "only images in keys, got 'label'"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(BadInputError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cutmix", lambda d: {key: value[:1] for key, value in d.items()}, "expected a batch of 2 or more, got 1"),
        ("mixup", lambda d: d | {"label": d["label"] + 1}, r"expected classes in \[0, 4\), got 1 to 4: raise num_"),
        ("cutmix", lambda d: d | {"label": d["label"] - 1}, r"expected classes in \[0, 4\), got -1 to 2"),
        ("copy_paste", lambda d: d | {"label": d["label"] + 1}, r"expected classes in \[0, 4\)"),
        ("mixup", lambda d: d | {"label": d["label"] + 0.5}, "got broken numbers: resample label maps by nearest"),
        ("cutmix", lambda d: d | {"label": d["label"][..., :-1]}, r"images' spatial shape \(8, 8\).*\(6, 1, 8, 7\)"),
        ("cutmix", lambda d: d | {"label": d["label"][:, 0]}, "expected the label of the images' spatial shape"),
        ("cutmix", lambda d: d | {"label": d["label"][:5]}, "a label for each of the 6 images"),
        ("cutmix", lambda d: d | {"label": torch.tensor(1)}, "a label for each of the 6 images"),
        ("mixup", lambda d: d | {"label": torch.zeros(6, 1)}, "expected weights of 4 classes, got shape.*without an"),
        ("mixup", lambda d: d | {"label": torch.full((6, K), 1.5)}, r"expected weights in \[0, 1\]"),
        ("mixup", lambda d: d | {"image": d["image"].to(torch.uint8)}, "of a floating type, got torch.uint8"),
        ("mixup", lambda d: d | {"image": d["image"][0]}, r"expected 'image' of shape \(B, C, H, W\[, D\]\)"),
        ("mixup", lambda d: d | {"image": d["image"].numpy()}, "use the mix after the DataLoader"),
        ("mixup", lambda d: {"image": d["image"]}, r"expected the label 'label', got only \['image'\]"),
        ("snapmix", lambda d: d | {"label": torch.full((6, K), 0.25)}, "one class for each sample, got soft"),
    ],
)
def test_bad_batches_are_refused(name, change, message):
    with pytest.raises(BadInputError, match=message):
        MIXES[name]()(change(batch((8, 8))))


def test_other_bad_input_is_refused():
    data = batch((8, 8))
    with pytest.raises(BadInputError, match="expected num_classes"):
        RandMixUpd("image", "label")(data)
    with pytest.raises(BadInputError, match="images of one shape"):
        RandMixUpd(["image", "second"], "label", K)(data | {"second": data["image"][..., 1:]})
    with pytest.raises(BadInputError, match="an even batch to pair its halves, got 5"):
        RandBidirectionalCopyPasted("image", "label", pairing="halves")(batch((8, 8), 5))
    with pytest.raises(BadInputError, match="a draw to replay, got none"):
        RandMixUpd("image", "label", K)(data, randomize=False)
    mix = RandCutMixd("image", "label")
    mix(data)
    with pytest.raises(BadInputError, match=r"a batch of 6 scans of shape \(8, 8\), got 4 of \(8, 8\)"):
        mix(batch((8, 8), 4), randomize=False)
    with pytest.raises(BadInputError, match=r"got 6 of \(9, 8\)"):
        mix(batch((9, 8)), randomize=False)
