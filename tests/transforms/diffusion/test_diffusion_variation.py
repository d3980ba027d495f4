"""Variations of scans in a training loop: what changes, what stays, and that a draw can be repeated."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor, ThreadDataLoader, list_data_collate
from monai.transforms import Compose, Orientation, RandFlipd
from monai.utils import set_determinism
from nibabel.affines import voxel_sizes
from nibabel.orientations import aff2axcodes
from scipy import ndimage, stats

from medgen.data.intensity import Normalization
from medgen.generator import Generator
from medgen.generator.scans import grid_of
from medgen.synthesis import SamplingSettings, translate
from medgen.transforms import (
    RandDiffusionCompositd,
    RandDiffusionVariation,
    RandDiffusionVariationBatch,
    RandDiffusionVariationBatchd,
    RandDiffusionVariationd,
    RandLesionInsertiond,
)
from medgen.transforms.variation import Noising
from medgen.types import BadInputError, Grid

FAST: dict[str, Any] = {"num_inference_steps": 2, "precision": "fp32"}
TURNED = np.array([[0.0, -1.0, 0, 11], [-1.0, 0, 0, 5], [0, 0, 1.0, -4], [0, 0, 0, 1]])  # P, L, S


def scan(spatial_dims: int = 2, *, seed: int = 0, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth noise of 100 to 900 ``(C, *spatial)``, and a label ``(1, *spatial)`` of two boxes."""
    shape = (20, 16) if spatial_dims == 2 else (12, 16, 14)
    noise = ndimage.gaussian_filter(
        np.random.default_rng(seed).normal(size=(channels, *shape)), (0, *[1] * spatial_dims)
    )
    image = 100 + 800 * (noise - noise.min()) / np.ptp(noise)
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[(0, *[slice(2, 10)] * spatial_dims)] = 1
    label[(0, *[slice(5, 8)] * spatial_dims)] = 2
    return torch.from_numpy(image).float(), label


def rand(generator: Any, seed: int = 0, **options: Any) -> RandDiffusionVariation:
    return RandDiffusionVariation(generator, **{"prob": 1.0, **FAST, **options}).set_random_state(seed)


def sample(seed: int = 0) -> dict[str, Any]:
    image, label = scan(seed=seed)
    return {"image": image, "label": label}


def test_it_is_what_the_editing_path_makes(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(3)
    image, label = scan(3)
    transform = rand(generator, strength=(0.3, 0.6))
    made = transform(MetaTensor(image, affine=TURNED), label)
    by_hand = translate(
        generator,
        image,
        label[0].long(),
        grid=Grid(tuple(image.shape[1:]), TURNED),
        strength=transform.last.strength,
        seed=transform.last.seed,
        settings=SamplingSettings(num_inference_steps=2),
    )
    assert torch.equal(made.as_tensor(), by_hand.image)
    assert 0.3 < transform.last.strength < 0.6
    assert (made.as_tensor() - image).abs().mean() > 0.02 * image.std()


@pytest.mark.parametrize("method", ["percentile", "zscore"])
def test_any_linear_units_come_back(make_generator: Callable[..., Generator], method: Any) -> None:
    generator = make_generator(normalization=Normalization(method))
    image, label = scan()
    made = rand(generator)(image.double(), label)
    z_scored = (image.double() - image.mean()) / image.std()
    unit = (image.double() - 100) / 800
    torch.testing.assert_close(rand(generator)(z_scored, label) * image.std() + image.mean(), made, atol=0.2, rtol=0)
    torch.testing.assert_close(rand(generator)(unit, label) * 800 + 100, made, atol=0.2, rtol=0)
    assert made.std() > 20


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.uint8, np.float32])
def test_kind_and_number_type_stay(make_generator: Callable[..., Generator], kind: Any) -> None:
    image, label = scan()
    image = (image / 4).round()
    given = image.to(kind) if isinstance(kind, torch.dtype) else image.numpy()
    made = rand(make_generator())(given, label)
    assert type(made) is type(given) and made.dtype == given.dtype and made.shape == given.shape
    exact = rand(make_generator())(image, label)
    assert np.abs(np.asarray(torch.as_tensor(made).float()) - exact.numpy()).max() <= 1


def test_a_metatensor_keeps_affine_meta_and_history(make_generator: Callable[..., Generator]) -> None:
    image, label = scan(3)
    given = Orientation("LPS")(MetaTensor(image, affine=TURNED, meta={"filename_or_obj": "case.nii.gz"}))
    turned = Orientation("LPS")(MetaTensor(label, affine=TURNED))
    made = rand(make_generator(3))(given, turned)
    assert isinstance(made, MetaTensor) and torch.equal(made.affine, given.affine)
    assert made.meta["filename_or_obj"] == "case.nii.gz" and made.applied_operations == given.applied_operations
    # The same in space, whichever way the voxels are stored; MONAI turns them.
    straight = rand(make_generator(3))(MetaTensor(image, affine=TURNED), label)
    torch.testing.assert_close(Orientation("LPS")(straight).as_tensor(), made.as_tensor(), atol=0.05, rtol=0)


def test_a_scan_without_affine_lies_on_the_grid_of_the_model(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(3, orientation="LPS", spacing=(1.0, 1.5, 1.0))
    image, label = scan(3)
    own = MetaTensor(image, affine=np.diag([-1.0, -1.5, 1.0, 1.0]))
    assert torch.equal(rand(generator)(image, label), rand(generator)(own, label).as_tensor())
    assert torch.equal(rand(generator)(image, label), rand(generator)(MetaTensor(image), label).as_tensor())
    other = MetaTensor(image, affine=np.diag([1.0, 1.5, 1.0, 1.0]))
    assert not torch.allclose(rand(generator)(image, label), rand(generator)(other, label).as_tensor())
    lps = MetaTensor(image, affine=np.diag([1.0, 1.5, 1.0, 1.0]), meta={"space": "LPS"})
    assert torch.equal(rand(generator)(image, label), rand(generator)(lps, label).as_tensor())


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "ASR", "SLP"])
def test_the_grid_of_a_model_is_as_nibabel_reads_it(make_generator: Callable[..., Generator], orientation: str) -> None:
    config = make_generator(3, orientation=orientation, spacing=(1.0, 1.5, 2.0)).config
    grid = grid_of(torch.zeros(1, 4, 5, 6), config)
    assert "".join(aff2axcodes(grid.affine)) == orientation and grid.known
    np.testing.assert_allclose(voxel_sizes(grid.affine), (1.0, 1.5, 2.0))


def test_label_text_facts_and_own_edges_steer(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(conditions=("mask", "edge", "text", "age"))
    image, label = scan()
    plain = rand(generator)(image, label)
    assert (rand(generator)(image, label * 0) - plain).abs().max() > 1
    assert (rand(generator)(image, label, text="large heart") - plain).abs().max() > 1
    assert (rand(generator)(image, label, attributes={"age": "80"}) - plain).abs().max() > 1
    assert (rand(generator, use_edges=False)(image, label) - plain).abs().max() > 1
    keys = {"text_key": "text", "attribute_keys": {"age": "years"}}
    batch = {"image": image[None], "label": label[None], "text": ["large heart"], "years": torch.tensor([80])}
    loop = RandDiffusionVariationBatchd("image", generator, "label", prob=1.0, **keys, **FAST).set_random_state(0)
    steered = loop(batch)["image"][0]
    single = {"image": image, "label": label, "text": "large heart", "years": 80}
    alone = RandDiffusionVariationd("image", generator, "label", prob=1.0, **keys, **FAST)
    alone.last = Noising(loop.last.strength, loop.last.seeds[0])
    assert torch.equal(alone(single, randomize=False)["image"], steered)
    array = RandDiffusionVariationBatch(generator, prob=1.0, **FAST)
    array.last = loop.last
    facts = [{"age": "80"}]
    assert torch.equal(array(image[None], label[None], ["large heart"], facts, randomize=False)[0], steered)


def test_little_strength_keeps_more_of_the_scan(make_generator: Callable[..., Generator]) -> None:
    image, label = scan()
    low, high = (rand(make_generator(), strength=strength)(image, label) for strength in (0.05, 1.0))
    nothing = rand(make_generator(), strength=0.01)(image, label)
    assert (low - nothing).abs().mean() < 0.3 * (high - nothing).abs().mean()


def test_draws_come_from_its_own_state_only(make_generator: Callable[..., Generator]) -> None:
    first, again, other = (
        RandDiffusionVariationd("image", make_generator(), "label", prob=0.5, **FAST).set_random_state(seed)
        for seed in (3, 3, 4)
    )
    made = [first(sample(index))["image"] for index in range(6)]
    before = torch.get_rng_state()
    assert all(torch.equal(a, again(sample(index))["image"]) for index, a in enumerate(made))
    assert torch.equal(torch.get_rng_state(), before)
    changed = [not torch.equal(a, sample(index)["image"]) for index, a in enumerate(made)]
    assert 0 < sum(changed) < 6
    assert not all(torch.equal(a, other(sample(index))["image"]) for index, a in enumerate(made))


def test_chance_and_strength_are_as_asked(make_generator: Callable[..., Generator]) -> None:
    transform = rand(make_generator(), prob=0.3, strength=(0.2, 0.5))
    hits, strengths = 0, []
    for _ in range(2000):
        transform.randomize()
        if transform.last is not None:
            hits += 1
            strengths.append(transform.last.strength)
    assert abs(hits / 2000 - 0.3) < 0.04  # 4 standard errors
    drawn = np.array(strengths)
    assert 0.2 <= drawn.min() < 0.21 and 0.49 < drawn.max() <= 0.5 and abs(drawn.mean() - 0.35) < 0.02


@pytest.mark.parametrize("kind", [RandDiffusionVariationd, RandDiffusionCompositd, RandLesionInsertiond])
def test_what_is_drawn_says_nothing_of_the_next_scan(make_generator: Callable[..., Generator], kind: Any) -> None:
    image, label = scan()
    more: dict[str, Any] = {"label_key": "label"}
    size: Any = None
    if kind is RandDiffusionCompositd:
        more["cell_size"], size = 8, (20, 16)
    if kind is RandLesionInsertiond:
        lesion = torch.zeros(1, 5, 5)
        lesion[0, 2, 2] = 2
        more |= {"value": 2, "within": [1], "lesions": [lesion]}
        size = (image, label, None)
    transform = kind("image", generator=make_generator(), prob=0.5, strength=(0.2, 0.8), **more)
    strengths: list[list[float]] = [[], []]
    for seed in range(300):
        transform.set_random_state(seed)
        transform.randomize(size)
        if transform.last is not None:
            strength = getattr(transform.last, "noising", transform.last).strength
            transform.randomize(size)
            strengths[transform.last is not None].append(strength)
    assert min(map(len, strengths)) > 40
    assert stats.ks_2samp(*strengths).pvalue > 0.01


def test_scans_of_one_sample_share_the_noise_and_a_missing_one_may_be_allowed(
    make_generator: Callable[..., Generator],
) -> None:
    data = {**sample(), "again": sample()["image"]}
    options = {"label_key": "label", "prob": 1.0, **FAST}
    made = RandDiffusionVariationd(("image", "again"), make_generator(), **options).set_random_state(0)(data)
    assert torch.equal(made["image"], made["again"]) and torch.equal(made["label"], data["label"])
    assert torch.equal(data["image"], sample()["image"])  # the sample itself is left alone
    lone = RandDiffusionVariationd(("image", "gone"), make_generator(), allow_missing_keys=True, **options)
    assert torch.equal(lone.set_random_state(0)(sample())["image"], made["image"])
    with pytest.raises(KeyError, match="gone"):
        RandDiffusionVariationd(("image", "gone"), make_generator(), **options)(sample())


def test_a_sample_of_a_batch_is_what_it_is_alone(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(3)
    affines = [np.eye(4), TURNED, np.diag([1.0, 1.0, 1.0, 1.0])]
    affines[2][:3, 3] = 5
    cases = [scan(3, seed=index) for index in range(3)]
    batch = list_data_collate(
        [
            {"image": MetaTensor(image, affine=affine), "label": MetaTensor(label, affine=affine)}
            for (image, label), affine in zip(cases, affines, strict=True)
        ]
    )
    loop = RandDiffusionVariationBatchd("image", generator, "label", prob=1.0, **FAST)
    made = loop.set_random_state(0)(batch)["image"]
    assert isinstance(made, MetaTensor) and torch.equal(made.affine, batch["image"].affine)
    pieces = RandDiffusionVariationBatchd("image", generator, "label", prob=1.0, batch_size=1, **FAST)
    torch.testing.assert_close(
        made.as_tensor(), pieces.set_random_state(0)(batch)["image"].as_tensor(), atol=0.02, rtol=0
    )
    for index, ((image, label), affine) in enumerate(zip(cases, affines, strict=True)):
        alone = translate(
            generator,
            image,
            label[0].long(),
            grid=Grid(tuple(image.shape[1:]), affine),
            strength=loop.last.strength,
            seed=loop.last.seeds[index],
            settings=SamplingSettings(num_inference_steps=2),
        ).image
        torch.testing.assert_close(made[index].as_tensor(), alone, atol=0.02, rtol=0)
        assert (alone - image).abs().mean() > 0.02 * image.std()


def test_a_batch_changes_some_samples_and_leaves_the_others_bit_for_bit(saved_model: Path) -> None:
    batch = {key: torch.stack([sample(index)[key] for index in range(8)]) for key in ("image", "label")}
    loop = RandDiffusionVariationBatchd("image", saved_model, "label", prob=0.5, device="cpu", **FAST)
    made = loop.set_random_state(5)(batch)
    changed = [not torch.equal(a, b) for a, b in zip(made["image"], batch["image"], strict=True)]
    assert 0 < sum(changed) < 8 and [index for index in range(8) if changed[index]] == list(loop.last.chosen)
    assert torch.equal(made["label"], batch["label"]) and made["image"].requires_grad is False
    twins = {key: value[:1].repeat(2, 1, 1, 1) for key, value in batch.items()}
    first, second = RandDiffusionVariationBatchd("image", saved_model, "label", prob=1.0, device="cpu", **FAST)(twins)[
        "image"
    ]
    assert (first - second).abs().mean() > 1
    never = RandDiffusionVariationBatchd("image", saved_model, "label", prob=0.0, **FAST)(batch)
    assert torch.equal(never["image"], batch["image"])


def test_a_window_is_kept_or_named(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(normalization=Normalization("window", 0.0, 1000.0))
    image, label = scan()
    made = rand(generator)(image.double(), label)
    unit = rand(generator, scaled_window=(0, 1))(image.double() / 1000, label)
    torch.testing.assert_close(unit * 1000, made, atol=0.05, rtol=0)
    whole = rand(generator, scaled_window=(0, 255))((image * 0.255).round().to(torch.uint8), label)
    exact = rand(generator, scaled_window=(0, 255))((image * 0.255).round().double(), label)
    assert (whole - exact).abs().max() <= 0.5
    with pytest.raises(BadInputError, match=r"image: expected the units of the model's window 0 to 1000, got .* 0\.8"):
        rand(generator)(image / 1000, label)


def test_it_travels_as_a_name_and_is_loaded_once(saved_model: Path, make_generator: Callable[..., Generator]) -> None:
    transform = RandDiffusionVariationd("image", saved_model, "label", prob=1.0, **FAST).set_random_state(1)
    made = transform.set_random_state(1)(sample())["image"]
    parcel = pickle.dumps(transform)
    assert len(parcel) < 20_000
    arrived = pickle.loads(parcel).set_random_state(1)
    assert torch.equal(arrived(sample())["image"], made)
    with transform.inner.variation.model.use() as first, arrived.inner.variation.model.use() as second:
        assert first is second
    held = RandDiffusionVariationd("image", make_generator(), "label", **FAST)
    assert copy.deepcopy(held).inner.variation.model is held.inner.variation.model
    with pytest.raises(BadInputError, match=r"generator: expected the folder or name .* got the Generator 'tiny-2d'"):
        pickle.dumps(held)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_reproducible_and_not_frozen_in_the_loaders_of_monai(saved_model: Path, workers: int) -> None:
    pipeline = Compose(
        [
            RandDiffusionVariationd("image", saved_model, "label", prob=0.7, **FAST),
            RandFlipd(("image", "label"), prob=0.5),
        ]
    )
    data = CacheDataset([sample(index) for index in range(4)], pipeline, progress=False)

    def epochs() -> list[torch.Tensor]:
        set_determinism(0)
        loader = DataLoader(data, batch_size=2, num_workers=workers)
        return [torch.cat([batch["image"] for batch in loader]) for _ in range(2)]

    first, second = epochs(), epochs()
    set_determinism(None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)


def test_threads_give_each_what_it_is_alone(make_generator: Callable[..., Generator]) -> None:
    image, label = scan()
    generator = make_generator()
    expected = [rand(generator, seed)(image, label) for seed in range(4)]
    made: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: made.__setitem__(seed, rand(generator, seed)(image, label)))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made[seed], expected[seed]) for seed in range(4))
    data = CacheDataset(
        [sample(index) for index in range(4)],
        RandDiffusionVariationd("image", generator, "label", prob=1.0, **FAST),
        progress=False,
    )
    loader = ThreadDataLoader(data, batch_size=1, num_workers=2, use_thread_workers=True)
    images = torch.cat([batch["image"] for batch in loader])
    assert len(images) == 4 and not torch.equal(images[0], sample(0)["image"])


def test_a_worker_does_not_wait_for_a_thread_that_it_has_not_got(saved_model: Path) -> None:
    vary = RandDiffusionVariationd("image", saved_model, "label", prob=1.0, **FAST)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with vary.inner.variation.model.use():
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        data = CacheDataset([sample()], vary, progress=False)
        made = next(iter(DataLoader(data, batch_size=1, num_workers=1, timeout=60, multiprocessing_context="fork")))
    finally:
        done.set()
        thread.join()
    assert not torch.equal(made["image"][0], sample()["image"])


IMAGE, LABEL = scan()


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (
            scan(3)[0],
            scan(3)[1],
            r"image: expected \(C, H, W\) for the 2D model 'tiny-2d', got shape \(1, 12, 16, 14\)",
        ),
        (IMAGE[0], LABEL, r"image: expected \(C, H, W\) .*EnsureChannelFirst"),
        (scan(channels=3)[0], LABEL, r"image: expected the 1 channel\(s\) of the model 'tiny-2d'.*, got 3"),
        (IMAGE * 0, LABEL, "image: expected varying intensities, got the constant 0"),
        (IMAGE / 0, LABEL, "image: expected finite intensities, got NaN or infinity"),
        (IMAGE, None, "label: expected the label map of the scan, .*'tiny-2d'.* got none"),
        (IMAGE, LABEL + 2, r"label: expected values among \[0, 1, 2\], got \[3, 4\] too"),
        (IMAGE, LABEL[0], r"label: expected one channel of class values, \(1, 20, 16\), got \(20, 16\)"),
        (IMAGE, torch.cat([LABEL] * 3), r"label: expected one channel .* before it is one-hot"),
        (IMAGE, LABEL[:, :9], r"label: expected one channel of class values, \(1, 20, 16\), got \(1, 9, 16\)"),
        (IMAGE, LABEL / 2, "label: expected whole numbers, got others.*nearest"),
        (
            MetaTensor(IMAGE, affine=np.diag([2.0, 2.0, 1.0, 1.0])),
            MetaTensor(LABEL, affine=np.diag([1.0, 2.0, 1.0, 1.0])),
            "label: expected the affine of the scan, got another",
        ),
    ],
)
def test_a_scan_that_does_not_fit_is_refused(
    make_generator: Callable[..., Generator], image: Any, label: Any, message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        rand(make_generator())(image, label)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, r"strength: expected a share in \(0, 1\], got 0.0"),
        ({"strength": (0.5, 1.2)}, r"strength: expected a share in \(0, 1\], got 1.2"),
        ({"strength": (0.6, 0.2)}, "strength: expected a share or two that rise"),
        ({"strength": (0.1, 0.2, 0.3)}, "strength: expected a share or two that rise"),
        ({"prob": 1.5}, r"prob: expected a chance in \[0, 1\], got 1.5"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected at least 1, got 0"),
        ({"scaled_window": (1, 0)}, "scaled_window: expected two rising numbers"),
        ({"scaled_window": (0, 1)}, "scaled_window: expected none, because the model 'tiny-2d' normalizes each scan"),
        ({"device": "abacus"}, None),
    ],
)
def test_options_that_cannot_be_are_refused(saved_model: Path, options: dict[str, Any], message: str | None) -> None:
    with pytest.raises(BadInputError, match=message or "device: expected a device of this machine, got 'abacus'"):
        rand(saved_model, **options)(*scan())


def test_what_is_not_there_is_named(saved_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="nowhere: expected a model folder, a Hub id or an embedded model"):
        RandDiffusionVariation("nowhere")
    with pytest.raises(BadInputError, match=r"expected a medgen model \(generator.json and weights\)"):
        RandDiffusionVariation(tmp_path)
    without = {"image": scan()[0]}
    for kind in (RandDiffusionVariationd, RandDiffusionVariationBatchd):
        with pytest.raises(BadInputError, match=r"label_key: expected 'label' in the sample, got \['image'\]"):
            kind("image", saved_model, "label", prob=0.0)(without)
        keys = {"text_key": "words", "attribute_keys": {"age": "years"}}
        with pytest.raises(BadInputError, match="text_key: expected 'words' in the sample"):
            kind("image", saved_model, "label", prob=0.0, **keys)(sample())
        with pytest.raises(BadInputError, match=r"attribute_keys\['age'\]: expected 'years' in the sample"):
            kind("image", saved_model, "label", prob=0.0, **keys)({**sample(), "words": "none"})


def test_a_batch_that_is_none_is_refused(saved_model: Path) -> None:
    batched = {key: value[None].repeat(2, 1, 1, 1) for key, value in sample().items()}
    loop = RandDiffusionVariationBatchd("image", saved_model, "label", prob=1.0, device="cpu", **FAST)
    with pytest.raises(BadInputError, match=r"batch: expected as many labels as scans, got \{'image': 2, 'label': 1\}"):
        loop({**batched, "label": batched["label"][:1]})
    with pytest.raises(BadInputError, match=r"batch: expected a tensor \(B, C, H, W\[, D\]\) for 'image', got list"):
        loop({**batched, "image": list(batched["image"])})
    array = RandDiffusionVariationBatch(saved_model, prob=1.0, device="cpu", **FAST)
    with pytest.raises(BadInputError, match=r"batch: expected as many labels as scans, got \{'img': 2, 'label': 1\}"):
        array(batched["image"], batched["label"][:1])
    with pytest.raises(BadInputError, match=r"batch: expected a tensor \(B, C, H, W\[, D\]\) for 'img', got ndarray"):
        array(batched["image"].numpy(), batched["label"])
    array.randomize(3)
    with pytest.raises(BadInputError, match=r"batch: expected the 3 samples that were drawn for, got 2\. Draw anew"):
        array(batched["image"], batched["label"], randomize=False)
    with pytest.raises(BadInputError, match="batch_size: expected at least 1, got 0"):
        RandDiffusionVariationBatchd("image", saved_model, "label", batch_size=0)
