"""Topology of label maps: pieces, holes and touched borders of each class, and whether a new map keeps them."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

# Per class: components, holes, touched borders of the field of view as (axis, side).
Topology = dict[int, tuple[int, int, frozenset[tuple[int, int]]]]


def topology(array: np.ndarray) -> Topology:
    """Components, holes or cavities, and touched borders of each class that is present.

    Args:
        array: ``(H, W[, D])`` integer class indices, 0 is background.

    Returns:
        For each class its number of components, its number of holes (2D) or cavities (3D), and the borders of the field
        of view that it touches as (axis, side), side 0 being the low end.
    """
    found = {}
    everywhere = ndimage.generate_binary_structure(array.ndim, array.ndim)
    for value, box in enumerate(ndimage.find_objects(array), start=1):
        if box is None:
            continue
        inside = np.pad(array[box] == value, 1)
        # Digital topology needs the dual connectivity for the complement, or a diagonal line would open and close.
        components, holes = ndimage.label(inside, everywhere)[1], ndimage.label(~inside)[1] - 1
        borders = [(axis, 0) for axis, part in enumerate(box) if part.start == 0]
        borders += [(axis, 1) for axis, part in enumerate(box) if part.stop == array.shape[axis]]
        found[value] = (components, holes, frozenset(borders))
    return found


def count_parts(label: np.ndarray | torch.Tensor) -> int:
    """Connected parts of the foreground, all classes together.

    Args:
        label: ``(H, W[, D])``, 0 is background; voxels that meet at a corner are connected.

    Returns:
        How many there are.
    """
    array = np.asarray(label) != 0
    return int(ndimage.label(array, ndimage.generate_binary_structure(array.ndim, array.ndim))[1])


def topology_change(before: Topology, deformed: np.ndarray, *, keep_components: bool = True) -> str | None:
    """Why a deformed map is no variant of its source: a class is lost, newly cut by a border, or in other pieces.

    Args:
        before: :func:`topology` of the source.
        deformed: The new map, ``(H, W[, D])`` integer class indices, of the shape of the source.
        keep_components: Whether components and holes must keep their number.

    Returns:
        The first reason found, or None where there is none.
    """
    after = topology(deformed)
    for value, (components, holes, borders) in before.items():
        if value not in after:
            return f"class {value} lost"
        if not after[value][2] <= borders:
            return f"class {value} cut by the field of view"
        if keep_components and after[value][0] != components:
            return f"class {value} split or merged"
        if keep_components and after[value][1] != holes:
            return f"class {value} with other holes"
    return None
