"""Topology of shapes whose pieces, holes and borders are known, and against the Euler number."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medgen.conditions.topology import count_parts, topology, topology_change


def ring(size: int = 15) -> np.ndarray:
    rows, columns = np.indices((size, size)) - size // 2
    radius = np.hypot(rows, columns)
    return ((radius > 2) & (radius < 5)).astype(np.int32)


def euler_number(mask: np.ndarray) -> int:
    """Vertices - edges + faces of the pixels as closed squares, which is pieces minus holes."""
    padded = np.pad(mask, 1).astype(bool)
    vertices = padded[:-1, :-1] | padded[:-1, 1:] | padded[1:, :-1] | padded[1:, 1:]
    edges = (padded[:-1] | padded[1:]).sum() + (padded[:, :-1] | padded[:, 1:]).sum()
    return int(vertices.sum()) - int(edges) + int(padded.sum())


def test_rings_shells_and_diagonals_have_their_pieces_and_holes() -> None:
    assert topology(ring()) == {1: (1, 1, frozenset())}
    diagonal = np.diag([0, 1, 1, 1, 0]).astype(np.int32)
    assert topology(diagonal) == {1: (1, 0, frozenset())}
    shell = np.zeros((9, 9, 9), np.int32)
    shell[2:7, 2:7, 2:7] = 3
    shell[4, 4, 4] = 0
    assert topology(shell) == {3: (1, 1, frozenset())}
    tunnel = shell.copy()
    tunnel[4, 4] = 0  # an opened cavity is none
    assert topology(tunnel)[3][:2] == (1, 0)


def test_pieces_minus_holes_is_the_euler_number_of_random_masks() -> None:
    for seed in range(20):
        noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(30, 34)), 1.2)
        mask = (noise > 0.05).astype(np.int32)
        components, holes, _ = topology(mask)[1]
        assert components - holes == euler_number(mask)
        assert components > 1


def test_borders_are_those_that_a_class_touches() -> None:
    label = np.zeros((6, 7, 8), np.int32)
    label[0:2, 2:4, 6:8] = 1
    label[3, 6, 3] = 2
    found = topology(label)
    assert found[1][2] == {(0, 0), (2, 1)}
    assert found[2][2] == {(1, 1)}


def split(label: np.ndarray) -> np.ndarray:
    return np.where(np.arange(label.shape[1]) == 7, 0, label)


def fill(label: np.ndarray) -> np.ndarray:
    return ndimage.binary_fill_holes(label).astype(np.int32)


@pytest.mark.parametrize(
    ("change", "reason", "allowed"),
    [
        (np.zeros_like, "class 1 lost", "class 1 lost"),
        (
            lambda label: np.roll(label, -3, axis=0),
            "class 1 cut by the field of view",
            "class 1 cut by the field of view",
        ),
        (split, "class 1 split or merged", None),
        (fill, "class 1 with other holes", None),
        (lambda label: np.roll(label, 1, axis=0), None, None),
    ],
    ids=["lost", "cut", "split", "filled", "moved"],
)
def test_a_change_is_named_and_pieces_may_be_free(change, reason: str | None, allowed: str | None) -> None:
    before = topology(ring())
    assert topology_change(before, change(ring())) == reason
    assert topology_change(before, change(ring()), keep_components=False) == allowed


def test_parts_are_counted_over_all_classes_and_across_corners() -> None:
    label = np.zeros((6, 6), np.int16)
    label[0, 0], label[1, 1], label[1, 2] = 1, 1, 2  # one part: a corner, then a side
    label[4:, 4:] = 2
    assert count_parts(label) == 2
    assert count_parts(np.zeros((3, 3))) == 0
