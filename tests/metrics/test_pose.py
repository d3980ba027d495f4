import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medgen.metrics import apply_pose, summarize_pose
from medgen.metrics.pose import starting_poses


def _pose(voxels: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Pose of a voxel matrix about the center of a box."""
    size = np.asarray(shape, dtype=float)
    matrix = voxels * size / size[:, None]
    return torch.from_numpy(np.concatenate([matrix, np.zeros((len(shape), 1))], axis=1))


@pytest.mark.parametrize("shape", [(21, 34), (14, 20, 17)])
def test_draws_as_scipy_does(shape: tuple[int, ...]) -> None:
    dims = len(shape)
    image = ndimage.gaussian_filter(np.random.default_rng(0).random(shape), 1)
    if dims == 2:
        matrix = np.array([[math.cos(0.2), -math.sin(0.2)], [math.sin(0.2), math.cos(0.2)]])
    else:
        matrix = Rotation.from_rotvec([0.1, -0.2, 0.15]).as_matrix()
    middle = (np.asarray(shape) - 1) / 2
    expected = ndimage.affine_transform(image, matrix, offset=middle - matrix @ middle, order=1)
    drawn = apply_pose(torch.from_numpy(image)[None, None], _pose(matrix, shape)[None])[0, 0].numpy()
    inner = tuple(slice(4, -4) for _ in shape)
    np.testing.assert_allclose(drawn[inner], expected[inner], atol=1e-6)


def test_a_box_of_another_shape_shows_the_same_place() -> None:
    image = torch.linspace(0, 1, 10).view(1, 1, 10, 1).expand(1, 1, 10, 6).double()
    identity = torch.eye(3, dtype=torch.float64)[:2][None]
    drawn = apply_pose(image, identity, (20, 6))[0, 0, :, 3]
    expected = np.interp((np.arange(20) + 0.5) / 2 - 0.5, np.arange(10), image[0, 0, :, 3].numpy())
    np.testing.assert_allclose(drawn[1:-1], expected[1:-1], atol=1e-9)


@pytest.mark.parametrize(("signs", "flipped"), [((1, 1, 1), ()), ((1, -1, 1), (1,)), ((-1, 1, -1), (0, 2))])
def test_names_flips_and_the_rotation_between_voxels(signs: tuple[int, ...], flipped: tuple[int, ...]) -> None:
    rotation = Rotation.from_rotvec(np.radians(9) * np.array([2, -1, 2]) / 3).as_matrix()
    shape = (30, 50, 40)
    summary = summarize_pose(_pose(0.9 * rotation @ np.diag(signs), shape), shape, shape)
    assert summary.flipped == flipped
    assert summary.rotation == pytest.approx(9, abs=1e-6)
    assert summary.scale == pytest.approx(1 / 0.9)


@pytest.mark.parametrize(("dims", "parts"), [(2, 5 + 8 + 2 + 4), (3, 7 + 6 + 2 + 8)])
def test_the_search_begins_at_every_flip(dims: int, parts: int) -> None:
    poses = starting_poses(dims)
    assert len(poses) == 2**dims * parts
    assert {summarize_pose(pose).flipped for pose in poses} == {
        tuple(axis for axis in range(dims) if number >> axis & 1) for number in range(2**dims)
    }
