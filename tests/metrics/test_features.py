import numpy as np
import pytest
import torch

from medgen.metrics.features import check_feature_sets, cosines


def test_takes_arrays_and_tensors_of_any_precision() -> None:
    x, y = check_feature_sets("test", np.ones((2, 3), dtype=np.float32), torch.ones(4, 3, requires_grad=True))
    assert x.dtype == y.dtype == torch.float64
    assert not y.requires_grad


@pytest.mark.parametrize(
    ("x", "y"),
    [(torch.ones(1, 3), torch.ones(4, 3)), (torch.ones(4, 3), torch.ones(4, 2)), (torch.ones(4), torch.ones(4))],
)
def test_refuses_sets_that_do_not_compare(x: torch.Tensor, y: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"caller: expected \(N, D\) and \(M, D\) with N, M >= 2 and one D, got .*Add"):
        check_feature_sets("caller", x, y)


def test_refuses_nan() -> None:
    with pytest.raises(ValueError, match=r"caller: expected finite features, got NaN or infinity\. Look for NaN"):
        check_feature_sets("caller", torch.ones(3, 2), torch.full((3, 2), float("nan")))


def test_cosines_are_those_of_unit_vectors() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(x, dim=1)
    assert torch.allclose(cosines(x @ x.T), unit @ unit.T, atol=1e-12)


def test_refuses_vectors_without_direction() -> None:
    with pytest.raises(ValueError, match="expected vectors that are not zero, got 1 zero ones of 2"):
        cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
