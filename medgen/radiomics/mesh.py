"""The surface of a mask: its area, its volume and its diameters.

The surface runs through the middles of all edges between a voxel of the mask and one outside. In each cube of 2³ voxels
it depends only on which corners are in the mask, so it is measured by counting these patterns.
"""

from __future__ import annotations

from functools import lru_cache, reduce

import numpy as np
from numba import njit
from skimage.measure import marching_cubes

from medgen.types import Spacing

# Corner (z, y, x) of a cube is bit 4z + 2y + x of its pattern. Of two complementary patterns the one without this
# corner is triangulated, and the other is its reverse.
_REFERENCE_CORNER = 6


def surface(mask: np.ndarray, spacing: Spacing) -> tuple[float, float]:
    """Area and volume of the marching-cubes mesh of a mask.

    Triangles are those of Lorensen's table, with complementary patterns alike. The meshes of neighbors may then
    disagree about a face with two opposite corners in the mask, so that the mesh has a hole there; its volume is the
    sum over the triangles of the tetrahedra with the origin, the first voxel of the mask's border, as in PyRadiomics.

    Args:
        mask: ``(z, y, x)`` bool, C-contiguous, with a border of one voxel outside.
        spacing: Voxel edge lengths in mm, in array order.

    Returns:
        Area in mm² and volume in mm³.

    References:
        W. Lorensen, H. Cline, "Marching cubes: a high resolution 3D surface construction algorithm", SIGGRAPH 1987.
    """
    patterns, normals, volumes = _triangles()
    counts, positions = _count_patterns(mask)
    reverse = 255 - np.arange(256)
    flipped = np.arange(256) >> _REFERENCE_CORNER & 1 == 1
    met = np.where(flipped, 0, counts + counts[reverse])[patterns]
    signed = np.where(flipped, 0, counts - counts[reverse])[patterns]
    moments = np.where(flipped[:, None], 0, positions - positions[reverse])[patterns]
    edges = np.array(spacing, dtype=np.float64)
    voxel = float(np.prod(edges))
    # Half the cross product of two sides, whose components scale with the other two edges.
    areas = 0.5 * np.linalg.norm(normals * (voxel / edges), axis=1)
    return float(met @ areas), float(signed @ volumes + (moments * normals).sum()) * voxel / 6


def diameters(mask: np.ndarray, spacing: Spacing) -> tuple[float, float, float, float]:
    """Largest distances between two vertices of the mesh.

    Args:
        mask: ``(z, y, x)`` bool, C-contiguous, with a border of one voxel outside.
        spacing: Voxel edge lengths in mm, in array order.

    Returns:
        In mm: within a plane across z, across y and across x, then over all.
    """
    edges = np.array(spacing, dtype=np.float64)
    within, corners = [], []
    # Twice the index is whole for all vertices.
    stride = 2 * np.array(mask.shape)
    for axes in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        points, widest = _plane_hulls(np.ascontiguousarray(mask.transpose(axes)), edges[axes[1]], edges[axes[2]])
        within.append(float(np.sqrt(widest)))
        ordered = points[:, np.argsort(axes)]
        corners.append((ordered[:, 0] * stride[1] + ordered[:, 1]) * stride[2] + ordered[:, 2])
    # A corner of the convex hull is a corner of each of the three planar hulls it lies on.
    keys = reduce(np.intersect1d, corners)
    hull = np.stack([keys // (stride[1] * stride[2]), keys // stride[2] % stride[1], keys % stride[2]], axis=1)
    return within[0], within[1], within[2], float(np.sqrt(_widest(hull * (edges / 2))))


def diameter_2d(mask: np.ndarray, spacing: Spacing) -> float:
    """Largest distance between two vertices of the outline of a mask.

    Args:
        mask: ``(y, x)`` bool, C-contiguous, with a border of one pixel outside.
        spacing: Pixel edge lengths in mm, in array order.

    Returns:
        The distance in mm.
    """
    return float(np.sqrt(_plane_hulls(mask[None], float(spacing[0]), float(spacing[1]))[1]))


@lru_cache(maxsize=1)
def _triangles() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pattern ``(T,)``, cross product of two sides ``(T, 3)`` and six times the volume ``(T,)`` of all triangles.

    In voxels, and for a cube at the origin; elsewhere the volume grows by the cross product times the position.
    """
    patterns, normals, volumes = [], [], []
    for pattern in range(1, 255):
        if not pattern >> _REFERENCE_CORNER & 1:
            cube = (pattern >> np.arange(8) & 1).astype(np.float32).reshape(2, 2, 2)
            vertices, faces, _, _ = marching_cubes(cube, 0.5, method="lorensen")
            # Vertices in this order see the mask from outside.
            c, b, a = vertices.astype(np.float64)[faces].transpose(1, 0, 2)
            patterns.append(np.full(len(faces), pattern))
            normals.append(np.cross(b - a, c - a))
            volumes.append((np.cross(a, b) * c).sum(axis=1))
    return np.concatenate(patterns), np.concatenate(normals), np.concatenate(volumes)


@njit(cache=True, nogil=True)
def _count_patterns(mask):  # type: ignore[no-untyped-def]
    """How often each pattern occurs ``(256,)``, and the sum of the positions where it does ``(256, 3)``."""
    counts = np.zeros(256, np.int64)
    positions = np.zeros((256, 3), np.int64)
    for z in range(mask.shape[0] - 1):
        for y in range(mask.shape[1] - 1):
            pattern = 0
            for x in range(mask.shape[2]):
                # What was at x moves to x - 1, one bit lower.
                pattern = (
                    (pattern >> 1 & 0x55)
                    | mask[z, y, x] << 1
                    | mask[z, y + 1, x] << 3
                    | mask[z + 1, y, x] << 5
                    | mask[z + 1, y + 1, x] << 7
                )
                if x > 0 and pattern != 0:
                    counts[pattern] += 1
                    positions[pattern, 0] += z
                    positions[pattern, 1] += y
                    positions[pattern, 2] += x - 1
    return counts, positions


@njit(cache=True, nogil=True)
def _plane_hulls(mask, row_mm, column_mm):  # type: ignore[no-untyped-def]
    """Corners of the convex hull of the vertices in each plane across the first axis, and their squared width.

    Corners ``(n, 3)`` are in half voxels. Odd planes lie between two layers of voxels and hold the vertices there; even
    ones those between neighbors within the layer.
    """
    layers, rows, _ = mask.shape
    points = np.empty((1024, 3), np.int64)
    used = 0
    widest = 0.0
    ends = np.empty((2, 2 * rows), np.int64)
    chain = np.empty((2 * rows, 2), np.int64)
    for plane in range(2 * layers - 1):
        for row in range(2 * rows - 1):
            ends[0, row], ends[1, row] = _row_ends(mask, plane, row)
        start = used
        for side in range(2):
            sign = 1 - 2 * side
            length = 0
            for row in range(2 * rows - 1):
                if ends[side, row] < 0:
                    continue
                # Andrew's monotone chain: drop corners that the new one makes hollow.
                while length > 1 and (
                    sign
                    * (
                        (chain[length - 1, 1] - chain[length - 2, 1]) * (row - chain[length - 2, 0])
                        - (ends[side, row] - chain[length - 2, 1]) * (chain[length - 1, 0] - chain[length - 2, 0])
                    )
                    >= 0
                ):
                    length -= 1
                chain[length, 0] = row
                chain[length, 1] = ends[side, row]
                length += 1
            if used + length > len(points):
                more = np.empty((2 * len(points) + length, 3), np.int64)
                for i in range(used):
                    for k in range(3):
                        more[i, k] = points[i, k]
                points = more
            for i in range(length):
                points[used, 0] = plane
                points[used, 1] = chain[i, 0]
                points[used, 2] = chain[i, 1]
                used += 1
        for i in range(start, used):
            for j in range(i + 1, used):
                height = (points[i, 1] - points[j, 1]) * (row_mm / 2)
                width = (points[i, 2] - points[j, 2]) * (column_mm / 2)
                widest = max(widest, height * height + width * width)
    return points[:used], widest


@njit(cache=True, nogil=True)
def _row_ends(mask, plane, row):  # type: ignore[no-untyped-def]
    """First and last vertex in one row of a plane, all in half voxels, which include its corners; -1 if it has none."""
    dz, dy = plane % 2, row % 2
    # A vertex lies between two neighbors, so just one of its three half-voxel indices is odd.
    dx = 1 - dz - dy
    first = last = -1
    if dx < 0:
        return first, last
    z, y = plane // 2, row // 2
    for x in range(mask.shape[2] - 1):
        if mask[z, y, x] != mask[z + dz, y + dy, x + dx]:
            first = 2 * x + dx
            break
    if first >= 0:
        for x in range(mask.shape[2] - 2, -1, -1):
            if mask[z, y, x] != mask[z + dz, y + dy, x + dx]:
                last = 2 * x + dx
                break
    return first, last


@njit(cache=True, nogil=True)
def _widest(points):  # type: ignore[no-untyped-def]
    """Largest squared distance between two of ``(n, 3)`` points."""
    widest = 0.0
    for i in range(len(points)):
        for j in range(i + 1, len(points)):
            dz = points[i, 0] - points[j, 0]
            dy = points[i, 1] - points[j, 1]
            dx = points[i, 2] - points[j, 2]
            widest = max(widest, dz * dz + dy * dy + dx * dx)
    return widest
