"""Lesions put into scans: where they may come, that the label follows, and that all else stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from medgen.data.intensity import Normalization
from medgen.generator import Generator
from medgen.synthesis import SamplingSettings, edit
from medgen.transforms import RandLesionInsertion, RandLesionInsertiond
from medgen.types import BadInputError, Grid

FAST: dict[str, Any] = {"num_inference_steps": 2, "precision": "fp32"}
SHAPES = {2: (26, 22), 3: (14, 18, 16)}
CORNER = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=bool)  # no symmetry hides a flip


def scan(dims: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of 100 to 900 and an organ in a box."""
    image = torch.from_numpy(np.random.default_rng(0).uniform(100, 900, (1, *SHAPES[dims]))).float()
    label = torch.zeros(1, *SHAPES[dims], dtype=torch.uint8)
    label[(0, *[slice(3, 11)] * dims)] = 1
    return image, label


def donor(dims: int = 2) -> torch.Tensor:
    """A label map with one lesion, of another shape than the scan."""
    label = torch.zeros(1, *[9] * dims, dtype=torch.uint8)
    corner = CORNER if dims == 2 else np.stack([CORNER, CORNER * 0, CORNER * 0]) | CORNER[:, :1, None]
    label[(0, *[slice(4, 7)] * dims)] = torch.from_numpy(corner.astype(np.uint8)) * 2
    return label


def insertion(generator: Any, seed: int = 0, **options: Any) -> RandLesionInsertion:
    defaults: dict[str, Any] = {"value": 2, "within": [1], "prob": 1.0, **FAST}
    return RandLesionInsertion(generator, **{**defaults, **options}).set_random_state(seed)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_label_gets_the_lesion_and_beyond_the_band_every_bit_stays(
    make_generator: Callable[..., Generator], dims: int
) -> None:
    generator = make_generator(dims)
    image, label = scan(dims)
    transform = insertion(generator, lesions=[donor(dims)], band=1, margin=1)
    given = MetaTensor(image, affine=np.eye(4))
    made, after = transform(given, MetaTensor(label, affine=np.eye(4)))
    put = after.as_tensor()[0] == 2
    found = put[tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in put.nonzero().T)]
    pattern = donor(dims)[0] == 2
    whole = pattern[tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in pattern.nonzero().T)]
    assert torch.equal(found, whole)
    assert (label[0][put] == 1).all() and torch.equal(after.as_tensor()[0][~put], label[0][~put])
    distance = ndimage.distance_transform_edt(~put.numpy())
    kept = made.as_tensor()[0].numpy()[distance > 2.9]  # one voxel of margin, one of the band, and the diagonals
    assert kept.tobytes() == image[0].numpy()[distance > 2.9].tobytes()
    assert (made.as_tensor() - image)[0][put].abs().min() > 0
    assert after.dtype == label.dtype and isinstance(made, MetaTensor) and isinstance(after, MetaTensor)
    by_hand = edit(
        generator,
        image,
        label[0].long(),
        grid=Grid(SHAPES[dims], np.eye(4)),
        new_label=after.as_tensor()[0].long(),
        seed=transform.last.noising.seed,
        band=1,
        margin=1,
        settings=SamplingSettings(num_inference_steps=2),
    )
    assert torch.equal(by_hand.image, made.as_tensor())


def test_every_place_where_it_fits_is_drawn_and_no_other(make_generator: Callable[..., Generator]) -> None:
    transform = insertion(make_generator(), lesions=[donor()])
    image, label = scan()
    label[0, 6, 6] = 0  # a hole in the organ
    mask = donor()[0].numpy()[4:6, 4:7] == 2
    places = {
        (row, column)
        for row in range(SHAPES[2][0] - 1)
        for column in range(SHAPES[2][1] - 2)
        if (label[0].numpy()[row : row + 2, column : column + 3][mask] == 1).all()
    }
    drawn: dict[tuple[int, int], int] = {}
    for _ in range(1500):
        transform.randomize((image, label, None))
        first = tuple(np.argwhere(transform.last.covered)[0].tolist())
        drawn[first] = drawn.get(first, 0) + 1
    assert set(drawn) == places
    expected = 1500 / len(places)
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in drawn.values())


def test_parts_are_taken_one_at_a_time(make_generator: Callable[..., Generator]) -> None:
    several = donor()
    several[0, 1, 1] = several[0, 2, 2] = 2  # joined by a corner
    several[0, 0, 4:6] = several[0, 3:6, 8] = 2  # cut by the border
    transform = insertion(make_generator(), lesions=[several, donor()])
    assert sorted(int(lesion.mask.sum()) for lesion in transform.lesions) == [2, 4, 4]
    sizes = {int((transform(*scan())[1] == 2).sum()) for _ in range(8)}
    assert sizes == {2, 4}


def test_a_scan_without_a_place_stays(make_generator: Callable[..., Generator]) -> None:
    image, label = scan()
    for where in (label * 0, (label > 0).byte() * (torch.arange(22) % 2)):
        made, after = insertion(make_generator(), lesions=[donor()])(image, where.to(torch.uint8))
        assert made is image and torch.equal(after, where.to(torch.uint8))
    large = torch.zeros(1, 40, 40)
    large[:, 1:-1, 1:-1] = 2
    assert insertion(make_generator(), lesions=[large])(image, label)[0] is image


def test_a_given_lesion_stays_in_place_within_the_organ(make_generator: Callable[..., Generator]) -> None:
    image, label = scan()
    lesion = torch.zeros_like(label)
    lesion[0, 9:14, 5:8] = 2
    made, after = insertion(make_generator(), move=False)(image, label, lesion)
    assert torch.equal(after[0] == 2, (lesion[0] == 2) & (label[0] == 1)) and (after == 2).sum() == 6
    assert not torch.equal(made, image)
    data = {"image": image, "other": image, "label": label, "lesion": lesion}
    loop = RandLesionInsertiond(
        ("image", "other"), "label", make_generator(), 2, [1], lesion_key="lesion", move=False, prob=1.0, **FAST
    )
    done = loop.set_random_state(0)(data)
    assert torch.equal(done["label"], after) and torch.equal(done["image"], done["other"])
    assert torch.equal(data["label"], label) and torch.equal(done["lesion"], lesion)
    never = RandLesionInsertiond("image", "label", make_generator(), 2, [1], [donor()], prob=0.0, **FAST)(data)
    assert never["image"] is image and never["label"] is label


def test_draws_come_from_its_own_state_only(make_generator: Callable[..., Generator]) -> None:
    data = dict(zip(("image", "label"), scan(), strict=True))

    def run(seed: int) -> list[dict[str, Any]]:
        loop = RandLesionInsertiond("image", "label", make_generator(), 2, [1], [donor()], prob=0.6, **FAST)
        loop.set_random_state(seed)
        return [loop(data) for _ in range(5)]

    first, again, other = run(0), run(0), run(1)
    for key in data:
        assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a[key], b[key]) for a, b in zip(first, other, strict=True))


def test_what_stays_is_bit_identical_in_scaled_units_too(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(normalization=Normalization("window", 0.0, 1000.0))
    image, label = scan()
    unit = (image.double() / 1000) ** 0.7  # no round numbers
    made, after = insertion(generator, lesions=[donor()], scaled_window=(0, 1))(unit, label)
    far = ndimage.distance_transform_edt(after[0].numpy() != 2) > 2 + 3 + 1
    assert far.mean() > 0.3 and np.array_equal(made[0].numpy()[far], unit[0].numpy()[far])
    assert (made - unit)[0][after[0] == 2].abs().min() > 0
    assert isinstance(insertion(generator, lesions=[donor()])(image.numpy(), label.numpy())[0], np.ndarray)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"within": [1, 2]}, r"within: expected the classes that a lesion of class 2 may cover, got \[1, 2\]"),
        ({"within": []}, "within: expected the classes"),
        ({"value": 5}, r"lesions\[0\]: expected voxels of class 5, got \[0, 2\] only"),
        ({"within": [1, 7]}, r"value and within: expected classes of the model 'tiny-2d', \[0, 1, 2\], got \[7\]"),
        ({"lesions": []}, "lesion: expected a label map with one, or some given before, got none"),
        ({"lesions": [donor(3)]}, "lesion: expected a label map of 2 axes, got one of 3"),
        ({"strength": 0}, "strength: expected a share"),
        ({"band": -1}, "band: expected a width of 0 voxels or more, got -1"),
        ({"margin": -1}, "margin: expected a width of 0 voxels or more, got -1"),
        ({"move": False}, r"lesion: expected the voxels of the scan \(26, 22\), got \(9, 9\)"),
        ({"prob": 2}, "prob: expected a chance"),
    ],
)
def test_options_that_cannot_be_are_refused(
    make_generator: Callable[..., Generator], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        insertion(make_generator(), **{"lesions": [donor()], **options})(*scan())


def test_lesions_are_neither_turned_nor_stretched(make_generator: Callable[..., Generator]) -> None:
    image, label = (MetaTensor(part, affine=np.diag([1.0, 1.0, 1.0, 1.0])) for part in scan(3))
    image.meta["original_affine"] = np.eye(4)  # as read from a file
    wide = MetaTensor(donor(3), affine=np.diag([1.0, 1.0, 2.5, 1.0]))
    turned = MetaTensor(donor(3), affine=np.diag([-1.0, 1.0, 1.0, 1.0]))
    for lesion, got in ((wide, "RAS at 1 x 1 x 2.5 mm"), (turned, "LAS at 1 x 1 x 1 mm")):
        message = f"lesion: expected the orientation and voxels of the scan, RAS at 1 x 1 x 1 mm, got {got}"
        with pytest.raises(BadInputError, match=message):
            insertion(make_generator(3), lesions=[lesion])(image, label)


def test_a_model_that_no_label_steers_and_missing_keys_are_refused(make_generator: Callable[..., Generator]) -> None:
    with pytest.raises(BadInputError, match="new_label: expected none, because the model 'tiny-2d' is steered by"):
        insertion(make_generator(conditions=()), lesions=[donor()])(*scan())
    with pytest.raises(BadInputError, match="lesions: expected some, or a lesion_key, got neither"):
        RandLesionInsertiond("image", "label", make_generator(), 2, [1])
    with pytest.raises(BadInputError, match="lesions: expected some, or a lesion_key, got both"):
        RandLesionInsertiond("image", "label", make_generator(), 2, [1], [donor()], lesion_key="lesion")
    loop = RandLesionInsertiond("image", "label", make_generator(), 2, [1], lesion_key="lesion", prob=0.0)
    with pytest.raises(BadInputError, match="label_key: expected 'label' in the sample"):
        loop({"image": scan()[0]})
    with pytest.raises(BadInputError, match="lesion_key: expected 'lesion' in the sample"):
        loop({"image": scan()[0], "label": scan()[1]})


@pytest.mark.parametrize(
    ("lesion", "message"),
    [
        (torch.zeros(1, 26, 22), r"lesion: expected voxels of class 2, got \[0\] only.*stays as it is \(told once\)"),
        (torch.full((1, 5, 5), 2), "lesion: expected a part of class 2 that the border of the map does not cut"),
    ],
)
def test_a_partner_without_a_lesion_leaves_the_sample_with_one_warning(
    make_generator: Callable[..., Generator], lesion: torch.Tensor, message: str
) -> None:
    image, label = scan()
    loop = RandLesionInsertiond("image", "label", make_generator(), 2, [1], lesion_key="lesion", prob=1.0, **FAST)
    with pytest.warns(UserWarning, match=message) as told:
        for _ in range(3):
            done = loop({"image": image, "label": label, "lesion": lesion})
            assert done["image"] is image and done["label"] is label
    assert len(told) == 1
    assert (loop({"image": image, "label": label, "lesion": donor()})["label"] == 2).any()


def test_a_lesion_is_replayed_on_scans_of_the_same_voxels_only(make_generator: Callable[..., Generator]) -> None:
    image, label = scan()
    loop = RandLesionInsertiond(("a", "b"), "label", make_generator(), 2, [1], [donor()], prob=1.0, **FAST)
    data = {"a": image, "b": image, "label": label}
    first = loop.set_random_state(0)(data)
    record = loop.last
    assert torch.equal(first["a"], first["b"]) and not torch.equal(loop(data)["label"], first["label"])
    loop.last = record
    again = loop(data, randomize=False)
    assert all(torch.equal(first[key], again[key]) for key in data)
    with pytest.raises(BadInputError, match=r"image: expected the \(26, 22\) voxels .* got \(25, 22\). Bring all"):
        loop({key: value[:, 1:] for key, value in data.items()}, randomize=False)
