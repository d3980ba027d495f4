"""Views and predictions with real networks of a few thousand weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer, SlidingWindowInferer
from monai.networks.nets import UNet

from medgen.data.intensity import Normalization
from medgen.generator import Generator
from medgen.generator.familiarity import Familiarity, deep_features, fit_familiarity
from medgen.test_time import GenerativeTTA, Segmenter, change_intensities
from medgen.test_time.attention import attended_region
from medgen.test_time.geometric import flips, random_pose
from medgen.test_time.making import ScanViews
from medgen.types import BadInputError

SHAPES = {2: (24, 20), 3: (12, 10, 14)}


def network(dims: int, classes: int = 3, channels: int = 1) -> UNet:
    torch.manual_seed(0)
    return UNet(dims, channels, classes, (4, 8), (2,), norm="instance")


def scan(dims: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """A smooth bright object on a dark ground, in units of its own."""
    axes = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in SHAPES[dims]], indexing="ij"))
    bright = torch.exp(-4 * (axes - 0.1 * seed).square().sum(0))
    draw = torch.Generator().manual_seed(seed)
    return (
        100 + 900 * bright.expand(channels, *SHAPES[dims]) + 10 * torch.randn(channels, *SHAPES[dims], generator=draw)
    )


def tta(generator: Generator, **options: object) -> GenerativeTTA:
    values = {"num_views": 3, "precision": "fp32", "geometric": True, **options}
    return GenerativeTTA(network(generator.config.spatial_dims), generator, **values)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mask", ["everywhere", "uncertainty", "blocks", "hybrid"])
def test_a_scan_is_segmented_with_all_of_its_views(
    dims: int, mask: str, make_generator: Callable[..., Generator]
) -> None:
    predict = tta(make_generator(dims), mask=mask)
    found = predict(scan(dims))
    shape = SHAPES[dims]
    assert found.label.shape == found.vote.shape == found.entropy.shape == found.mutual_information.shape == shape
    assert found.probability.shape == found.variance.shape == (3, *shape)
    torch.testing.assert_close(found.probability.sum(0), torch.ones(shape), atol=1e-5, rtol=0)
    mirrors = 2**dims
    assert found.views + found.dropped == mirrors + 3 == found.segmentations
    assert found.evaluations == 5 + 3 * 5 and not found.fallback and not found.stopped
    again = tta(make_generator(dims), mask=mask, view_batch=1)(scan(dims))
    torch.testing.assert_close(again.probability, found.probability, atol=1e-4, rtol=0)
    other = tta(make_generator(dims), mask=mask, seed=1)(scan(dims))
    assert not torch.equal(other.probability, found.probability)


def test_without_randomness_the_scan_is_all_that_is_seen(make_generator: Callable[..., Generator]) -> None:
    found = tta(make_generator(2), randomness=0.0, detail=1.0, geometric=False)(scan(2))
    single = network(2).eval()(scan(2)[None])[0].softmax(0)
    torch.testing.assert_close(found.probability, single.detach(), atol=1e-4, rtol=0)
    assert float(found.variance.max()) < 1e-6


def test_outside_the_mask_the_segmenter_gets_the_scan_bit_for_bit(make_generator: Callable[..., Generator]) -> None:
    seen: list[torch.Tensor] = []

    def watch(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0].clone())
        return torch.cat([inputs, 1 - inputs], dim=1)

    mask = torch.zeros(SHAPES[2], dtype=torch.bool)
    mask[5:12, 6:13] = True
    image = scan(2)
    predict = GenerativeTTA(watch, make_generator(2), num_views=3, geometric=False, precision="fp32")
    predict(image, mask=mask)
    assert len(seen) == 4
    for view, shown in zip(seen[1:], predict.views(image, 3, mask=mask), strict=True):
        assert torch.equal(view, shown)
    del seen[4:]
    for view in seen[1:]:
        assert torch.equal(view[0][~mask], image[0][~mask])
        assert float((view != image)[0][mask].float().mean()) > 0.95


def test_views_keep_orientation_and_spacing(make_generator: Callable[..., Generator]) -> None:
    """A scan that is stored mirrored, turned and in other voxels gets the same views, mirrored and turned."""
    generator = make_generator(3)
    seen: list[torch.Tensor] = []

    def watch(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0].clone())
        return torch.cat([inputs, 1 - inputs], dim=1)

    predict = GenerativeTTA(watch, generator, num_views=2, geometric=False, precision="fp32")
    image = scan(3)
    predict(MetaTensor(image, affine=torch.eye(4)))
    turned = image.flip(1).permute(0, 3, 1, 2).contiguous()
    affine = torch.tensor([[0.0, -1, 0, 11], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    predict(MetaTensor(turned, affine=affine))
    for plain, other in zip(seen[1:3], seen[4:6], strict=True):
        torch.testing.assert_close(other.permute(0, 2, 3, 1).flip(1), plain, atol=0.5, rtol=0)  # of 1000
        assert float((plain - image).abs().max()) > 20


def test_2d_generators_make_views_of_volumes_slice_by_slice(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2)
    for axis in (0, 2):
        segment = SliceInferer(roi_size=(24, 24), spatial_dim=axis, sw_batch_size=4, mode="constant")
        predict = GenerativeTTA(
            network(2), generator, num_views=2, geometric=False, slice_axis=axis, inferer=segment, precision="fp32"
        )
        found = predict(scan(3))
        assert found.label.shape == SHAPES[3]
        assert found.evaluations == SHAPES[3][axis] * (5 + 2 * 5)
        mask = torch.zeros(SHAPES[3], dtype=torch.bool)
        mask.select(axis, 3)[:] = True
        assert predict(scan(3), mask=mask).evaluations == 5 + 2 * 5  # other slices stay as they are
        changed = (predict.views(scan(3), 1, mask=mask)[0] != scan(3))[0]
        assert changed.any() and not changed[~mask].any()


def test_large_scans_go_through_windows(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2)
    whole = tta(generator, geometric=False)(scan(2)).probability
    covering = tta(generator, geometric=False, window=(64, 64))(scan(2)).probability
    torch.testing.assert_close(covering, whole)
    predict = tta(generator, geometric=False, window=(8, 8), inferer=SlidingWindowInferer((16, 16)))
    found = predict(scan(2))
    # Latents of 12 by 10: windows of 8 at 0 and 4 along one axis, at 0 and 2 along the other.
    assert found.label.shape == SHAPES[2] and found.evaluations == 4 * 20
    less = tta(generator, geometric=False, window=(8, 8), max_evaluations=45)(scan(2))
    assert less.evaluations == 4 * (5 + 5) and "allow 1 views" in less.stopped
    steered = tta(generator, geometric=False, window=(8, 8), condition_on_prediction=True, guidance_scale=2.0)(scan(2))
    assert steered.evaluations == 2 * 4 * 20
    assert not torch.equal(steered.probability, found.probability)


def test_conditions_steer_views_and_cost_passes(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2, conditions=("mask", "text"))
    free = tta(generator, geometric=False)(scan(2))
    told = tta(generator, geometric=False)(scan(2), text="large heart")
    guided = tta(generator, geometric=False, guidance_scale=2.0)(scan(2), text="large heart")
    shown = tta(generator, geometric=False, condition_on_prediction=True)(scan(2))
    assert (free.evaluations, told.evaluations, guided.evaluations, shown.evaluations) == (20, 20, 40, 20)
    for other in (told, guided, shown):
        assert not torch.equal(other.probability, free.probability)
    attended = tta(generator, geometric=False, mask="attention")(scan(2), text="large heart")
    assert attended.evaluations == 21  # one row looks where the words are
    hybrid = tta(generator, geometric=False, mask="hybrid")(scan(2), text="large heart")
    assert hybrid.evaluations == 21
    bounded = tta(generator, geometric=False, mask="hybrid", guidance_scale=2.0, max_evaluations=31)
    assert bounded(scan(2), text="large heart").evaluations == 31  # 10 there, 10 back twice, and the look
    with pytest.raises(BadInputError, match="expected fewer words than the 6 of the encoder"):
        tta(generator, mask="attention")(scan(2), text="large heart small heart large heart")


def test_the_region_of_attention_is_where_the_words_are_looked_at(make_generator: Callable[..., Generator]) -> None:
    """A denoiser whose queries are the left half of the scan, and whose keys are words."""
    generator = make_generator(2, conditions=("mask", "text"))
    seen: list[torch.Tensor] = []

    class Left(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            rows = torch.zeros_like(hidden).unflatten(1, (6, 5))
            rows[:, :, :2] = 5.0
            return rows.flatten(1, 2)

    class Words(torch.nn.Module):
        def forward(self, context: torch.Tensor) -> torch.Tensor:
            there = context.abs().sum(dim=2, keepdim=True) > 0
            return there.float().expand(-1, -1, 16)

    for name, module in generator.denoiser.named_modules():
        if name.endswith("attn2"):
            module.to_q, module.to_k = Left(), Words()
            seen.append(module)
    assert seen
    predict, image = tta(generator, mask="attention", geometric=False), scan(2)
    made = ScanViews(predict.making, image, first=torch.full((3, *SHAPES[2]), 1 / 3), text="large heart")
    region = attended_region(made.maker)
    assert region.shape == SHAPES[2]
    assert region[:, :6].all() and not region[:, 12:].any()
    seen_by_segmenter = predict.views(image, 3, text="large heart")
    assert all(torch.equal(view[0][:, 14:], image[0][:, 14:]) for view in seen_by_segmenter)


@pytest.mark.parametrize("kind", ["color", "pixels", "stable diffusion"])
def test_generators_of_other_kinds_make_views_too(
    kind: str, make_generator: Callable[..., Generator], saved_pipeline: Path
) -> None:
    if kind == "stable diffusion":
        generator = Generator.from_pretrained(saved_pipeline)
        image, text = scan(2)[:, :16, :16], {"text": "a b"}
        found = tta(generator, geometric=False, mask="attention")(image, **text)
        assert found.evaluations == 21
        published = tta(generator, geometric=False, method="null_text", num_views=1)
        losses = published(image, **text)
        assert losses.evaluations > 300
    elif kind == "color":
        generator, image = make_generator(2, channels=3), scan(2, channels=3)
        found = GenerativeTTA(network(2, channels=3), generator, num_views=3, geometric=False, precision="fp32")(image)
    else:
        generator, image = make_generator(2), scan(2)
        whole = make_generator(2)
        generator.autoencoder = None
        generator.denoiser = type(whole.denoiser)(2, 1, (8, 16), (False, False), 1, 8, 4, mask_classes=3).eval()
        generator.config.latent_scale, generator.config.latent_shift = (1.0,), (0.0,)
        predict = tta(generator, geometric=False)
        found = predict(image)
        same = tta(generator, randomness=0.0).views(image, 1)[0]
        inside = (image > image.quantile(0.01)) & (image < image.quantile(0.99))  # what percentiles do not clip
        torch.testing.assert_close(same[inside], image[inside], atol=0.5, rtol=0)
    assert found.views + found.dropped == 4 and bool(torch.isfinite(found.probability).all())


def test_a_budget_returns_the_best_so_far(
    make_generator: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_generator(2)
    some = tta(generator, max_evaluations=16, num_views=8)(scan(2))
    assert some.evaluations == 15 and some.views + some.dropped == 6 and "allow 2 views" in some.stopped
    none = tta(generator, max_evaluations=9)(scan(2))
    assert none.evaluations == 0 and "allow no view" in none.fallback and none.segmentations == 4 + 3

    clock = (0.02 * tick for tick in itertools.count())  # every look at it takes some time
    monkeypatch.setattr("medgen.test_time.augment.time", SimpleNamespace(monotonic=lambda: next(clock)))
    late = tta(generator, num_views=50, max_seconds=0.31)(scan(2))
    assert "seconds were over" in late.stopped and late.views == 1 + 16 and not late.fallback
    none = tta(generator, max_seconds=0.01)(scan(2))
    assert "before the first generative view" in none.fallback and none.evaluations == 0
    monkeypatch.undo()
    stable = tta(generator, num_views=50, randomness=0.0, detail=1.0, geometric=False, patience=3)(scan(2))
    assert "stayed the same over 3" in stable.stopped and stable.views == 4
    mirrored = tta(generator, num_views=50, randomness=0.0, detail=1.0, patience=3)(scan(2))
    assert mirrored.evaluations >= 20  # mirror images of the scan do not count


def test_unknown_scans_get_geometric_views(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2)
    assert tta(generator)(scan(2)).familiarity is None
    features = len(deep_features(generator, torch.rand(1, 1, 24, 24)))
    generator.config.familiarity = Familiarity((0.0,) * features, (1.0,) * features, 1e-6)
    found = tta(generator)(scan(2))
    assert "does not know such scans" in found.fallback and found.evaluations == 1 and found.segmentations == 4 + 3
    mirrored = tta(generator, rotation=0.0, scaling=0.0)(scan(2))
    assert mirrored.segmentations == 4
    both = tta(generator, intensity=True)(scan(2))
    assert both.segmentations == 4 + 3
    assert tta(generator, check_familiarity=False)(scan(2)).evaluations == 20


def test_views_are_turned_with_voxels_of_their_own_size(make_generator: Callable[..., Generator]) -> None:
    """A segmenter of intensities sees each view in its own pose, and its predictions come back to where they belong."""
    generator = make_generator(2)
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(20.0), indexing="ij")
    image = torch.sigmoid(5 - ((rows - 8) ** 2 + (columns - 12) ** 2).sqrt())[None]
    seen: list[torch.Tensor] = []

    def watch(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0])
        return torch.cat([1 - inputs, inputs], dim=1)

    options = {"precision": "fp32", "randomness": 0.0, "detail": 1.0, "seed": 5, "output": "probabilities"}
    placed = MetaTensor(image, affine=torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)))
    for axes, mirrors in (((), flips(2, ())), ((1,), flips(2, (1,)))):
        seen.clear()
        found = GenerativeTTA(watch, generator, num_views=6, geometric=axes, **options)(placed)
        assert len(seen) == len(mirrors) + 6
        for number, view in enumerate(seen[len(mirrors) :], 1):
            mirror = mirrors[number % len(mirrors)]
            pose = random_pose(mirror, (2.0, 1.0), rotation=10.0, scaling=0.1, seed=5, number=number)
            torch.testing.assert_close(view, pose.there(image), atol=1e-3, rtol=0)
            assert (view - mirror(image)).abs().max() > 0.05
        assert (found.probability[1] - image[0]).abs().max() < 0.1
        assert found.pairwise_dice[0] > 0.95


def test_what_a_model_knows_is_told_from_what_it_does_not(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2, size=(24, 20))
    scans = [2 * (s := scan(2, seed=seed % 5))[None] / s.max() - 1 for seed in range(16)]
    known = fit_familiarity(generator, (values[..., :24, :20] for values in scans))
    assert known is not None and fit_familiarity(generator, scans[:7]) is None
    rows = torch.stack([deep_features(generator, values) for values in scans])
    np.testing.assert_allclose(known.mean, rows.mean(0), atol=1e-6)
    assert all(known.score(row) < known.limit for row in rows)
    # Of a larger scan the center is looked at, as in training.
    framed = torch.nn.functional.pad(scans[0], (6, 6, 4, 4))
    assert known.score(deep_features(generator, framed)) == known.score(rows[0])
    stripes = torch.sign(torch.sin(torch.arange(24.0) * 2))[:, None].expand(24, 20)
    assert known.score(deep_features(generator, stripes[None, None])) > known.limit


def test_scans_in_scaled_windows_get_views_in_their_own_units(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2, normalization=Normalization("window", low=-200.0, high=800.0))
    segment = lambda inputs: torch.cat([inputs, 0.5 - inputs], dim=1)  # noqa: E731
    options = {"num_views": 2, "geometric": False, "precision": "fp32"}
    window = scan(2) - 300
    plain = GenerativeTTA(lambda x: segment((x + 200) / 1000), generator, **options)(window)
    scaled = GenerativeTTA(segment, generator, scaled_window=(0.0, 1.0), **options)((window + 200) / 1000)
    torch.testing.assert_close(scaled.probability, plain.probability, atol=1e-5, rtol=0)


def test_programs_of_other_kinds_are_segmenters_too(make_generator: Callable[..., Generator]) -> None:
    generator, image = make_generator(2), scan(2)
    options = {"geometric": True, "precision": "fp32"}
    plain = tta(generator)(image).probability
    module = network(2).eval()
    traced = torch.jit.trace(module, image[None])
    exported = torch.export.export(module, (image[None],)).module()
    for program in (traced, exported, lambda x: [module(x)], lambda x: {"pred": module(x)}):
        found = GenerativeTTA(program, generator, num_views=3, **options)(image).probability
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)
    softmax = GenerativeTTA(lambda x: module(x).softmax(1), generator, num_views=3, **options, output="probabilities")
    torch.testing.assert_close(softmax(image).probability, plain, atol=1e-4, rtol=0)
    single = GenerativeTTA(lambda x: x / 500 - 1, generator, num_views=1, **options, output="sigmoid")
    assert single(image).probability.shape == (2, *SHAPES[2])


@pytest.mark.parametrize(
    ("segment", "words"),
    [
        (lambda x: x[..., :-1].repeat(1, 2, 1, 1), "keeps the grid"),
        (lambda x: x, "two classes or more"),
        (lambda x: torch.full((1, 2, *x.shape[2:]), torch.nan), "expected finite outputs"),
    ],
)
def test_segmenters_that_do_not_fit_are_refused(
    segment: Callable[[torch.Tensor], torch.Tensor], words: str, make_generator: Callable[..., Generator]
) -> None:
    with pytest.raises(BadInputError, match=words):
        GenerativeTTA(segment, make_generator(2), precision="fp32")(scan(2))


def test_outputs_that_are_not_what_was_said_are_refused(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2)
    with pytest.raises(BadInputError, match="probabilities that sum to 1 over the classes"):
        tta(generator, output="probabilities")(scan(2))
    module = network(2).eval()
    with pytest.raises(BadInputError, match="expected logits, got numbers in"):
        GenerativeTTA(lambda x: module(x).softmax(1), generator)(scan(2))
    with pytest.raises(BadInputError, match="as after a sigmoid"):
        GenerativeTTA(lambda x: x / 2000, generator, output="sigmoid")(scan(2))
    with pytest.raises(BadInputError, match="output and inferer: expected none beside a Segmenter"):
        GenerativeTTA(Segmenter(module), generator, output="sigmoid")
    with pytest.raises(BadInputError, match="one channel for output 'sigmoid', got 3"):
        tta(generator, output="sigmoid")(scan(2))
    with pytest.raises(BadInputError, match="of the 3 classes of the generator"):
        GenerativeTTA(network(2, classes=2), generator, condition_on_prediction=True)(scan(2))


def test_scans_that_do_not_fit_are_refused(make_generator: Callable[..., Generator]) -> None:
    broken = scan(2)
    broken[0, 3, 3] = torch.inf
    with pytest.raises(BadInputError, match="expected finite intensities"):
        tta(make_generator(2))(broken)
    with pytest.raises(BadInputError, match="expected a volume for the 3D generator"):
        GenerativeTTA(network(2), make_generator(3))(scan(2))
    two = GenerativeTTA(network(2, channels=2), make_generator(2))
    with pytest.raises(BadInputError, match="expected the 1 channel"):
        two(scan(2, channels=2))
    with pytest.raises(BadInputError, match="Put the channels first"):
        tta(make_generator(2))(scan(2)[None, None])
    windowed = make_generator(2, normalization=Normalization("window", low=-1000.0, high=3000.0))
    with pytest.raises(BadInputError, match="expected the units of the model's window"):
        tta(windowed)(scan(2) / 1e4)
    with pytest.raises(BadInputError, match="mask: expected bool"):
        tta(make_generator(2))(scan(2), mask=torch.ones(3, 3))
    for name, value in (("rotation", -1.0), ("rotation", 181.0), ("scaling", -0.1), ("scaling", math.nan)):
        with pytest.raises(BadInputError, match=rf"{name}: expected 0 to .* 0 leaves it out"):
            tta(make_generator(2), **{name: value})
    with pytest.raises(BadInputError, match="geometric: expected spatial axes"):
        tta(make_generator(2), geometric=(2,))(scan(2))
    with pytest.raises(BadInputError, match="expected a generator that a given text steers"):
        tta(make_generator(2), mask="attention")(scan(2))


def test_intensities_change_within_the_range_of_each_channel() -> None:
    image = torch.stack([scan(2)[0], scan(2, seed=1)[0] / 300])
    for number in range(1, 6):
        made = change_intensities(image, seed=0, number=number)
        for channel, before in zip(made, image, strict=True):
            assert float(before.min()) <= float(channel.min()) and float(channel.max()) <= float(before.max())
            assert 0.3 < float(channel.std() / before.std()) < 2 and not torch.equal(channel, before)
    assert change_intensities(image, seed=0, number=0) is image


def test_too_little_memory_says_what_to_do(make_generator: Callable[..., Generator]) -> None:
    def starved(inputs: torch.Tensor, **options: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    with pytest.raises(MemoryError, match="Give an inferer"):
        GenerativeTTA(starved, make_generator(2))(scan(2))
    generator = make_generator(2)
    generator.decode = starved
    with pytest.raises(MemoryError, match="Lower view_batch"):
        tta(generator)(scan(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": "clouds"}, "mask: expected a map or one of"),
        ({"num_views": 0}, "num_views: expected at least 1"),
        ({"method": "guess"}, "method: expected one of"),
        ({"randomness": 2.0}, "randomness: expected a share"),
        ({"strength": 0.0}, "strength: expected a share"),
        ({"max_evaluations": 0}, "max_evaluations: expected a number above 0"),
        ({"output": "labels"}, "output: expected one of"),
        ({"combination": "median"}, "combination: expected one of"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, object], words: str, make_generator: Callable[..., Generator]
) -> None:
    with pytest.raises(BadInputError, match=words):
        tta(make_generator(2), **options)
    with pytest.raises(BadInputError, match="segmenter: expected a network"):
        GenerativeTTA("seg.ts", make_generator(2))


def test_the_published_method_runs_and_is_counted(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2)
    weights = [weight.clone() for weight in generator.denoiser.parameters()]
    predict = tta(generator, method="null_text", condition_on_prediction=True, geometric=False)
    found = predict(scan(2))
    # Four rows for the inversion and the condition at tau, three for each iteration, six for each view.
    iterations, rest = divmod(found.evaluations - 4 - 3 * 6, 3)
    assert rest == 0 and 100 <= iterations <= 1000
    assert all(torch.equal(a, b) for a, b in zip(weights, generator.denoiser.parameters(), strict=True))
    assert all(weight.requires_grad for weight in generator.denoiser.parameters())
    for option in ({"num_inference_steps": 3}, {"mask": "hybrid"}, {"guidance_scale": 2.0}):
        with pytest.raises(BadInputError, match="method null_text: expected no"):
            tta(generator, method="null_text", **option)
    with pytest.raises(BadInputError, match="expected something that steers the generator"):
        tta(generator, method="null_text")(scan(2))


def test_windows_cut_maps_with_the_state(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2)
    predict = tta(generator, window=(8, 8), condition_on_prediction=True)
    draw = torch.Generator().manual_seed(0)
    maker = ScanViews(predict.making, scan(2), first=torch.rand(3, *SHAPES[2], generator=draw)).maker
    whole = maker.condition.parts["mask"]
    starts = []

    def watch(x: torch.Tensor, t: torch.Tensor, condition: object, **options: object) -> torch.Tensor:
        row, column = (int(value) for value in x[0, :, 0, 0])
        starts.append((row, column))
        cut = whole[..., 2 * row : 2 * row + 16, 2 * column : 2 * column + 16]
        assert torch.equal(condition.parts["mask"][:1], cut)
        return x

    generator.denoise = watch
    places = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij"))[None]
    torch.testing.assert_close(maker._denoise(places, torch.zeros(1)), places)
    assert sorted(starts) == [(0, 0), (0, 2), (4, 0), (4, 2)]
