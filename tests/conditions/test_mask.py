from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks import one_hot as monai_one_hot
from scipy.spatial import cKDTree

from medgen.conditions.mask import class_distances, encode_mask, from_class_distances, one_hot, signed_distance
from medgen.types import BadInputError


def _random_label(shape: tuple[int, ...], num_classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, num_classes, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)


@pytest.mark.parametrize("shape", [(2, 7, 9), (2, 5, 6, 7)])
def test_one_hot_equals_monai_everywhere_valid(shape: tuple[int, ...]) -> None:
    label = _random_label(shape, 4)
    expected = monai_one_hot(label[:, None].float(), num_classes=4)
    channels = one_hot(label, 4)
    assert channels.dtype == torch.float32
    assert torch.equal(channels, expected)


def test_one_hot_is_zero_in_all_channels_outside_the_field_of_view() -> None:
    label, valid = _random_label((3, 8, 8), 3), torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.4
    channels = one_hot(label, 3, valid=valid)
    assert torch.equal(channels.sum(dim=1), valid.float())
    assert torch.equal(channels.argmax(dim=1)[valid], label.long()[valid])


@pytest.mark.parametrize(
    ("shape", "spacing"), [((40, 31), None), ((40, 31), (0.5, 2.0)), ((21, 18, 25), (1.0, 3.0, 1.5))]
)
def test_signed_distance_equals_a_nearest_neighbor_search_over_voxel_centers(
    shape: tuple[int, ...], spacing: tuple[float, ...] | None
) -> None:
    # A small ellipsoid in a corner of a larger grid, so that the cropped computation is compared with the whole.
    steps = np.asarray(spacing or (1.0,) * len(shape))
    points = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1) * steps
    center = np.asarray([n * 0.3 for n in shape]) * steps
    inside = (((points - center) / (0.2 * np.asarray(shape) * steps)) ** 2).sum(-1) < 1
    label = torch.from_numpy(inside.astype(np.int16) * 2)
    to_outside = cKDTree(points[~inside]).query(points)[0]
    to_inside = cKDTree(points[inside]).query(points)[0]
    truncation = 4.0
    half = steps.min() / 2
    expected = np.clip(np.where(inside, to_outside - half, half - to_inside) / truncation, -1, 1)
    distance = signed_distance(label, 3, truncation=truncation, spacing=spacing)
    np.testing.assert_allclose(distance[1], expected, atol=1e-6)
    assert (distance[0] == -1).all()


def test_the_two_sides_of_a_plane_have_opposite_distances() -> None:
    label = torch.zeros(20, 6, dtype=torch.int16)
    label[10:] = 1
    profile = signed_distance(label, 2, truncation=8.0)[0, :, 3] * 8
    torch.testing.assert_close(profile, (torch.arange(20) - 9.5).clamp(-8, 8))


def test_a_class_that_fills_the_grid_is_one_and_an_absent_one_minus_one() -> None:
    distance = signed_distance(torch.full((6, 7, 8), 2), 4)
    assert distance.shape == (3, 6, 7, 8)
    assert [float(channel.unique().item()) for channel in distance] == [-1.0, 1.0, -1.0]


@pytest.mark.parametrize("shape", [(17, 12), (9, 14, 11)])
@pytest.mark.parametrize("truncation", [0.5, 8.0])
def test_labels_survive_the_round_trip_through_distances(shape: tuple[int, ...], truncation: float) -> None:
    labels = torch.stack([_random_label(shape, 4, seed) for seed in range(3)])
    distances = torch.stack([class_distances(label, 4, truncation=truncation) for label in labels])
    back = from_class_distances(distances)
    assert back.dtype == torch.int16
    assert torch.equal(back, labels)


@pytest.mark.parametrize(
    ("label", "num_classes", "message"),
    [
        (torch.tensor([[[0, 3]]]), 3, r"expected class indices 0\.\.2, got values from 0 to 3"),
        (torch.tensor([[[0, -1]]]), 3, "got values from -1 to 0"),
        (torch.zeros(1, 2, 2), 2, "expected integer class indices, got torch.float32"),
        (torch.zeros(1, 0, 2, dtype=torch.int16), 2, "expected at least one voxel"),
        (torch.zeros(1, 2, 2, dtype=torch.int16), 1, "num_classes: expected at least 2"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(label: torch.Tensor, num_classes: int, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        one_hot(label, num_classes)
    with pytest.raises(BadInputError, match=message):
        signed_distance(label[0], num_classes)


@pytest.mark.parametrize("shape", [(17, 12), (9, 14, 11)])
def test_both_forms_of_a_mask_tell_the_classes_and_are_nothing_outside_the_field_of_view(
    shape: tuple[int, ...],
) -> None:
    label = _random_label(shape, 4)
    valid = torch.ones(shape, dtype=torch.bool)
    valid[-3:] = False
    for form in ("one_hot", "signed_distance"):
        mask = encode_mask(label, 4, form, valid=valid)
        assert mask.shape == (1, 4, *shape)
        assert torch.equal(mask[0].argmax(dim=0)[valid], label.long()[valid])
        assert not mask[0][:, ~valid].any()
        # Never the null, which is all zeros, not even where there is background alone.
        assert encode_mask(torch.zeros_like(label), 4, form)[0].abs().sum(dim=0).gt(0).all()
    assert torch.equal(encode_mask(label, 4, valid=valid), one_hot(label[None], 4, valid=valid[None]))
    assert torch.equal(encode_mask(label, 4, "signed_distance")[0], class_distances(label, 4))


def test_wrong_arguments_are_named() -> None:
    label = torch.ones(4, 4, dtype=torch.int16)
    with pytest.raises(BadInputError, match=r"valid: expected the label's shape \(1, 4, 4\)"):
        one_hot(label[None], 2, valid=torch.ones(4, 4, dtype=torch.bool))
    for form in ("one_hot", "signed_distance"):
        with pytest.raises(BadInputError, match="valid: expected the label's shape"):
            encode_mask(label, 2, form, valid=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(BadInputError, match="truncation: expected a positive distance"):
        signed_distance(label, 2, truncation=0)
    with pytest.raises(BadInputError, match="spacing: expected 2 positive lengths"):
        signed_distance(label, 2, spacing=(1.0, 1.0, 1.0))
    with pytest.raises(BadInputError, match=r"distance: expected shape \(B, K, H, W\[, D\]\)"):
        from_class_distances(torch.zeros(2, 4, 4))
    with pytest.raises(BadInputError, match="expected finite values, got NaN"):
        from_class_distances(torch.full((1, 2, 4, 4), torch.nan))
