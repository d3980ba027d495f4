"""B-splines, against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import BSpline, NdBSpline

from medgen.conditions import spline


@pytest.mark.parametrize(("extent", "control"), [(30.0, 7.0), (21.0, 7.0), (5.0, 9.0), (0.0, 4.0)])
@pytest.mark.parametrize("derivative", [False, True])
def test_weights_equal_scipys_basis(extent: float, control: float, derivative: bool) -> None:
    number = spline.count_control_points(extent, control)
    points = np.linspace(0, extent, 40)
    knots = (np.arange(number + 4) - 3) * control
    expected = BSpline(knots, np.eye(number), 3)(points, nu=int(derivative))
    weights = spline.basis(points, control, derivative=derivative)
    np.testing.assert_allclose(weights, expected[:, : weights.shape[1]], atol=1e-12)
    assert not expected[:, weights.shape[1] :].any()


def test_the_tensor_product_equals_scipys() -> None:
    control, extents = 3.0, (10.0, 7.0, 4.0)
    counts = [spline.count_control_points(extent, control) for extent in extents]
    values = np.random.default_rng(0).normal(size=(*counts, 3))
    points = [np.linspace(0, extent, 5 + axis) for axis, extent in enumerate(extents)]
    knots = tuple((np.arange(number + 4) - 3) * control for number in counts)
    expected = NdBSpline(knots, values, 3)(np.stack(np.meshgrid(*points, indexing="ij"), axis=-1))
    found = spline.evaluate(values, [spline.basis(axis, control) for axis in points])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_variance_is_the_mean_of_the_squared_weights() -> None:
    weights = spline.basis((np.arange(4000) + 0.5) / 4000, 1.0)
    assert (weights**2).sum(axis=1).mean() == pytest.approx(spline.VARIANCE, rel=1e-6)
