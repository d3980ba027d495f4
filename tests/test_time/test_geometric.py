"""Poses of views: mirror images, turns and scales, and the way back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from medgen.test_time import Flip, Pose, flips, random_pose


def ball(shape: tuple[int, ...], center: tuple[float, ...], radius: float) -> torch.Tensor:
    """A smooth ball, ``(1, *shape)``."""
    places = torch.meshgrid(*(torch.arange(length, dtype=torch.float32) for length in shape), indexing="ij")
    distance = sum((place - c) ** 2 for place, c in zip(places, center, strict=True)).sqrt()
    return torch.sigmoid(radius - distance)[None]


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 1.0, 1.0), (0.8, 1.2, 1.5)])
def test_a_pose_moves_a_scan_as_scipy_does(spacing: tuple[float, ...]) -> None:
    shape = (24, 30, 20)[: len(spacing)]
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    pose = random_pose(Flip((0,)), spacing, rotation=20.0, scaling=0.2, seed=3, number=1)
    matrix = pose.matrix.double().numpy()
    center = (np.array(shape) - 1) / 2
    moved = ndimage.affine_transform(
        image.flip(1)[0].double().numpy(), matrix, offset=center - matrix @ center, order=1, mode="nearest"
    )
    np.testing.assert_allclose(pose.there(image)[0].numpy(), moved, atol=1e-4)


def test_turns_are_rigid_in_space_and_scales_alike_on_all_axes() -> None:
    spacing = np.array([0.7, 1.0, 2.0])
    for number in range(20):
        pose = random_pose(Flip(), tuple(spacing), rotation=10.0, scaling=0.1, seed=0, number=number)
        rigid = pose.matrix.double().numpy() * spacing[:, None] / spacing[None]
        scale = np.linalg.det(rigid) ** (1 / 3)
        assert abs(math.log(scale)) <= 0.1 + 1e-6
        np.testing.assert_allclose(rigid @ rigid.T, scale**2 * np.eye(3), atol=1e-6)
        angle = math.degrees(math.acos(min(1.0, (np.trace(rigid / scale) - 1) / 2)))
        assert angle <= 10 * math.sqrt(3) + 1e-3


def test_thick_slices_are_turned_within_themselves_alone() -> None:
    pose = random_pose(Flip(), (1.0, 1.0, 8.0), rotation=10.0, scaling=0.1, seed=0, number=1)
    assert pose.matrix[0, 1].abs() > 0 and pose.matrix[0, 0] != 1
    assert torch.equal(pose.matrix[2], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(pose.matrix[:2, 2], torch.zeros(2))


@pytest.mark.parametrize("dims", [2, 3])
def test_predictions_come_back_to_where_they_belong(dims: int) -> None:
    shape, center = (40, 36, 32)[:dims], (15.0, 20.0, 14.0)[:dims]
    inside = ball(shape, center, 6.0)
    for number, mirror in enumerate(flips(dims)):
        pose = random_pose(mirror, (1.0,) * dims, rotation=10.0, scaling=0.1, seed=0, number=number)
        seen = pose.there(inside)
        assert (seen - inside).abs().max() > 0.2  # it did move
        found = pose.back(torch.cat([1 - seen, seen]), torch.cat([1 - inside, inside]))
        torch.testing.assert_close(found.sum(dim=0), torch.ones(shape), atol=1e-5, rtol=0)
        assert (found[1] - inside[0]).abs().max() < 0.12
        exact = Pose(mirror)
        assert torch.equal(exact.back(exact.there(inside), inside), inside)


def test_poses_depend_on_seed_and_number_and_can_be_none() -> None:
    options = {"rotation": 10.0, "scaling": 0.1}
    one, same, other, seed = (
        random_pose(Flip(), (1.0, 1.0), **options, seed=seed, number=number).matrix
        for seed, number in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, seed)
    assert random_pose(Flip(), (1.0, 1.0), rotation=0.0, scaling=0.0, seed=0, number=1).matrix is None


def test_what_a_view_does_not_show_is_left_to_the_scan() -> None:
    c, s = math.cos(math.radians(15)), math.sin(math.radians(15))
    pose = Pose(Flip((1,)), torch.tensor([[c, -s], [s, c]]) / 1.1)
    beyond = torch.stack([torch.ones(32, 32), torch.zeros(32, 32)])
    found = pose.back(beyond.flip(0), beyond)[1].flip(1).numpy()
    places = np.stack(np.meshgrid(np.arange(32), np.arange(32), indexing="ij"), -1) - 15.5
    source = np.abs(places @ np.linalg.inv(pose.matrix.double().numpy()).T)
    shown, hidden = (source < 15.49).all(axis=-1), (source > 15.52).any(axis=-1)
    assert 0.05 < hidden.mean() < 0.5 and (shown | hidden).mean() > 0.95
    assert (found[shown] == 1).all() and (found[hidden] == 0).all()
