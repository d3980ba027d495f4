"""Composites of real and synthetic scans: which voxels come from which, and from where the partner comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medgen.generator import Generator
from medgen.transforms import RandDiffusionComposit, RandDiffusionCompositd, RandDiffusionVariation
from medgen.types import BadInputError

FAST: dict[str, Any] = {"num_inference_steps": 2, "precision": "fp32"}
REAL, MADE = torch.ones(1, 24, 20), torch.zeros(1, 24, 20)


def scan() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.from_numpy(np.random.default_rng(0).uniform(100, 900, (1, 20, 16))).float()
    label = torch.zeros(1, 20, 16, dtype=torch.uint8)
    label[0, 4:12, 4:12] = 1
    return image, label


def borders(values: torch.Tensor, axis: int) -> set[int]:
    """Places along an axis where anything changes."""
    change = values.diff(dim=axis).abs().flatten()
    shape = list(values.shape)
    shape[axis] -= 1
    other = [index for index in range(values.ndim) if index != axis]
    return set(torch.nonzero(change.view(shape).sum(other))[:, 0].add(1).tolist())


@pytest.mark.parametrize(("shape", "cell"), [((24, 20), 6), ((24, 20), (6, 9)), ((12, 14, 9), (4, 5, 3))])
def test_a_composite_is_made_of_whole_cells(shape: tuple[int, ...], cell: Any) -> None:
    transform = RandDiffusionComposit(prob=1.0, cell_size=cell).set_random_state(0)
    sizes = cell if isinstance(cell, tuple) else (cell,) * len(shape)
    starts: list[set[int]] = [set() for _ in shape]
    for _ in range(60):
        mixed = transform(torch.ones(2, *shape), synthetic=torch.zeros(2, *shape))
        assert torch.equal(mixed[0], mixed[1])  # channels are not torn apart
        for axis, size in enumerate(sizes):
            places = borders(mixed[0], axis)
            assert len({place % size for place in places}) <= 1
            starts[axis] |= {place % size for place in places}
    assert all(len(found) == size for found, size in zip(starts, sizes, strict=True))  # no fixed seams


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_cells_are_real_as_often_as_asked(share: float) -> None:
    transform = RandDiffusionComposit(prob=1.0, cell_size=2, real_share=share).set_random_state(0)
    found = np.mean([float(transform(REAL, synthetic=MADE).mean()) for _ in range(40)])
    # About 143 cells each time, so that four standard errors are below 0.03.
    assert abs(found - share) < 0.03


def test_the_published_numbers_are_the_default() -> None:
    transform = RandDiffusionComposit(prob=1.0).set_random_state(0)
    mixed = torch.stack([transform(torch.ones(1, 384, 384), synthetic=torch.zeros(1, 384, 384)) for _ in range(30)])
    assert {place % 64 for place in borders(mixed[0, 0], 0)} == {next(iter(borders(mixed[0, 0], 0))) % 64}
    assert abs(float(mixed.mean()) - 0.6) < 0.06  # 30 scans of 36 to 49 cells


def test_real_cells_are_bit_identical_and_the_others_are_the_variation(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator()
    image, label = scan()
    transform = RandDiffusionComposit(generator, prob=1.0, cell_size=4, strength=(0.3, 0.6), **FAST).set_random_state(2)
    given = MetaTensor(image, affine=np.diag([2.0, 2.0, 1.0, 1.0]))
    mixed = transform(given, label)
    partner = RandDiffusionVariation(generator, prob=1.0, **FAST)
    partner.last = transform.last.noising
    made = partner(given, label, randomize=False)
    real = (mixed.as_tensor() == image)[0]
    assert torch.equal(real, transform.last.real) and 0.2 < real.float().mean() < 0.95
    assert torch.equal(mixed.as_tensor()[:, ~real], made.as_tensor()[:, ~real])
    assert isinstance(mixed, MetaTensor) and torch.equal(mixed.affine, given.affine)


def test_a_sample_may_bring_its_partners() -> None:
    data = {"a": REAL, "b": REAL * 3, "sa": MADE, "sb": MADE, "label": REAL.int()}
    options: dict[str, Any] = {"synthetic_key": ("sa", "sb"), "prob": 0.5, "cell_size": 5}
    first = RandDiffusionCompositd(("a", "b"), **options).set_random_state(1)
    again = RandDiffusionCompositd(("a", "b"), **options).set_random_state(1)
    made = [first(data) for _ in range(12)]
    assert all(torch.equal(one["a"], again(data)["a"]) for one in made)
    assert all(torch.equal(one["a"] * 3, one["b"]) and one["label"] is data["label"] for one in made)
    assert 0 < sum(torch.equal(one["a"], REAL) for one in made) < 12
    assert torch.equal(data["a"], torch.ones_like(REAL))


def test_a_sample_may_have_its_partner_made(make_generator: Callable[..., Generator]) -> None:
    image, label = scan()
    generator = make_generator()
    mix = RandDiffusionCompositd("image", generator, "label", prob=1.0, cell_size=4, **FAST).set_random_state(0)
    made = mix({"image": image, "label": label})
    same = RandDiffusionComposit(generator, prob=1.0, cell_size=4, **FAST).set_random_state(0)(image, label)
    assert torch.equal(made["image"], same) and torch.equal(made["label"], label)
    assert not torch.equal(made["image"], image)


@pytest.mark.parametrize("like", [REAL.to(torch.uint8), REAL.double(), REAL.numpy()])
def test_kind_and_number_type_stay(like: Any) -> None:
    mixed = RandDiffusionComposit(prob=1.0, cell_size=5).set_random_state(0)(like, synthetic=MADE)
    assert type(mixed) is type(like) and mixed.dtype == like.dtype
    assert 0 < float(np.asarray(mixed, dtype=float).mean()) < 1


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, np.uint8])
def test_partners_are_rounded_into_the_number_type_of_the_scan(kind: Any) -> None:
    given = REAL.to(kind) if isinstance(kind, torch.dtype) else REAL.numpy().astype(kind)
    mix = RandDiffusionComposit(prob=1.0, cell_size=5, real_share=0.0)
    assert (torch.as_tensor(mix(given, synthetic=MADE + 99.9)) == 100).all()
    if kind != torch.int16:
        assert (torch.as_tensor(mix(given, synthetic=MADE + 300)) == 255).all()
        assert (torch.as_tensor(mix(given, synthetic=MADE - 3)) == 0).all()


def test_cells_are_replayed_on_scans_of_the_same_voxels_only() -> None:
    mix = RandDiffusionCompositd(("a", "b"), synthetic_key=("sa", "sb"), prob=1.0, cell_size=5).set_random_state(0)
    data = {"a": REAL, "b": REAL, "sa": MADE, "sb": MADE}
    first, changed = mix(data), mix({**data, "a": REAL + 1})
    assert not torch.equal(changed["b"], first["b"])
    assert torch.equal(mix(data, randomize=False)["b"], changed["b"])
    small = {"b": REAL[:, 1:], "sb": MADE[:, 1:]}
    with pytest.raises(BadInputError, match=r"image: expected the \(24, 20\) voxels .* got \(23, 20\). Bring all"):
        mix({**data, **small})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell_size": 0}, "cell_size: expected at least 1 voxel, got 0"),
        ({"cell_size": (4, 4, 4)}, "cell_size: expected one number, or one per axis of a 2D scan"),
        ({"cell_size": 24}, r"cell_size: expected cells smaller than the scan of \(24, 20\) voxels"),
        ({"real_share": 1.1}, r"real_share: expected a share in \[0, 1\], got 1.1"),
        ({"prob": -0.1}, r"prob: expected a chance in \[0, 1\], got -0.1"),
        ({"strength": 0.4}, "strength: expected none without a generator"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        RandDiffusionComposit(**{"prob": 1.0, "cell_size": 4, **options})(REAL, synthetic=MADE)


def test_a_partner_that_does_not_fit_is_refused(make_generator: Callable[..., Generator]) -> None:
    mix = RandDiffusionComposit(prob=0.0, cell_size=4)
    with pytest.raises(BadInputError, match=r"synthetic: expected the shape of the scan \(1, 24, 20\), got .*19"):
        mix(REAL, synthetic=MADE[..., :19])
    with pytest.raises(BadInputError, match="synthetic: expected the affine of the scan, got another"):
        mix(*(MetaTensor(REAL, affine=np.diag([size, 1, 1, 1])) for size in (2.0,)), synthetic=moved())
    with pytest.raises(BadInputError, match="synthetic: expected a scan or a generator that makes it, got neither"):
        mix(REAL)
    with pytest.raises(BadInputError, match=r"synthetic: expected .* got both"):
        RandDiffusionComposit(make_generator())(REAL, synthetic=MADE)
    with pytest.raises(BadInputError, match="synthetic_key: expected a key or a generator, got neither"):
        RandDiffusionCompositd("image")
    with pytest.raises(BadInputError, match="synthetic_key: expected a key or a generator, got both"):
        RandDiffusionCompositd("image", make_generator(), synthetic_key="made")
    with pytest.raises(BadInputError, match="synthetic_key: expected one for each of"):
        RandDiffusionCompositd(("a", "b"), synthetic_key="made")
    with pytest.raises(BadInputError, match="synthetic_key: expected 'made' in the sample"):
        RandDiffusionCompositd("image", synthetic_key="made", prob=0.0)({"image": REAL})
    with pytest.raises(BadInputError, match="label_key: expected 'label' in the sample"):
        RandDiffusionCompositd("image", make_generator(), "label", prob=0.0)({"image": REAL})


def moved() -> MetaTensor:
    return MetaTensor(MADE, affine=np.array([[2.0, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
