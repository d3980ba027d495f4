"""Texts in training: those that are too long for the text encoder are told once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from medgen.networks import TextEncoder
from medgen.planning import ConditionsPlan, TextPlan
from medgen.training.cache import CachedScan
from medgen.training.steering import Steering

TEXTS = ("chest no ap view", "chest view", "chest view no ap", "")


class Warns(nn.Module):
    """Stands for a pretrained encoder, which warns of each text that it cuts."""

    width, length = 4, 3

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=trained)

    def encode(self, texts: Sequence[str], *, device: object = None, truncate: bool = False) -> torch.Tensor:
        for text in filter(self.cut, texts):
            warnings.warn(f"{text} is too long", stacklevel=2)
        return torch.ones(len(texts), self.length, self.width) * self.weight

    def cut(self, text: str) -> str:
        return " ".join(text.split()[self.length :])


@pytest.mark.parametrize("kind", ["small", "frozen", "trained"])
def test_texts_that_are_cut_are_told_once(kind: str) -> None:
    scans = [CachedScan(f"{n}", "", "", (), (), (), (), (), 0, text=text) for n, text in enumerate(TEXTS)]
    small = TextEncoder(["chest", "view", "no", "ap"], width=4, depth=1, heads=2, length=3)
    encoder = small if kind == "small" else Warns(trained=kind == "trained")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steering = Steering(ConditionsPlan(mask=False, text=TextPlan()), 2, scans, encoder)
        nothing = {"label": torch.zeros(4, 4), "valid": torch.ones(4, 4, dtype=torch.bool)}
        rows, texts = zip(*(steering.read(scan.case, nothing, None) for scan in scans[:3]), strict=True)
        steering.batch(rows, texts, torch.device("cpu"))
    assert [str(each.message) for each in caught] == [
        "2 of 3 texts are longer than the 3 tokens that the text encoder takes and are cut; e.g. 'chest no ap view'"
    ]
