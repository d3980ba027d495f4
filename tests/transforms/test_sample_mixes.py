"""Mixes of one sample with itself: YOCO, CropMix, AugMix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import (
    Compose,
    Flip,
    OneOf,
    Pad,
    RandAdjustContrast,
    RandAffine,
    RandCoarseShuffle,
    RandFlipd,
    RandGaussianNoise,
    RandGaussianNoised,
    RandRotate90d,
    RandRotated,
    RandScaleIntensity,
    RandSmoothDeform,
)
from scipy import stats

from medgen.transforms.augmix import RandAugMix, RandAugMixd
from medgen.transforms.corruption import RandCorruption
from medgen.transforms.cropmix import RandCropMix, RandCropMixd
from medgen.transforms.inner import OnImage
from medgen.transforms.mixing import inside
from medgen.transforms.yoco import RandYOCO, RandYOCOd
from medgen.types import BadInputError

SHAPES = [(11, 14), (6, 9, 7)]
K = 4
KEYS = ["image", "label"]


def noise():
    return RandGaussianNoise(prob=1, std=0.2)


MIXES = {
    "yoco": lambda **more: RandYOCOd("image", RandGaussianNoised("image", prob=1, std=0.2), "label", **more),
    "cropmix": lambda **more: RandCropMixd("image", "label", K, scale=(0.3, 1), **more),
    "cropmix by cutmix": lambda **more: RandCropMixd("image", "label", K, "cutmix", scale=(0.3, 1), **more),
    "augmix": lambda **more: RandAugMixd("image", [noise(), RandAdjustContrast(prob=1)], "label", **more),
}
ARRAYS = {
    "yoco": lambda **more: RandYOCO(noise(), **more),
    "cropmix": lambda **more: RandCropMix(transform=noise(), **more),
    "augmix": lambda **more: RandAugMix([noise(), RandAdjustContrast(prob=1)], **more),
}


def sample(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, K, (1, *shape), generator=generator)
    return {"image": torch.rand(2, *shape, generator=generator), "label": label, "case": "a"}


@pytest.mark.parametrize("shape", SHAPES)
def test_yoco_augments_each_half_of_image_and_label(shape):
    data = sample(shape)
    mix = RandYOCOd("image", RandFlipd(KEYS, prob=1, spatial_axis=1), "label").set_random_state(0)
    axes = set()
    for _ in range(12):
        result = mix(data)
        axes.add(mix.last.axis)
        for key in KEYS:
            halves = torch.tensor_split(data[key], [shape[mix.last.axis] // 2], dim=mix.last.axis + 1)
            assert torch.equal(result[key], torch.cat([half.flip(2) for half in halves], dim=mix.last.axis + 1))
            assert result[key].dtype == data[key].dtype
    assert axes == set(range(len(shape)))


@pytest.mark.parametrize(
    "build", [RandYOCO, lambda inner: RandAugMix([inner]), lambda inner: RandCropMix(transform=inner)]
)
def test_inner_transforms_that_work_in_place_do_not_reach_the_given_image(build):
    image = torch.zeros(1, 8, 8)
    assert build(lambda part: part.add_(1))(image).sum() > 0
    assert not image.any()


def test_yoco_draws_anew_for_each_half():
    image = torch.zeros(1, 8, 8)
    mix = RandYOCO(noise()).set_random_state(0)
    first, second = torch.tensor_split(mix(image), 2, dim=mix.last.axis + 1)
    assert first.std() > 0.1 and second.std() > 0.1
    assert not torch.equal(first, second)


@pytest.mark.parametrize("operation", ["mixup", "cutmix"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cropmix_mixes_the_crops_that_it_records(shape, operation):
    # Of a ramp it is known what linear interpolation makes of each crop.
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float64)
    data = {"image": torch.from_numpy(grid), "label": sample(shape)["label"]}
    mix = RandCropMixd("image", "label", K, operation, scale=(0.2, 1)).set_random_state(3)
    for _ in range(6):
        result = mix(data)
        ramps, hots = [], []
        for crop in mix.last.crops:
            where = [
                (np.arange(n) + 0.5) * (stop - start) / n + start for n, (start, stop) in zip(shape, crop, strict=True)
            ]
            clipped = [np.clip(x - 0.5, start, stop - 1) for x, (start, stop) in zip(where, crop, strict=True)]
            ramps.append(np.stack(np.meshgrid(*clipped, indexing="ij")))
            nearest = data["label"].numpy()[0][np.ix_(*[np.floor(x).astype(int) for x in where])]
            hots.append(np.moveaxis(np.eye(K)[nearest], -1, 0) if operation == "mixup" else nearest[None])
        for views, key in ((ramps, "image"), (hots, "label")):
            expected = views[0]
            for step, view in enumerate(views[1:]):
                if operation == "mixup":
                    expected = mix.last.lam[step] * expected + (1 - mix.last.lam[step]) * view
                else:
                    inner, outer = (expected, view) if mix.last.swapped[step] else (view, expected)
                    expected = outer.copy()
                    expected[inside(mix.last.boxes[step])] = inner[inside(mix.last.boxes[step])]
            np.testing.assert_allclose(result[key], expected, atol=1e-5)
    assert result["label"].dtype == (torch.float32 if operation == "mixup" else torch.int64)


@pytest.mark.parametrize("shape", [(200, 300), (60, 90, 75)])
def test_cropmix_takes_one_crop_of_each_part_of_the_scales(shape):
    mix = RandCropMixd("image", scale=(0.1, 0.5), number=[4]).set_random_state(0)
    limits = np.linspace(0.1, 0.5, 5)
    orders = set()
    for _ in range(60):
        mix.randomize(shape)
        sides = np.array([[stop - start for start, stop in crop] for crop in mix.last.crops]) / shape
        shares = sides.prod(1)
        order = np.argsort(shares)
        orders.add(tuple(order))
        assert (shares[order] > limits[:-1] * 0.97).all() and (shares[order] < limits[1:] * 1.03).all()
        ratios = sides[:, 1:] / sides[:, :1]
        assert (ratios > 0.75 * 0.97).all() and (ratios < 4 / 3 * 1.03).all()
    assert len(orders) > 10


def test_weights_of_cropmix_and_augmix_have_their_distributions():
    crops = RandCropMixd("image", number=[2], alpha=0.8).set_random_state(1)
    chains = RandAugMixd("image", [noise()], alpha=2.0).set_random_state(1)
    lam, m, first, depths = [], [], [], []
    for _ in range(1500):
        crops.randomize((8, 8))
        chains.randomize((8, 8))
        lam.append(crops.last.lam[0])
        m.append(chains.last.m)
        first.append(chains.last.weights[0])
        depths += map(len, chains.last.chains)
    assert stats.kstest(lam, stats.beta(0.4, 0.4).cdf).pvalue > 0.01
    assert stats.kstest(m, stats.beta(2, 2).cdf).pvalue > 0.01
    # One weight of three of a Dirichlet distribution.
    assert stats.kstest(first, stats.beta(2, 4).cdf).pvalue > 0.01
    assert stats.chisquare(np.bincount(depths)[1:]).pvalue > 0.01 and set(depths) == {1, 2, 3}


@pytest.mark.parametrize("shape", SHAPES)
def test_augmix_is_the_weighted_sum_of_its_chains(shape):
    def double(image):
        return 2 * image

    def add(image):
        return image + 1

    image = sample(shape)["image"]
    mix = RandAugMix([double, add], width=4, depth=(1, 5)).set_random_state(2)
    result = mix(image)
    chains = []
    for chain in mix.last.chains:
        value = image.clone()
        for position, _ in chain:
            value = [2 * value, value + 1][position]
        chains.append(value)
    assert math.isclose(sum(mix.last.weights), 1) and len(chains) == 4
    mixed = sum(weight * value for weight, value in zip(mix.last.weights, chains, strict=True))
    torch.testing.assert_close(result, mix.last.m * image + (1 - mix.last.m) * mixed)


def test_augmix_gives_all_images_the_same_chains_and_the_label_as_it_was():
    data = sample((8, 8)) | {"second": sample((8, 8))["image"]}
    result = RandAugMixd(["image", "second"], [noise()], "label").set_random_state(0)(data)
    assert torch.equal(result["image"], result["second"]) and not torch.equal(result["image"], data["image"])
    assert torch.equal(result["label"], data["label"])


@pytest.mark.parametrize("name", MIXES)
def test_draws_depend_on_the_seed_alone_and_can_be_replayed(name):
    data = sample((8, 10))
    given = {key: data[key].clone() for key in KEYS}
    torch_state = torch.get_rng_state()
    first, second = (MIXES[name]() for _ in range(2))
    Compose([first]).set_random_state(11)
    Compose([second]).set_random_state(11)
    result, repeated = first(data), second(data)
    assert first.last == second.last
    changed = first(data)
    assert first.last != second.last
    fresh = MIXES[name]()
    fresh.last = second.last
    for other in (repeated, fresh(data, randomize=False)):
        assert all(torch.equal(result[key], other[key]) for key in KEYS)
    assert not torch.equal(changed["image"], result["image"])
    assert all(torch.equal(data[key], given[key]) for key in KEYS)
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("kind", ["tensor", "numpy", "MetaTensor"])
def test_array_versions_keep_type_shape_and_affine(name, kind):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    image = sample((8, 9, 7))["image"]
    given = {"tensor": image, "numpy": image.numpy(), "MetaTensor": MetaTensor(image, affine=affine)}[kind]
    mix = ARRAYS[name]().set_random_state(5)
    result = mix(given)
    assert type(result) is type(given) and result.shape == given.shape and result.dtype == given.dtype
    assert not np.array_equal(np.asarray(result), image.numpy())
    if kind == "MetaTensor":
        assert np.array_equal(result.affine, affine)
    again = ARRAYS[name]()
    again.last = mix.last
    assert np.array_equal(np.asarray(again(given, randomize=False)), np.asarray(result))


@pytest.mark.parametrize("name", ARRAYS)
def test_array_versions_give_the_label_that_belongs_to_the_image(name):
    data = sample((8, 9, 7))
    more = {"num_classes": K} if name == "cropmix" else {}
    mix = ARRAYS[name](**more).set_random_state(5)
    image, label = mix(data["image"], data["label"])
    alone = mix(data["image"], randomize=False)
    assert torch.equal(image, alone)
    if name == "cropmix":
        inner = OnImage(noise())
        expected = RandCropMixd("image", "label", K, transform=inner).set_random_state(5)(data)
        assert torch.equal(label, expected["label"]) and torch.equal(image, expected["image"])
        assert label.shape == (K, 8, 9, 7) and not torch.equal(label.argmax(0), data["label"][0])
    else:
        assert torch.equal(label, data["label"])


@pytest.mark.parametrize(
    "build", [RandYOCO, lambda inner: RandAugMix([inner]), lambda inner: RandCropMix(K, transform=inner)]
)
def test_array_versions_refuse_to_move_anatomy_away_from_its_label(build):
    data = sample((8, 8))
    for inner in (Flip(0), RandAffine(prob=1), Compose([noise(), Flip(0)]), torch.negative):
        with pytest.raises(BadInputError, match=r"the anatomy where the label has it, got .*: use the dictionary"):
            build(inner)(data["image"], data["label"])
    with pytest.raises(TypeError, match="positional"):
        build(noise())(data["image"], data["label"], False)
    build(Flip(0))(data["image"])


def test_what_the_inner_transform_traces_does_not_reach_the_sample():
    image, label = (MetaTensor(sample((8, 8))[key], affine=np.eye(4)) for key in KEYS)
    inner = RandFlipd(KEYS, prob=1, spatial_axis=0)
    for mix in (RandYOCOd("image", inner, "label"), RandCropMixd("image", "label", K, transform=inner)):
        result = mix({"image": image, "label": label})
        for value in (image, label, result["image"], result["label"]):
            assert value.applied_operations == [] and torch.equal(value.affine, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("name", MIXES)
def test_prob_of_0_leaves_the_images_and_the_form_of_the_target(name):
    data = sample((8, 8))
    mix = MIXES[name](prob=0)
    result = mix(data)
    assert torch.equal(result["image"], data["image"]) and result["case"] == "a"
    hot = torch.from_numpy(np.moveaxis(np.eye(K, dtype=np.float32)[data["label"][0].numpy()], -1, 0))
    assert torch.equal(result["label"], hot if name == "cropmix" else data["label"])
    half = MIXES[name](prob=0.5).set_random_state(0)
    changed = sum(not torch.equal(half(data)["image"], data["image"]) for _ in range(60))
    assert 18 <= changed <= 42


def test_a_cached_dataset_does_not_freeze_them():
    for mix in MIXES.values():
        dataset = CacheDataset([sample((8, 8))], Compose([mix()]), progress=False)
        assert not torch.equal(dataset[0]["image"], dataset[0]["image"])


def test_cropmix_keeps_one_hot_labels_and_augments_views_by_the_inner_transform():
    data = sample((8, 8))
    hot = data | {"label": torch.from_numpy(np.moveaxis(np.eye(K, dtype=np.float32)[data["label"][0]], -1, 0))}
    results = [RandCropMixd("image", "label", K).set_random_state(0)(given) for given in (data, hot)]
    torch.testing.assert_close(results[0]["label"], results[1]["label"])
    flipped = RandCropMixd("image", "label", K, transform=RandFlipd(KEYS, prob=1, spatial_axis=0)).set_random_state(0)
    result = flipped(data)
    # A flip of each view is the flip of their sum.
    torch.testing.assert_close(result["image"], results[0]["image"].flip(1))
    torch.testing.assert_close(result["label"], results[0]["label"].flip(1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandCropMix(alpha=0), "expected alpha above 0, got 0"),
        (lambda: RandCropMix(operation="blend"), "expected operation 'mixup' or 'cutmix', got 'blend'"),
        (lambda: RandCropMix(number=(1, 2)), "numbers of crops of 2 or more"),
        (lambda: RandCropMix(number=()), "numbers of crops of 2 or more"),
        (lambda: RandCropMix(scale=(0, 1)), r"expected scale as \(least, largest\) in \(0, 1\]"),
        (lambda: RandCropMix(scale=(0.5, 0.2)), "expected scale as"),
        (lambda: RandAugMix([noise()], alpha=-1), "expected alpha above 0, got -1"),
        (lambda: RandAugMix([]), "expected transforms to draw from, got none"),
        (lambda: RandAugMix([noise()], width=0), "expected a width of 1 or more"),
        (lambda: RandAugMix([noise()], depth=(0, 2)), "expected depth as"),
        (lambda: RandAugMix([noise()], depth=(3, 2)), "expected depth as"),
        (lambda: RandYOCO(noise(), prob=-0.1), r"expected prob in \[0, 1\], got -0.1"),
        (lambda: RandYOCOd(KEYS, noise(), "label"), "only images in keys, got 'label'"),
        (
            lambda: RandAugMixd("image", [RandGaussianNoised("image")]),
            "array transforms, got RandGaussianNoised: give RandGaussianNoise$",
        ),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(BadInputError, match=message):
        build()


@pytest.mark.parametrize(
    "inner",
    [Flip(0), RandAffine(prob=1), RandSmoothDeform((8, 8), (4, 4)), RandCoarseShuffle(1, 2), OneOf([noise(), Flip(0)])],
)
def test_augmix_refuses_to_move_anatomy_away_from_its_label(inner):
    with pytest.raises(BadInputError, match=r"leave the anatomy where the label has it, got .*: apply it to"):
        RandAugMixd("image", [inner], "label", geometry_free=True)
    RandAugMixd("image", [inner])


def test_augmix_takes_unknown_transforms_beside_a_label_only_when_told_that_they_keep_it():
    with pytest.raises(BadInputError, match=r"known to leave the anatomy.*got negative: give geometry_free=True"):
        RandAugMixd("image", [torch.negative], "label")
    RandAugMixd("image", [torch.negative], "label", geometry_free=True)
    RandAugMixd("image", [RandScaleIntensity(0.1), RandCorruption("mri"), Compose([noise(), noise()])], "label")


@pytest.mark.parametrize(
    ("mix", "change", "message"),
    [
        (
            RandYOCOd("image", RandRotated(KEYS, 0.5, prob=1), "label"),
            {},
            "broken numbers: give it mode='nearest' for the label",
        ),
        (
            RandCropMixd("image", "label", K, transform=RandRotated(KEYS, 0.5, prob=1)),
            {},
            "broken numbers: give it mode='nearest' for the label",
        ),
        (RandYOCOd("image", RandRotate90d(KEYS, prob=1, max_k=1), "label"), {}, "of the inner transform to keep its"),
        (RandYOCO(lambda image: image[:, 1:]).inner, {}, "'image' of the inner transform to keep its shape"),
        (RandYOCOd("image", lambda data: [data]), {}, "expected a dictionary from the inner transform, got type list"),
        (RandAugMixd("image", [Pad([(0, 0), (1, 1), (0, 0)])]), {}, "the image of Pad to keep its shape"),
        (MIXES["yoco"](), {"label": torch.tensor(1)}, "leave the label out if it is a class"),
        (MIXES["augmix"](), {"label": torch.zeros(1, 8, 7)}, r"spatial shape \(8, 8\), got shape \(1, 8, 7\)"),
        (MIXES["cropmix"](), {"label": torch.full((1, 8, 8), K)}, r"expected classes in \[0, 4\), got 4 to 4"),
        (RandCropMixd("image", "label"), {}, "expected num_classes"),
        (MIXES["cropmix"](), {"image": torch.zeros(1, 8, 8, dtype=torch.int16)}, "of a floating type, got torch.int16"),
        (MIXES["augmix"](), {"image": torch.zeros(1, 8, 8, dtype=torch.int16)}, "of a floating type, got torch.int16"),
        (MIXES["yoco"](), {"image": torch.zeros(8, 8)}, r"expected 'image' of shape \(C, H, W\[, D\]\)"),
        (MIXES["yoco"](), {"image": torch.zeros(1, 1, 8), "label": torch.zeros(1, 1, 8)}, "at least 2 voxels"),
        (RandYOCOd(["image", "second"], noise()), {"second": torch.zeros(1, 8, 7)}, "images of one shape"),
    ],
)
def test_bad_samples_are_refused(mix, change, message):
    with pytest.raises(BadInputError, match=message):
        mix(sample((8, 8)) | change)


def test_a_replay_needs_a_draw_for_the_same_shape():
    mix = MIXES["yoco"]()
    with pytest.raises(BadInputError, match="a draw to replay, got none"):
        mix(sample((8, 8)), randomize=False)
    mix(sample((8, 8)))
    with pytest.raises(BadInputError, match=r"to replay a scan of shape \(8, 8\), got \(8, 9\)"):
        mix(sample((8, 9)), randomize=False)
