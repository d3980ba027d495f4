"""Every condition acts, alone and beside the others, and is nothing where it is absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medgen.diffusion.sampler import sample
from medgen.generator import Generator
from medgen.seeding import seeded_noise
from medgen.synthesis import EdgeSource, SampleSpec, SamplingSettings, SourceFile, SyntheticSample, iter_samples
from medgen.synthesis.labels import prepare
from medgen.synthesis.steering import batch_condition
from medgen.types import BadInputError

ALL = ("mask", "edge", "text", "view", "age", "code", "spacing")
RANGE = 1000.0  # of the tiny model's intensities
ACTS = 1e-3 * RANGE
SETTINGS = SamplingSettings(num_inference_steps=3, guidance_scale=2.0)
SIZES = {2: (12, 10), 3: (11, 9, 10)}


@pytest.fixture(scope="module", params=[2, 3])
def world(
    request: pytest.FixtureRequest, make_generator: Callable[..., Generator], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Generator, list[dict[str, Any]]]]:
    """A model that listens to everything, and two ways to fill each condition."""
    dims = request.param
    generator = make_generator(dims, conditions=ALL, image_dtype="float32")
    folder = tmp_path_factory.mktemp("inputs")
    ways = []
    for seed in (0, 1):
        label = np.zeros(SIZES[dims], dtype=np.uint8)
        label[(slice(2, 8 - 3 * seed),) * dims] = 1 + seed
        edges = np.zeros(SIZES[dims], dtype=np.float32)
        edges[3 + 2 * seed], edges[:, 5 - seed] = 1, 0.5
        for name, array in (("label", label), ("edge", edges)):
            volume = array if dims == 3 else array[..., None]
            nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / f"{name}_{seed}.nii.gz")
        ways.append(
            {
                "mask": SourceFile(folder / f"label_{seed}.nii.gz", "l"),
                "edge": EdgeSource((SourceFile(folder / f"edge_{seed}.nii.gz", "e"),), ready=True),
                "text": ("chest x ray", "effusion")[seed],
                "view": ("PA", "AP")[seed],
                "age": ("30", "70")[seed],
                "code": ("[0.5, -1.0, 0.3]", "[-0.4, 1.0, 0.9]")[seed],
                "spacing": ("[1.0, 1.5, 2.0]", "[0.5, 0.5, 0.7]")[seed]
                if dims == 3
                else ("[1, 2]", "[0.5, 0.7]")[seed],
            }
        )
    yield generator, ways


def spec_of(given: Mapping[str, Any], index: int = 0) -> SampleSpec:
    """A plan of one sample; what is not given is absent."""
    return SampleSpec(
        case=f"synthetic_{index:05d}",
        index=index,
        seed=1000 + index,
        source="files" if "mask" in given else "none",
        file=given.get("mask"),
        edge=given.get("edge"),
        text=given.get("text"),
        attributes={name: given[name] for name in ("view", "age", "code", "spacing") if name in given},
    )


def make(generator: Generator, given: Mapping[str, Any], settings: SamplingSettings = SETTINGS) -> SyntheticSample:
    return next(iter_samples(generator, [spec_of(given)], settings))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("company", [False, True])
def test_changing_a_condition_changes_the_scan(
    world: tuple[Generator, list[dict[str, Any]]], name: str, company: bool, scale: float
) -> None:
    generator, (first, second) = world
    # The grid has to be the same in all: beside the mask or the edges it is that of the file.
    base = first if company else {key: first[key] for key in {"edge", name} - ({"edge"} if name == "mask" else set())}
    settings = replace(SETTINGS, guidance_scale=scale)
    image = make(generator, base, settings).image
    other = make(generator, {**base, name: second[name]}, settings).image
    assert (image - other).abs().max() > ACTS
    if name not in ("mask", "edge"):
        without = make(generator, {key: value for key, value in base.items() if key != name}, settings).image
        assert (image - without).abs().max() > ACTS


def by_hand(
    generator: Generator, given: Mapping[str, Any], scales: Mapping[str, float], settings: SamplingSettings
) -> torch.Tensor:
    """Brooks et al. 2023, equation 3, from single passes of the network with what is absent left out."""
    spec = spec_of(given)
    prepared = prepare(spec, generator)
    parts = batch_condition(generator, [prepared]).parts
    names = [name for name in ("mask", "edge", "age", "code", "spacing", "view", "text") if name in parts]

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        outputs = [
            generator.denoiser(x, t, {name: parts[name] for name in names[:count]}) for count in range(len(names) + 1)
        ]
        added = [
            scales[name] * (after - before) for name, (before, after) in zip(names, pairwise(outputs), strict=True)
        ]
        return outputs[0] + sum(added)

    with torch.no_grad():
        latents = sample(
            denoise,
            seeded_noise(generator.latent_shape(prepared.placement.shape), [spec.seed]),
            objective=generator.config.objective,
            num_inference_steps=settings.num_inference_steps,
            temperature=generator.config.temperature,
        )
        return generator.decode(latents)[0]


@pytest.mark.parametrize(
    "absent", [(), *((name,) for name in ALL if name != "spacing"), ("text", "view", "age", "code")]
)
def test_each_condition_has_its_own_scale_and_an_absent_one_takes_no_part(
    world: tuple[Generator, list[dict[str, Any]]], absent: tuple[str, ...]
) -> None:
    generator, (first, _) = world
    given = {name: value for name, value in first.items() if name not in absent}
    scales = {"mask": 1.5, "edge": 3.0, "text": 5.0, "view": 0.5, "age": 2.5, "code": 2.0, "spacing": 1.2}
    made = make(generator, given, replace(SETTINGS, guidance_scale=scales))
    expected = by_hand(generator, given, scales, SETTINGS)
    assert made.network_evaluations == 3 * (len(given) + 1)
    # Padding is cut away, and the last axis of a 2D slice is there already.
    placed = prepare(spec_of(given), generator).placement
    inside = tuple(slice(b, b + n) for (b, _), n in zip(placed.padding, placed.resampled_shape, strict=True))
    own = generator.config.intensity.inverse(expected[(slice(None), *inside)])
    assert (made.image - own).abs().max() < 1e-3 * RANGE


def test_a_sample_without_any_condition_is_unconditional_and_costs_one_pass_a_step(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator(2, conditions=("mask", "text", "view"), image_dtype="float32")
    first = make(generator, {}, SETTINGS)
    other = make(generator, {}, replace(SETTINGS, guidance_scale=7.0))
    assert torch.equal(first.image, other.image)
    assert first.network_evaluations == 3
    assert first.label is None
    assert first.conditions == {}


def test_a_sample_does_not_depend_on_the_batch(world: tuple[Generator, list[dict[str, Any]]]) -> None:
    generator, (first, second) = world
    wishes = [
        first,
        second,
        {key: first[key] for key in ("mask", "text")},
        {key: second[key] for key in ("mask", "text")},
        {key: second[key] for key in ("edge", "view")},
        {key: first[key] for key in ("edge", "view")},
        {key: first[key] for key in ("edge", "age")},
    ]
    specs = [spec_of(given, index) for index, given in enumerate(wishes)]
    settings = replace(SETTINGS, guidance_scale={"mask": 1.5, "text": 4.0})
    alone = [next(iter_samples(generator, [spec], settings)) for spec in specs]
    together = list(iter_samples(generator, specs, settings, batch_size=len(specs)))
    assert [len(item.batch) for item in together] == [2, 2, 2, 2, 2, 2, 1]
    for one, other in zip(alone, together, strict=True):
        assert one.spec == other.spec
        assert (one.image - other.image).abs().max() <= 1e-3 * RANGE
        assert one.network_evaluations == other.network_evaluations
        assert one.conditions == other.conditions


def test_guidance_acts_within_its_interval_only_and_rescale_changes_the_scan(
    world: tuple[Generator, list[dict[str, Any]]],
) -> None:
    generator, (first, _) = world
    plain, whole, part, rescaled = (
        make(generator, first, replace(SETTINGS, **change))
        for change in (
            {"guidance_scale": 1.0},
            {"guidance_scale": 4.0},
            {"guidance_scale": 4.0, "guidance_interval": (0.0, 0.9)},
            {"guidance_scale": 4.0, "guidance_rescale": 0.7},
        )
    )
    assert (plain.network_evaluations, whole.network_evaluations) == (3, 6)
    assert 3 < part.network_evaluations < 6
    images = [plain.image, whole.image, part.image, rescaled.image]
    assert all((a - b).abs().max() > ACTS for index, a in enumerate(images) for b in images[:index])


def test_the_voxel_size_is_that_of_the_grid_unless_it_is_given(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    generator = make_generator(3, conditions=("mask", "spacing"), spacing=None, image_dtype="float32")
    label = np.zeros((11, 9, 10), dtype=np.uint8)
    label[2:8, 2:6, 3:7] = 1
    # Stored as (S, L, P): axes come to the model as (R, A, S).
    affine = np.array([[0, -0.75, 0, 0], [0, 0, -1.5, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "a.nii.gz")
    given = {"mask": SourceFile(tmp_path / "a.nii.gz", "l")}
    own = make(generator, given)
    assert own.conditions == {"attributes": {"spacing": "[0.75, 1.5, 3.0]"}}
    same = make(generator, {**given, "spacing": "[0.75, 1.5, 3.0]"})
    other = make(generator, {**given, "spacing": "[1, 1, 1]"})
    assert torch.equal(own.image, same.image)
    assert (own.image - other.image).abs().max() > ACTS
    # A field of view that is drawn has the size that is asked for, and none to speak of otherwise.
    asked = make(generator, {"spacing": "[0.5, 0.5, 2.5]"})
    assert asked.grid.spacing == pytest.approx((0.5, 0.5, 2.5))
    assert asked.grid.known
    drawn = make(generator, {})
    assert (drawn.grid.known, drawn.conditions) == (False, {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"text": "chest"},
            "prompts: expected none, because the model 'tiny-2d' is steered by mask, view; not by text",
        ),
        ({"age": "30"}, r"attribute 'age': expected none, .*--conditions mask,view,age"),
        ({"view": "lateral"}, r"attribute 'view': expected one of AP, PA, as the model was trained on, got 'lateral'"),
    ],
)
def test_what_the_model_does_not_know_is_refused(
    make_generator: Callable[..., Generator], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        make(make_generator(2, conditions=("mask", "view")), given)
