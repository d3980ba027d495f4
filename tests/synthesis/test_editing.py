"""Edits of scans: what stays, what changes, and in which voxels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from medgen.conditions.attributes import SPACING
from medgen.generator import Generator
from medgen.provenance import sha256_array
from medgen.synthesis import SamplingSettings, sampling
from medgen.synthesis.editing import Edited, edit, replace_label, translate
from medgen.types import BadInputError, Grid

SETTINGS = SamplingSettings(num_inference_steps=4)
# Stored as P, L, S with three voxel sizes; the tiny model works on R, A, S at 1 mm.
TURNED = np.array([[0.0, -1.2, 0, 11], [-0.9, 0, 0, 5], [0, 0, 1.1, -4], [0, 0, 0, 1]])


def scan(spatial_dims: int, *, channels: int = 1, turned: bool = False) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    """A noisy ramp of intensities 100 to 900, a label of two boxes, and their grid."""
    shape = (12, 16, 14)[:spatial_dims] if spatial_dims == 3 else (20, 16)
    ramp = np.linspace(100, 900, int(np.prod(shape)))
    image = np.random.default_rng(0).permuted(ramp).reshape(shape)
    image = ndimage.gaussian_filter(image, 1) + np.linspace(0, 300, shape[0]).reshape(-1, *[1] * (spatial_dims - 1))
    label = torch.zeros(shape, dtype=torch.int16)
    label[(slice(2, 9),) * spatial_dims] = 1
    label[(slice(5, 8),) * spatial_dims] = 2
    affine = TURNED if turned else np.eye(4)
    return torch.from_numpy(image).float().expand(channels, *shape), label, Grid(shape, affine, known=spatial_dims == 3)


def box(shape: tuple[int, ...], *, low: int = 5, high: int = 9) -> torch.Tensor:
    region = torch.zeros(shape, dtype=torch.bool)
    region[(slice(low, high),) * len(shape)] = True
    return region


def run(generator: Generator, image: torch.Tensor, label: torch.Tensor | None, grid: Grid, **options: Any) -> Edited:
    return edit(generator, image, label, grid=grid, **{"seed": 1, "settings": SETTINGS, **options})


def widened(region: torch.Tensor, band: int) -> torch.Tensor:
    """Voxels at most `band` away, by comparing every voxel with every one of the region."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in region.shape)).double()
    distance = torch.cdist(places, region.nonzero().double()).min(1).values
    return (distance <= band + 1e-9).view(region.shape)


@pytest.mark.parametrize("band", [0, 1, 3])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_beyond_the_band_every_bit_stays_and_inside_the_scan_changes(
    make_generator: Callable[..., Generator], spatial_dims: int, band: int
) -> None:
    generator = make_generator(spatial_dims)
    image, label, grid = scan(spatial_dims, turned=True)
    image = image.clone()
    image[(0,) * (spatial_dims + 1)] = -0.0
    region = box(grid.shape)
    made = run(generator, image, label, grid, region=region, band=band)
    near = widened(region, band)
    before, after = image[0].numpy(), made.image[0].numpy()
    assert before[~near.numpy()].tobytes() == after[~near.numpy()].tobytes()
    assert (made.image - image)[0][near].abs().min() > 0
    assert (made.image - image)[0][region].abs().mean() > 0.05 * image.std()
    assert torch.equal(made.region, region)
    assert made.image.dtype == torch.float32 and not made.image.is_inference()


def test_in_the_band_the_mix_is_linear_in_the_distance(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2)
    image, label, grid = scan(2)
    region = torch.zeros(grid.shape, dtype=torch.bool)
    region[:, :5] = True
    made = run(generator, image, label, grid, region=region, band=4).image[0]
    # A wide band leaves what the model made unmixed only where the region is; a band of 0 shows it all.
    # The same noise and latent region, so the same networks' output: solve for the weights row by row.
    wide = run(generator, image, label, grid, region=region, band=9).image[0]
    change, wide_change = made - image[0], wide - image[0]
    for distance in range(1, 5):
        own, other = 1 - distance / 5, 1 - distance / 10
        torch.testing.assert_close(
            change[:, 4 + distance] / own, wide_change[:, 4 + distance] / other, atol=0.05, rtol=0
        )
    assert (change[:, 9:] == 0).all() and (wide_change[:, 9:14] != 0).any() and (wide_change[:, 14:] == 0).all()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_lesion_comes_and_goes_with_the_label(make_generator: Callable[..., Generator], spatial_dims: int) -> None:
    generator = make_generator(spatial_dims)
    image, label, grid = scan(spatial_dims)
    without = replace_label(label, 2)
    assert torch.equal(without, torch.where(label == 2, 1, label).to(torch.int16))
    out, into = (
        run(generator, image, label, grid, new_label=without),
        run(generator, image, without, grid, new_label=label),
    )
    for made, new_label in ((out, without), (into, label)):
        assert torch.equal(made.label, new_label) and made.label.dtype == torch.int16
        assert torch.equal(made.region, widened(label == 2, 2))
        assert torch.equal(made.image[0][~widened(made.region, 3)], image[0][~widened(made.region, 3)])
    # The same noise in the same place: what differs comes of the label.
    assert (out.image - into.image)[0][label == 2].abs().mean() > 0.01 * image.std()
    tight = run(generator, image, label, grid, new_label=without, margin=0)
    assert torch.equal(tight.region, label == 2)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_seeds_differ_inside_only_and_one_seed_repeats(
    make_generator: Callable[..., Generator], spatial_dims: int
) -> None:
    generator = make_generator(spatial_dims)
    image, label, grid = scan(spatial_dims, turned=True)
    region = box(grid.shape)
    first = run(generator, image, label, grid, region=region, band=1)
    other = run(generator, image, label, grid, region=region, band=1, seed=2)
    again = run(generator, image, label, grid, region=region, band=1)
    assert torch.equal(first.image, again.image) and first.record == again.record
    near = widened(region, 1)
    assert (first.image - other.image)[0][region].abs().mean() > 0.01 * image.std()
    assert torch.equal(first.image[0][~near], other.image[0][~near])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_little_strength_stays_near_what_the_autoencoder_makes_of_the_scan(
    make_generator: Callable[..., Generator], spatial_dims: int
) -> None:
    generator = make_generator(spatial_dims)
    image, label, grid = scan(spatial_dims)
    intensity = generator.config.normalization.fit(image)
    with torch.inference_mode():
        kept = intensity.inverse(generator.decode(generator.encode(intensity.forward(image)[None]))[0])
    change = [
        (translate(generator, image, label, grid=grid, strength=strength, seed=1, settings=SETTINGS).image - kept).abs()
        for strength in (0.05, 0.4, 1.0)
    ]
    small, middle, large = (value.mean() for value in change)
    assert small < 0.25 * large
    assert small < middle < large


def test_a_volume_in_another_orientation_gives_the_same_edit_in_space(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(3)
    image, label, grid = scan(3)
    region, new_label = box(grid.shape, low=4), replace_label(label, 2)
    affine = grid.affine
    straight = run(generator, image, label, grid, region=region, new_label=new_label)

    def turn(array: torch.Tensor) -> torch.Tensor:
        return array.movedim(-3, -1).flip(-2)

    # Axes y, z, x of the first, z reversed: P x S by the affine of where each voxel is.
    moved = np.eye(4)
    moved[:3, :3] = np.stack([affine[:3, 1], -affine[:3, 2], affine[:3, 0]], axis=1)
    moved[:3, 3] = affine[:3, 3] + (grid.shape[2] - 1) * affine[:3, 2]
    turned = run(
        generator,
        turn(image),
        turn(label),
        Grid(tuple(turn(label).shape), moved),
        region=turn(region),
        new_label=turn(new_label),
    )
    torch.testing.assert_close(turned.image, turn(straight.image), atol=1e-2, rtol=0)
    assert torch.equal(turned.label, turn(new_label))
    assert turned.image.shape != image.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.float64])
def test_the_type_of_the_scan_stays(make_generator: Callable[..., Generator], dtype: torch.dtype) -> None:
    generator = make_generator(3)
    image, label, grid = scan(3, turned=True)
    low, high = (0, 255) if dtype == torch.uint8 else (-500, 900) if dtype == torch.int16 else (0, 900)
    unit = (image - image.min()) / (image.max() - image.min())
    typed = torch.from_numpy(np.round((low + (high - low) * unit).numpy())).to(dtype)
    made = run(generator, typed, label, grid, region=box(grid.shape), band=1)
    assert made.image.dtype == dtype and made.image.shape == image.shape
    far = ~widened(box(grid.shape), 1).numpy()
    before, after = typed[0].numpy(), made.image[0].numpy()
    assert (before[far] == after[far]).all() and (before[~far] != after[~far]).mean() > 0.5
    exact = run(generator, typed.double(), label, grid, region=box(grid.shape), band=1).image[0].numpy()
    assert np.abs(after - exact).max() <= (0 if dtype == torch.float64 else 0.5)
    # Source units, not those of the model's own training scans: within what normalization keeps of this scan.
    bounds = np.percentile(before, [0.5, 99.5])
    inside = after[box(grid.shape).numpy()]
    assert bounds[0] - 1 <= inside.min() and inside.max() <= bounds[1] + 1


def test_the_latents_that_may_change_are_all_that_touch_the_region_or_its_mirror_in_the_padding(
    make_generator: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    plain = sampling.sample

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(options["region"])
        return plain(*args, **options)

    monkeypatch.setattr(sampling, "sample", watched)
    generator = make_generator(2)
    image, label, _ = scan(2)
    grid = Grid((19, 16), np.eye(4), known=False)
    region = torch.zeros(grid.shape, dtype=torch.bool)
    region[7, 4] = region[0, 15] = region[17, 0] = True
    run(generator, image[:, :19], label[:19], grid, region=region)
    expected = torch.zeros(10, 8, dtype=torch.bool)
    expected[3, 2] = expected[0, 7] = expected[8, 0] = expected[9, 0] = True
    assert torch.equal(seen[0][0, 0], expected)


def test_text_facts_and_edges_steer_an_edit(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2, conditions=("mask", "edge", "text", "view", SPACING))
    image, label, grid = scan(2)
    known = Grid(grid.shape, np.diag([1.0, 1.0, 1.0, 1.0]))
    wide = Grid(grid.shape, np.diag([3.0, 3.0, 1.0, 1.0]))
    options: dict[str, Any] = {"region": box(grid.shape), "band": 0}
    plain = run(generator, image, label, known, **options)
    edge = (label > 0).float()[None]
    for change in ({"text": "effusion"}, {"facts": {"view": "AP"}}, {"edge": edge}):
        steered = run(generator, image, label, known, **options, **change)
        assert (steered.image - plain.image)[0][options["region"]].abs().max() > 1e-3 * image.std(), change
        assert steered.record != plain.record
    assert (run(generator, image, label, wide, **options).image - plain.image).abs().max() > 1e-3 * image.std()
    assert (run(generator, image, None, known, **options).image - plain.image).abs().max() > 1e-3 * image.std()
    said = run(generator, image, label, known, **options, text="effusion", facts={"view": "AP"}).record["conditions"]
    assert said == {"text": "effusion", "attributes": {"view": "AP", SPACING: "[1.0, 1.0]"}}


def test_a_model_in_color_without_label_maps_edits_by_region(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2, channels=3, label=False, conditions=())
    image, label, grid = scan(2, channels=3)
    region = box(grid.shape)
    made = run(generator, image, label, grid, region=region, band=0)
    assert torch.equal(made.label, label)
    assert torch.equal(made.image[:, ~region], image[:, ~region])
    assert (made.image - image)[:, region].abs().mean() > 0.01 * image.std()
    assert run(generator, image, None, grid, region=region).label is None


def test_the_record_says_how(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2)
    image, label, grid = scan(2)
    steps: list[int] = []
    made = run(generator, image, label, grid, region=box(grid.shape), strength=0.5, band=2, on_step=steps.append)
    record = made.record
    assert steps == [1, 2, 3, 4]
    assert (record["strength"], record["band"], record["seed"], record["voxels"]) == (0.5, 2, 1, 16)
    assert record["settings"]["guidance_scale"] == 1.5 and record["settings"]["temperature"] == 0.9
    assert record["network_evaluations"] == 8
    assert record["image_sha256"] == sha256_array(image) and record["label_sha256"] == sha256_array(label)


def test_a_translation_takes_all_of_the_scan_and_leaves_the_label(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2)
    image, label, grid = scan(2)
    made = translate(generator, image, label, grid=grid, strength=0.7, seed=3, settings=SETTINGS)
    assert made.region.all() and torch.equal(made.label, label)
    assert ((made.image - image) != 0).float().mean() > 0.95


def test_what_goes_becomes_the_nearest_class_or_the_named_one() -> None:
    label = torch.tensor([[0, 0, 2, 2, 2, 1, 1, 1]], dtype=torch.int16)
    assert replace_label(label, 2)[0, [2, 4]].tolist() == [0, 1]
    assert replace_label(label, 2, 0).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    within = torch.tensor([[False] * 4 + [True] * 4])
    # The nearest voxel of another class: not one of the same class that stays.
    assert replace_label(label, 2, within=within).tolist() == [[0, 0, 2, 2, 1, 1, 1, 1]]
    tall = torch.tensor([[0, 2, 1], [0, 2, 1], [3, 3, 3]], dtype=torch.uint8)
    assert replace_label(tall, 2, spacing=(1.0, 5.0))[1, 1] == 3
    assert replace_label(tall, 2, spacing=(5.0, 1.0))[1, 1] in (0, 1)
    assert replace_label(tall, 2).dtype == torch.uint8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": 3}, r"value: expected a class of the label there, got 3; the label has \[0, 1, 2\]"),
        ({"value": 2, "by": 2}, "by: expected another class than 2"),
        ({"value": 2, "within": torch.zeros(20, 16).bool()}, "value: expected a class of the label there, got 2"),
        ({"value": 2, "within": torch.ones(16, 20).bool()}, r"within: expected bool \(20, 16\), got .* \(16, 20\)"),
        ({"value": 2, "within": torch.ones(20, 16)}, r"within: expected bool \(20, 16\), got torch.float32"),
    ],
)
def test_a_replacement_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        replace_label(scan(2)[1], **arguments)
    with pytest.raises(BadInputError, match="label: expected a class besides 2, got none"):
        replace_label(torch.full((3, 3), 2), 2)


LABEL = scan(2)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"region": torch.zeros(20, 16).bool()}, "region: expected voxels that may change, got none"),
        ({"region": torch.ones(16, 20).bool()}, r"region: expected bool of the shape .*\(20, 16\), got .*\(16, 20\)"),
        ({"region": torch.ones(20, 16)}, r"region: expected bool .* got torch.float32"),
        ({"region": None}, "region: expected one, or label and new_label, .* got neither"),
        (
            {"new_label": LABEL.clone().fill_(1)},
            r"new_label: expected the label outside of the region, .* got 27\d other voxels",
        ),
        ({"region": None, "new_label": LABEL}, "new_label: expected a label that differs from label, got the same"),
        (
            {"new_label": LABEL[:9]},
            r"new_label: expected integers of the shape of the scan \(20, 16\), got .*\(9, 16\)",
        ),
        ({"new_label": LABEL.float()}, "new_label: expected integers .* got torch.float32"),
        ({"label": LABEL[:9]}, r"label: expected integers of the shape of the scan \(20, 16\), got .*\(9, 16\)"),
        ({"region": None, "new_label": LABEL * 3}, r"label: expected values among \[0, 1, 2\], got \[3, 6\]"),
        ({"strength": 0.0}, r"strength: expected a share in \(0, 1\], got 0.0"),
        ({"strength": 1.5}, r"strength: expected a share in \(0, 1\], got 1.5"),
        ({"strength": float("nan")}, r"strength: expected a share in \(0, 1\], got nan"),
        ({"band": -1}, "band: expected a width of 0 voxels or more, got -1"),
        ({"margin": -1}, "margin: expected a width of 0 voxels or more, got -1"),
        ({"image": torch.full((1, 20, 16), 7)}, "image: expected varying intensities, got the constant 7"),
        ({"image": torch.rand(3, 20, 16)}, r"image: expected the 1 channel\(s\) of the model 'tiny-2d' \(MR\), got 3"),
        ({"image": torch.rand(1, 16, 20)}, r"image: expected .* then the grid \(20, 16\), got shape \(1, 16, 20\)"),
        ({"grid": scan(3)[2]}, "grid: expected a 2D scan for the model 'tiny-2d', got 3D"),
        ({"text": "effusion"}, "prompts: expected none, because the model 'tiny-2d' is steered by mask; not by text"),
        ({"facts": {"view": "AP"}}, "attribute 'view': expected none"),
        ({"edge": torch.zeros(1, 20, 16)}, "edge: expected none"),
        ({"settings": SamplingSettings(sampler="ddim")}, "sampler: expected one of"),
        ({"strength": 0.002}, "num_inference_steps: expected 1 to 2, .* at strength 0.002, got 4"),
    ],
)
def test_an_edit_that_cannot_be_is_refused(
    make_generator: Callable[..., Generator], arguments: dict[str, Any], message: str
) -> None:
    image, label, grid = scan(2)
    given = {"image": image, "label": label, "grid": grid, "region": box(grid.shape), **arguments}
    with pytest.raises(BadInputError, match=message):
        run(make_generator(2), **given)


def test_a_new_label_needs_a_model_that_listens_to_label_maps(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2, label=False, conditions=())
    image, label, grid = scan(2)
    with pytest.raises(BadInputError, match="new_label: expected none, because the model 'tiny-2d' is steered by"):
        run(generator, image, label, grid, new_label=replace_label(label, 2))


def test_edges_of_another_size_or_range_are_refused(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2, conditions=("mask", "edge"))
    image, label, grid = scan(2)
    for edge in (torch.zeros(1, 9, 16), torch.full((1, 20, 16), 2.0)):
        with pytest.raises(BadInputError, match="edge map: expected"):
            run(generator, image, label, grid, region=box(grid.shape), edge=edge)
