"""What steers a batch: absent parts, dropping them, and the order in which guidance adds them."""

from __future__ import annotations

import pytest
import torch

from medgen.conditions.condition import Condition, join
from medgen.types import BadInputError


def _condition(count: int = 4) -> Condition:
    return Condition(
        {
            "text": torch.ones(count, 3, 5),
            "view": torch.ones(count, 2),
            "mask": torch.ones(count, 2, 4, 4),
            "age": torch.ones(count, 3),
        }
    )


def test_parts_come_maps_first_and_words_last():
    assert list(_condition()) == ["mask", "age", "view", "text"]
    assert list(_condition().only(["text", "mask"])) == ["mask", "text"]


def test_chain_joins_neighbors_of_one_scale():
    whole = _condition()
    chain, scales = whole.chain(2.0)
    assert ([list(step) for step in chain], scales) == ([[], ["mask", "age", "view", "text"]], [2.0])
    chain, scales = whole.chain({"mask": 1.0, "text": 5.0}, 1.0)
    assert [list(step) for step in chain] == [[], ["mask", "age", "view"], ["mask", "age", "view", "text"]]
    assert scales == [1.0, 5.0]
    chain, scales = whole.chain({"age": 2.0}, 1.5)
    assert scales == [1.5, 2.0, 1.5]
    assert Condition().chain(3.0)[1] == []


def test_a_scale_of_an_absent_condition_is_refused():
    with pytest.raises(BadInputError, match="expected conditions among mask, age, view, text, got edge"):
        _condition().chain({"edge": 2.0})


def test_parts_are_dropped_one_by_one_and_all_together():
    source = torch.Generator().manual_seed(0)
    rows = [_condition(1).drop({"mask": 0.5, "text": 0.25}, generator=source, all_of_them=0.1) for _ in range(4000)]
    absent = {name: torch.tensor([not row.parts[name].any() for row in rows]).float() for name in rows[0]}
    for name, chance in (("mask", 0.55), ("text", 0.325), ("age", 0.1)):  # 1 - 0.9 (1 - p)
        assert absent[name].mean().item() == pytest.approx(chance, abs=0.03)
    bare = torch.stack([absent[name] for name in absent]).prod(dim=0)
    assert bare.mean().item() == pytest.approx(0.1, abs=0.02)
    both = (absent["mask"] * absent["text"])[bare == 0].mean().item()
    assert both == pytest.approx(0.125, abs=0.03)  # each on its own


def test_joining_fills_what_is_missing_with_zeros():
    one, two = Condition({"mask": torch.ones(1, 2, 4, 4)}), Condition({"text": torch.ones(1, 3, 5)})
    whole = join([one, two])
    assert {name: tuple(part.shape) for name, part in whole.parts.items()} == {"mask": (2, 2, 4, 4), "text": (2, 3, 5)}
    assert whole.parts["mask"][0].all()
    assert not whole.parts["mask"][1].any()
    assert not whole.parts["text"][0].any()
