import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from medgen.metrics import frechet_distance, frechet_distance_from_features


def _features(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + torch.rand(d, generator=generator)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean(dim=0), torch.cov(x.T)


def test_equals_the_closed_form_for_diagonal_covariances() -> None:
    value = frechet_distance(
        torch.tensor([1.0, 0.0]),
        torch.diag(torch.tensor([4.0, 9.0])),
        torch.tensor([0.0, 2.0]),
        torch.diag(torch.tensor([1.0, 16.0])),
    )
    assert value.item() == pytest.approx((1 + 4) + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)


def test_equals_scipy_sqrtm_and_the_torchmetrics_and_torch_fidelity_formulas() -> None:
    x, y = _features(300, 24, 0), _features(200, 24, 1)
    (mx, cx), (my, cy) = _moments(x), _moments(y)
    value = frechet_distance(mx, cx, my, cy).item()
    root = scipy.linalg.sqrtm((cx @ cy).numpy()).real
    by_sqrtm = float(((mx - my) ** 2).sum() + cx.trace() + cy.trace() - 2 * np.trace(root))
    # torch-fidelity: trace of the root by the complex roots of the eigenvalues.
    eigenvalues = np.linalg.eigvals(cx.numpy().dot(cy.numpy())).astype("complex128")
    by_fidelity = float(((mx - my) ** 2).sum() + cx.trace() + cy.trace() - 2 * np.sqrt(eigenvalues).real.sum())
    assert value == pytest.approx(by_sqrtm, rel=1e-9)
    assert value == pytest.approx(by_fidelity, rel=1e-9)
    assert value == pytest.approx(_compute_fid(mx, cx, my, cy).item(), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(10, 15), (300, 15), (300, 200)])
def test_features_give_what_their_moments_give_with_fewer_or_more_rows_than_columns(n: int, m: int) -> None:
    x, y = _features(n, 40, 2), _features(m, 40, 3)
    by_moments = frechet_distance(*_moments(x), *_moments(y)).item()
    assert frechet_distance_from_features(x, y).item() == pytest.approx(by_moments, rel=1e-9)


def test_few_samples_of_many_features_are_exact_where_the_eigenvalue_formula_is_not() -> None:
    # x occupies one direction, y another one at right angles: (C_x C_y)^(1/2) = 0.
    x, y = torch.zeros(2, 500, dtype=torch.float64), torch.zeros(2, 500, dtype=torch.float64)
    x[:, 0], y[:, 1] = torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 2.0])
    assert frechet_distance_from_features(x, y).item() == pytest.approx(2 + 8, rel=1e-12)
    assert frechet_distance(*_moments(x), *_moments(y)).item() == pytest.approx(2 + 8, rel=1e-12)


def test_is_symmetric_and_zero_for_the_same_set() -> None:
    x, y = _features(20, 60, 4), _features(20, 60, 5)
    there, back = frechet_distance_from_features(x, y), frechet_distance_from_features(y, x)
    assert there.item() == pytest.approx(back.item(), rel=1e-12)
    assert frechet_distance_from_features(x, x).item() == pytest.approx(0, abs=1e-10)
    assert frechet_distance(*_moments(x), *_moments(x)).item() == pytest.approx(0, abs=1e-10)


def test_float32_input_is_worked_in_float64() -> None:
    x, y = _features(50, 30, 6), _features(50, 30, 7)
    value = frechet_distance_from_features(x.float(), y.float())
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(frechet_distance_from_features(x, y).item(), rel=1e-5)


def test_refuses_moments_that_do_not_fit() -> None:
    eye = torch.eye(3)
    with pytest.raises(ValueError, match=r"one D"):
        frechet_distance(torch.zeros(3), eye, torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="finite covariances"):
        frechet_distance(torch.zeros(3), eye * float("nan"), torch.zeros(3), eye)
    with pytest.raises(ValueError, match="positive semi-definite"):
        frechet_distance(torch.zeros(3), -eye, torch.zeros(3), eye)
    with pytest.raises(ValueError, match="symmetric"):
        frechet_distance(torch.zeros(3), torch.triu(torch.ones(3, 3)), torch.zeros(3), eye)


def test_refuses_one_row_and_infinite_features() -> None:
    with pytest.raises(ValueError, match="N, M >= 2"):
        frechet_distance_from_features(torch.zeros(1, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="finite features"):
        frechet_distance_from_features(torch.full((2, 4), float("inf")), torch.zeros(5, 4))
