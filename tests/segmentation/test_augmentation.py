"""Crops for segmenters: image and label move together, intensities change as they should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter

from medgen.seeding import stream
from medgen.segmentation import CLASSICAL, UNCHANGED, augment
from medgen.segmentation.augmentation import _erase, _fill_in, _smooth


def _pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright box off the middle, as image and as label."""
    label = torch.zeros(shape, dtype=torch.uint8)
    label[tuple(slice(n // 4, n // 2) for n in shape)] = 1
    return label[None].half(), label


@pytest.mark.parametrize("shape", [(32, 24), (16, 20, 12)])
def test_unchanged_pairs_of_the_patch_size_stay_as_they_are(shape: tuple[int, ...]) -> None:
    image, label = torch.rand(2, *shape).half(), torch.randint(0, 4, shape, dtype=torch.uint8)
    for step in range(4):
        # Crops of volumes are centered on labels every other time.
        if len(shape) == 3:
            label = torch.zeros_like(label)
        made, given = augment((image, label), UNCHANGED, shape, stream(0, step))
        torch.testing.assert_close(made, image.float(), atol=1e-5, rtol=0)
        assert torch.equal(given[0], label.long())


@pytest.mark.parametrize("shape", [(64, 48), (32, 40, 24)])
@pytest.mark.parametrize(
    "changes", [{"rotation": 30.0, "scaling": 0.3, "shift": 0.2}, {"elastic": 0.15, "chance": 1.0}]
)
def test_image_and_label_move_together(shape: tuple[int, ...], changes: dict[str, float]) -> None:
    pair = _pair(shape)
    moved = []
    for step in range(6):
        image, label = augment(pair, replace(UNCHANGED, **changes), shape, stream(1, step))
        # Only voxels on the border of the box differ, where one is interpolated and the other not.
        assert ((image > 0.5) != (label == 1)).float().mean() < 0.01
        moved.append(float((label[0] != pair[1]).float().mean()))
    assert max(moved) > 0.005


@pytest.mark.parametrize("shape", [(40, 30), (20, 16, 24)])
def test_smoothing_is_the_gaussian_of_scipy(shape: tuple[int, ...]) -> None:
    image = torch.rand(2, *shape)
    expected = [gaussian_filter(channel.double().numpy(), 0.9, mode="nearest", radius=3) for channel in image]
    torch.testing.assert_close(_smooth(image, 0.9).double(), torch.from_numpy(np.stack(expected)), atol=1e-5, rtol=0)


def test_contrast_keeps_the_mean_and_brightness_adds() -> None:
    label = torch.zeros(32, 32, dtype=torch.uint8)
    image = 0.4 + 0.2 * torch.rand(1, 32, 32)
    pair = (image, label)
    contrast = replace(UNCHANGED, contrast=0.3, chance=1.0)
    spreads = []
    for step in range(8):
        made, _ = augment(pair, contrast, (32, 32), stream(2, step))
        assert float(made.mean()) == pytest.approx(float(image.mean()), abs=1e-3)
        spreads.append(float(made.std() / image.std()))
    assert min(spreads) < 0.95 < 1.05 < max(spreads)
    brighter = replace(UNCHANGED, brightness=0.2, chance=1.0)
    added = [augment(pair, brighter, (32, 32), stream(3, step))[0] - image for step in range(8)]
    assert all(float(part.std()) < 1e-3 for part in added)
    assert min(float(part.mean()) for part in added) < -0.02 < 0.02 < max(float(part.mean()) for part in added)


def test_lower_resolution_loses_detail_and_not_the_place() -> None:
    ramp = torch.linspace(0, 1, 64)[None, None].expand(1, 64, 64)
    checker = ramp + 0.1 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2 - 0.5)
    lowered = replace(UNCHANGED, low_resolution=1.0, chance=1.0)
    rest = [
        augment((checker, torch.zeros(64, 64, dtype=torch.uint8)), lowered, (64, 64), stream(4, step))[0]
        for step in range(6)
    ]
    inside = slice(8, -8)
    for made in rest:
        assert float((made - ramp)[0, inside, inside].mean()) == pytest.approx(0, abs=0.02)  # half a voxel is 0.008
    assert min(float((made - ramp)[0, inside, inside].std()) for made in rest) < 0.04 < float((checker - ramp).std())


def test_a_crop_depends_on_its_stream_alone() -> None:
    pair = _pair((40, 40))
    first, second = (augment(pair, CLASSICAL[2], (32, 32), stream(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], augment(pair, CLASSICAL[2], (32, 32), stream(6))[0])


@pytest.mark.parametrize("shape", [(40, 32), (20, 24, 16)])
def test_an_erased_class_is_gone_from_image_and_label_and_nothing_else_is(shape: tuple[int, ...]) -> None:
    label = torch.zeros(shape, dtype=torch.uint8)
    label[tuple(slice(n // 4, n // 2) for n in shape)] = 1
    label[tuple(slice(5 * n // 8, 7 * n // 8) for n in shape)] = 3
    image = torch.full((2, *shape), 0.25) + 0.5 * (label > 0)
    gone = set()
    for step in range(12):
        made, given = _erase(image, label[None].long(), stream(7, step))
        (erased,) = {1, 3} - set(given.unique().tolist())
        gone.add(erased)
        rest = label != erased
        assert torch.equal(given[0][rest], label[rest].long()) and not given[0][~rest].any()
        # What is around it goes on; the grain of another place may hold an edge.
        assert made[:, ~rest].median(dim=1).values.tolist() == pytest.approx([0.25, 0.25], abs=0.05)
        near = torch.from_numpy(distance_transform_edt(rest.numpy()) < 1.8)  # its rim
        assert torch.equal(made[:, ~near], image[:, ~near])
    assert gone == {1, 3}
    empty = torch.zeros(shape, dtype=torch.uint8)
    assert _erase(image, empty[None].long(), stream(7))[0] is image
    changed = [
        not torch.equal(
            *(augment((image, label), replace(UNCHANGED, erasing=p), shape, stream(8, step))[1] for p in (0, 0.5))
        )
        for step in range(24)
    ]
    assert 4 < sum(changed) < 20


def test_a_hole_is_filled_in_as_its_surroundings_go_on() -> None:
    ramp = torch.linspace(0, 1, 64)[None, None].expand(1, 64, 64)
    known = torch.ones(1, 64, 64, dtype=torch.bool)
    known[:, 24:40, 20:44] = False
    filled = _fill_in(torch.where(known, ramp, 9.0), known)
    assert torch.equal(filled[known], ramp[known])
    assert float((filled - ramp).abs().max()) < 0.15  # of 0.37 that the hole spans
    constant = _fill_in(torch.where(known, 0.3, 9.0), known)
    torch.testing.assert_close(constant, torch.full((1, 64, 64), 0.3), atol=1e-5, rtol=0)
