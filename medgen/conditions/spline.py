"""Tensor-product cubic B-splines on an even grid of control points (Rueckert et al., IEEE TMI 1999, eq. 2)."""

from __future__ import annotations

import math

import numpy as np

# Variance that a cubic B-spline keeps of independent control points, per axis: the mean over a cell of sum_l B_l(u)^2.
VARIANCE = 151 / 315


def count_control_points(extent: float, control_spacing: float) -> int:
    """Control points along one axis, so that four surround every position.

    Args:
        extent: Largest position in mm.
        control_spacing: Distance of the control points in mm.

    Returns:
        Their number.
    """
    return math.floor(extent / control_spacing) + 4


def basis(points: np.ndarray, control_spacing: float, *, derivative: bool = False) -> np.ndarray:
    """Weights of the control points along one axis, B_0..B_3 of the paper, or their derivatives.

    Args:
        points: ``(P,)`` increasing positions from 0, in mm.
        control_spacing: Distance of the control points in mm.
        derivative: Give the derivatives by position, in 1/mm.

    Returns:
        ``(P, 4 + last cell)`` float64; four neighbors in each row differ from 0.
    """
    position = np.asarray(points, dtype=np.float64) / control_spacing
    cell = np.floor(position).astype(int)
    u = position - cell
    if derivative:
        weights = [-((1 - u) ** 2) / 2, (3 * u**2 - 4 * u) / 2, (-3 * u**2 + 2 * u + 1) / 2, u**2 / 2]
        weights = [weight / control_spacing for weight in weights]
    else:
        weights = [(1 - u) ** 3 / 6, (3 * u**3 - 6 * u**2 + 4) / 6, (-3 * u**3 + 3 * u**2 + 3 * u + 1) / 6, u**3 / 6]
    matrix = np.zeros((len(u), int(cell.max(initial=0)) + 4))
    for offset, weight in enumerate(weights):
        matrix[np.arange(len(u)), cell + offset] = weight
    return matrix


def evaluate(control_points: np.ndarray, bases: list[np.ndarray]) -> np.ndarray:
    """Sum over the control points on a rectilinear grid: the tensor product of the axes.

    Args:
        control_points: ``(n_0, ..., d)`` values of the control points.
        bases: One matrix per axis, as :func:`basis` gives it.

    Returns:
        ``(*lengths of points, d)`` float64, in the unit of the control points.
    """
    field = control_points
    for axis, basis in enumerate(bases):
        needed = np.moveaxis(field, axis, 0)[: basis.shape[1]]
        field = np.moveaxis(np.tensordot(basis, needed, axes=1), 0, axis)
    return field
