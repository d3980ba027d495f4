"""Pairs of worse and good scans: nothing shifts, noise and blur are those of theory, originals stay."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchio as tio
from monai.data import MetaTensor
from monai.transforms import Compose, Transform

from medgen.transforms.degradation import (
    LowDose,
    LowDosed,
    LowResolution,
    LowResolutiond,
    RandLowDose,
    RandLowDosed,
    RandLowResolution,
    RandLowResolutiond,
)
from medgen.types import BadInputError


@pytest.mark.parametrize("factor", [2, 3, 4, 6.4])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ramp_does_not_shift(factor: float, axis: int) -> None:
    shape = [1, 6, 6, 6]
    shape[axis + 1] = 96
    ramp = torch.arange(96.0).view([-1 if index == axis else 1 for index in range(-1, 3)]).expand(shape)
    after = LowResolution(factor, axis)(ramp)
    inner = after.narrow(axis + 1, 24, 48)
    torch.testing.assert_close(inner, ramp.narrow(axis + 1, 24, 48), atol=1e-3, rtol=0)


def test_the_profile_is_as_wide_as_the_slice_is_thick() -> None:
    places = torch.arange(240.0)
    points = torch.arange(116, 124)
    # The second row sets the scale of a channel, for which one voxel is too little.
    scans = torch.zeros(8, 2, 240)
    scans[:, 1] = 1.0
    scans[torch.arange(8), 0, points] = 1.0
    after = LowResolution(8, -1)(scans)[:, 0]
    assert float(after.sum(1).mean()) == pytest.approx(1.0, rel=1e-3)
    assert float((after * (places - points[:, None])).sum(1).mean()) == pytest.approx(0.0, abs=1e-3)
    # Variances add: the Gaussian over voxels of width 1, its samples between two voxels, the triangle of the way back.
    sigma = math.sqrt(8**2 - 1) / (2 * math.sqrt(2 * math.log(2)))
    variance = float((after * (places - points[:, None]) ** 2).sum(1).mean())
    assert variance == pytest.approx(sigma**2 + 1 / 12 + 1 / 4 + 8**2 / 6, rel=0.01)


def test_a_constant_and_a_single_slice_stay() -> None:
    torch.testing.assert_close(LowResolution(5, None)(torch.full((2, 13, 17), 3.0)), torch.full((2, 13, 17), 3.0))
    image = torch.rand(1, 12, 12, 1)
    torch.testing.assert_close(LowResolution(4, -1)(image), image)
    torch.testing.assert_close(LowResolution(1, None)(image), image)


def test_only_the_named_axis_loses_detail() -> None:
    stripes = torch.zeros(1, 24, 24)
    stripes[:, ::2] = 1.0
    torch.testing.assert_close(LowResolution(4, 1)(stripes), stripes)
    assert float(LowResolution(4, 0)(stripes)[:, 6:18].std()) < 0.05


@pytest.mark.parametrize(
    ("spacing", "order", "expected"),
    [
        ((0.7, 0.7, 5.0), (0, 1, 2), 2),  # slices are thick, wherever they are stored
        ((0.7, 0.7, 5.0), (2, 0, 1), 0),
        ((4.0, 0.9, 0.9), (0, 1, 2), 0),  # sagittal
        ((4.0, 0.9, 0.9), (1, 0, 2), 1),
        ((1.0, 1.0, 1.0), (0, 1, 2), 2),  # superior-inferior among equals
        ((1.0, 1.0, 1.0), (2, 1, 0), 0),
        ((0.98, 0.98, 0.5), (0, 2, 1), 1),  # thin slices of CT
    ],
)
def test_the_axis_of_the_slices_is_read_from_the_affine(spacing, order, expected) -> None:
    affine = np.diag([*spacing, 1.0])[:, [*order, 3]]
    affine[:3, :2] *= -1  # the way that an axis leads does not matter
    volume = torch.rand(1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    after, before = LowResolution(4)(MetaTensor(volume, affine=affine)), LowResolution(4, expected)(volume)
    assert torch.equal(after.as_tensor(), before)


def test_plain_volumes_are_lowered_along_the_last_axis_and_pictures_along_both() -> None:
    volume = torch.rand(1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LowResolution(4)(volume), LowResolution(4, -1)(volume))
    stripes = torch.zeros(1, 24, 24)
    stripes[:, ::2] = 1.0
    for picture in (stripes, stripes.movedim(1, 2), MetaTensor(stripes, affine=np.diag([1.0, 2.0, 1.0, 1.0]))):
        assert float(LowResolution(4)(picture)[:, 6:18, 6:18].std()) < 0.05
        made = RandLowResolutiond("image", None, factor=(4, 4))({"image": picture})["image"]
        assert torch.equal(made, LowResolution(4, None)(picture))
    # TorchIO holds a picture as a volume of one slice.
    held = LowResolution(4)(tio.ScalarImage(tensor=stripes[..., None]))
    assert held.is_2d() and torch.equal(held.data[..., 0], LowResolution(4, None)(stripes))


def test_slices_of_ct_lie_across_the_body_however_the_axes_are_stored() -> None:
    volume = torch.rand(1, 20, 18, 5, generator=torch.Generator().manual_seed(0))
    affine = np.diag([0.8, 0.8, 2.5, 1.0])
    upright = LowDose(0.1)(MetaTensor(volume, affine=affine)).as_tensor()
    stored = LowDose(0.1)(MetaTensor(volume.permute(0, 3, 1, 2), affine=affine[:, [2, 0, 1, 3]])).as_tensor()
    assert torch.equal(stored.permute(0, 2, 3, 1), upright)


def pair(affine: np.ndarray) -> dict[str, MetaTensor | torch.Tensor]:
    values = torch.rand(1, 20, 18, 16, generator=torch.Generator().manual_seed(0)) * 900 - 100
    return {"image": MetaTensor(values, affine=affine), "label": torch.ones(1, 20, 18, 16)}


@pytest.mark.parametrize(
    "transform",
    [RandLowResolutiond("image", "high", factor=(2, 4)), RandLowDosed("image", "high", dose=(0.02, 0.1))],
    ids=["resolution", "dose"],
)
def test_the_original_stays_under_the_target_key_on_the_same_voxels(transform: RandLowResolutiond) -> None:
    affine = np.diag([0.8, 0.8, 2.0, 1.0])
    sample = pair(affine)
    done = Compose([transform]).set_random_state(seed=1)(sample)
    assert torch.equal(done["high"], sample["image"]) and done["label"] is sample["label"]
    assert done["image"].shape == done["high"].shape and not torch.allclose(done["image"], done["high"])
    assert np.array_equal(done["image"].affine, affine) and np.array_equal(done["high"].affine, affine)
    assert torch.equal(transform.last(sample["image"]), done["image"])
    again = Compose([transform]).set_random_state(seed=1)(sample)
    assert torch.equal(again["image"], done["image"])
    other = Compose([transform]).set_random_state(seed=2)(sample)
    assert not torch.equal(other["image"], done["image"])


def test_where_nothing_is_done_both_are_the_scan_but_not_one_tensor() -> None:
    transform = RandLowResolutiond("image", "high", prob=0.0)
    sample = transform({"image": torch.rand(1, 8, 8)})
    assert torch.equal(sample["image"], sample["high"]) and sample["image"] is not sample["high"]
    assert transform.last is None


@pytest.mark.parametrize(
    ("array", "dictionary"),
    [(RandLowResolution, RandLowResolutiond), (RandLowDose, RandLowDosed)],
)
def test_arrays_have_the_same_draws_and_a_record(array, dictionary) -> None:
    image = pair(np.diag([0.8, 0.8, 2.0, 1.0]))["image"]
    transform = array().set_random_state(seed=3)
    after = transform(image)
    assert isinstance(after, MetaTensor) and np.array_equal(after.affine, image.affine)
    assert torch.equal(after, dictionary("image", None).set_random_state(seed=3)({"image": image})["image"])
    assert torch.equal(after, transform.last(image)) and torch.equal(after, transform(image, randomize=False))
    assert not torch.equal(after, transform(image))
    assert array(prob=0.0)(image) is image


@pytest.mark.parametrize(
    ("single", "dictionary"),
    [
        (LowResolution(3.0), LowResolutiond("image", "high", 3.0)),
        (LowDose(0.1, "xray", seed=5), LowDosed("image", "high", 0.1, "xray", seed=5)),
    ],
    ids=["resolution", "dose"],
)
def test_one_degradation_is_a_transform_of_monai_with_a_version_for_dictionaries(single, dictionary) -> None:
    sample = pair(np.eye(4))
    assert isinstance(single, Transform)
    made = Compose([dictionary])(sample)
    assert torch.equal(made["image"], Compose([single])(sample["image"]))
    assert made["high"] is sample["image"] and made["label"] is sample["label"] and "high" not in sample


def test_resolution_and_dose_one_after_the_other() -> None:
    sample = pair(np.eye(4))
    both = Compose([RandLowResolutiond("image", "high"), RandLowDosed("image", None)]).set_random_state(seed=0)
    assert torch.equal(both(sample)["high"], sample["image"])
    with pytest.raises(BadInputError, match=r"the sample has 'high' already.*target_key=None"):
        RandLowDosed("image", "high")(RandLowResolutiond("image", "high")(sample))


def test_draws_stay_in_their_range() -> None:
    resolution = RandLowResolutiond("image", "high", factor=(2, 3)).set_random_state(seed=0)
    dose = RandLowDosed("image", "high", dose=(0.1, 1.0), modality="xray").set_random_state(seed=0)
    factors, doses = [], []
    for _ in range(50):
        resolution.randomize()
        dose.randomize()
        factors.append(resolution.last.factor)
        doses.append(dose.last.dose)
    assert 2 <= min(factors) < 2.2 and 2.8 < max(factors) <= 3
    assert 0.1 <= min(doses) < 0.13 and 0.8 < max(doses) <= 1


def test_full_dose_changes_nothing() -> None:
    image = torch.rand(1, 16, 16)
    for modality in ("ct", "xray"):
        torch.testing.assert_close(LowDose(1.0, modality)(image), image)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"factor: expected at least 1 voxel per slice, got 0\.5"):
        RandLowResolutiond("image", "high", factor=(0.5, 2))
    with pytest.raises(BadInputError, match=r"factor: expected \(least, largest\), got \(4, 2\)"):
        RandLowResolutiond("image", "high", factor=(4, 2))
    with pytest.raises(BadInputError, match="axis: expected one of the 2 axes of the scan, -2 to 1, got 2"):
        LowResolution(2, 2)(torch.rand(1, 8, 8))
    with pytest.raises(BadInputError, match="dose: expected a part of the full dose, above 0 and at most 1, got 0"):
        RandLowDosed("image", "high", dose=(0, 0.5))
    with pytest.raises(BadInputError, match="modality: expected one of ct, xray, got 'mri'"):
        RandLowDosed("image", "high", modality="mri")
    with pytest.raises(BadInputError, match="target_key: expected other keys than"):
        RandLowDosed("image", "image")
    with pytest.raises(BadInputError, match="target_key: expected one for each of"):
        RandLowDosed(["a", "b"], "high")
    with pytest.raises(BadInputError, match="axis: expected 'slices', a number or None, got 'rows'"):
        LowResolutiond("image", "high", 2, axis="rows")
    for make in (RandLowResolution, RandLowDose):
        with pytest.raises(BadInputError, match=r"prob: expected a chance in \[0, 1\], got 2"):
            make(prob=2)
    for make in (RandLowResolutiond, RandLowDosed):
        with pytest.raises(BadInputError, match=r"prob: expected a chance in \[0, 1\], got -1"):
            make("image", "high", prob=-1)
