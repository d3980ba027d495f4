from __future__ import annotations

import warnings

import pytest

from medgen.precision import resolve_precision


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_format_that_is_slow_here_is_kept_with_a_warning(has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medgen.precision.has_bf16_kernels", lambda: has_kernels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resolve_precision("bf16", "cpu") == "bf16"
        assert resolve_precision("fp32", "cpu") == "fp32"
        assert resolve_precision("auto", "cpu") in ("bf16", "fp32")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (0 if has_kernels else 1)
    assert all("'bf16' is many times slower than 'fp32'. Use 'auto'" in message for message in messages)
