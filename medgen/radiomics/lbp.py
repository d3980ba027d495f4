"""Local binary patterns of images and, by spherical harmonics, of volumes."""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
from scipy.ndimage import map_coordinates, spline_filter
from scipy.special import sph_harm_y
from skimage.feature import local_binary_pattern

LBP_METHODS = ("default", "ror", "uniform", "nri_uniform", "var")

# Voxels whose samples are held at once: some 40 samples each by default.
_CHUNK = 1 << 15


def lbp_2d(image: np.ndarray, radius: float, samples: int, method: str, axis: int | None) -> np.ndarray:
    """Local binary patterns in the plane.

    Args:
        image: ``(y, x)`` or ``(z, y, x)`` float64.
        radius: Radius of the circle of samples, in voxels.
        samples: Number of samples.
        method: One of :data:`LBP_METHODS`, as in scikit-image.
        axis: Out-of-plane axis of a volume, None for an image.

    Returns:
        Patterns, float64, of the image's shape; method ``var`` gives variances, 0 where scikit-image gives NaN.

    References:
        T. Ojala, M. Pietikäinen, T. Mäenpää, "Multiresolution gray-scale and rotation invariant texture classification
        with local binary patterns", IEEE TPAMI 24, 2002.
    """
    out = np.empty_like(image)
    planes, results = (image[None], out[None]) if axis is None else (image.swapaxes(0, axis), out.swapaxes(0, axis))
    with warnings.catch_warnings():
        # It warns of float images because of ties; PyRadiomics hands them over all the same.
        warnings.filterwarnings("ignore", message="Applying `local_binary_pattern` to floating-point images")
        for plane, result in zip(planes, results, strict=True):
            result[...] = local_binary_pattern(plane, P=samples, R=radius, method=method)
    return np.nan_to_num(out, copy=False, nan=0.0)


def lbp_3d(image: np.ndarray, mask: np.ndarray, levels: int, radius: float, subdivisions: int) -> list[np.ndarray]:
    """Rotation-invariant local binary patterns of a volume.

    Around each voxel the image is sampled on a sphere. The pattern (which samples are at least the voxel's own value)
    is expanded in spherical harmonics Y_nm, and the norm of its part of degree n is the value of level n + 1. As in
    PyRadiomics, whose numbers these are, the polar and the azimuthal angle are exchanged, the expansion is not
    conjugated, and the norm is ``Re √Σf²`` of complex f.

    Args:
        image: ``(z, y, x)`` float64.
        mask: Boolean, of the image's shape: the voxels to compute.
        levels: Degrees of the expansion, from 0.
        radius: Radius of the sphere, in voxels.
        subdivisions: Of the icosahedron whose vertices are the samples: 0 gives 12 vertices, 1 gives 42.

    Returns:
        One array per level, then the excess kurtosis of the samples (0 where they are all equal, and PyRadiomics gives
        NaN), all float64, of the image's shape, 0 outside the mask.

    References:
        J. Banerjee et al., "3D LBP-based rotationally invariant region description", ACCV 2012 Workshops.
    """
    sphere = icosphere(subdivisions, radius)
    polar = np.arccos(np.clip(sphere[:, 2] / radius, -1.0, 1.0))
    # The angle that takes the polar one's place enters by its cosine only, so its sign must not count.
    azimuth = np.abs(np.arctan2(sphere[:, 1], sphere[:, 0]))
    harmonics = [np.stack([sph_harm_y(n, m, azimuth, polar) for m in range(-n, n + 1)], axis=1) for n in range(levels)]
    coefficients = spline_filter(image, order=3, mode="constant")
    voxels = np.argwhere(mask)
    out = [np.zeros_like(image) for _ in range(levels + 1)]
    for start in range(0, len(voxels), _CHUNK):
        part = voxels[start : start + _CHUNK]
        where = tuple(part.T)
        points = part[:, None, :] + sphere[None, :, :]
        samples = map_coordinates(coefficients, points.transpose(2, 0, 1), order=3, prefilter=False)
        pattern = (samples >= image[where][:, None]).astype(float)
        for level, basis in enumerate(harmonics):
            # Σ over samples of (Σₘ cₘYₘ)² is a quadratic form in c.
            c = pattern @ basis
            out[level][where] = np.sqrt(np.einsum("pk,kl,pl->p", c, basis.T @ basis, c)).real
        out[levels][where] = _kurtosis(samples)
    return out


@lru_cache(maxsize=8)
def icosphere(subdivisions: int, radius: float) -> np.ndarray:
    """Vertices of an icosahedron whose faces are split in four again and again, all on one sphere.

    Args:
        subdivisions: How often to split.
        radius: Radius of the sphere.

    Returns:
        ``(10 · 4^subdivisions + 2, 3)`` vertices, in the usual orientation: those of the icosahedron are the cyclic
        permutations of ``(±1, ±φ, 0)`` with the golden ratio φ, scaled.
    """
    golden = (1 + np.sqrt(5)) / 2
    corners = np.array([np.roll((a, b * golden, 0.0), shift) for shift in range(3) for a in (-1, 1) for b in (-1, 1)])
    vertices = corners / np.linalg.norm(corners[0])
    # Neighbors of the icosahedron are the pairs at its edge length; after each split those at about half of it.
    edge = 2 / np.sqrt(golden**2 + 1)
    faces = _faces(vertices, edge)
    for _ in range(subdivisions):
        vertices, faces = _split(vertices, faces)
    return vertices * radius


def _faces(vertices: np.ndarray, edge: float) -> np.ndarray:
    """``(20, 3)``: the triples of vertices that are all one edge length apart."""
    near = np.abs(np.linalg.norm(vertices[:, None] - vertices[None], axis=2) - edge) < 1e-6
    n = range(len(vertices))
    return np.array(
        [(i, j, k) for i in n for j in n[i + 1 :] for k in n[j + 1 :] if near[i, j] & near[j, k] & near[i, k]]
    )


def _split(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every face cut into four at the middles of its edges, and these lifted onto the unit sphere."""
    sides = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    unique, inverse = np.unique(sides, axis=0, return_inverse=True)
    middles = vertices[unique].mean(axis=1)
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    ab, bc, ca = (len(vertices) + inverse.reshape(-1, 3)).T
    a, b, c = faces.T
    quarters = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    return np.concatenate([vertices, middles]), np.concatenate([np.stack(corner, axis=1) for corner in quarters])


def _kurtosis(samples: np.ndarray) -> np.ndarray:
    """Excess kurtosis of each row, 0 where its values differ by no more than rounding."""
    mean = samples.mean(axis=1)
    squares = (samples - mean[:, None]) ** 2
    variance = squares.mean(axis=1)
    flat = variance <= (np.finfo(float).resolution * mean) ** 2
    return np.where(flat, 0.0, (squares**2).mean(axis=1) / np.where(flat, 1.0, variance) ** 2 - 3.0)
