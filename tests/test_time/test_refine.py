from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medgen.seeding import stream
from medgen.segmentation import Augmentation
from medgen.test_time import Segmenter
from medgen.test_time.refine import Refined, Refiner, train_refiner
from medgen.types import BadInputError

PATCH = (32, 32)


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A disk of class 1, brighter on average but drowned in noise."""
    random = stream(seed)
    center = 10 + 12 * torch.rand(2, generator=random)
    axes = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    label = ((axes - center.view(2, 1, 1)).square().sum(0).sqrt() < 7).to(torch.uint8)
    image = 0.35 + 0.3 * label + 0.25 * torch.randn(32, 32, generator=random)
    return image[None].clamp(0, 1).half(), label


def by_threshold(inputs: torch.Tensor) -> torch.Tensor:
    """What a voxel says by itself, which is not much."""
    return torch.cat([0.5 - inputs, inputs - 0.5], dim=1) * 4


def dice(found: torch.Tensor, label: torch.Tensor) -> float:
    shown = found[0].argmax(0) == 1
    return float(2 * (shown & (label == 1)).sum() / (shown.sum() + (label == 1).sum()))


@pytest.fixture(scope="module")
def refiner() -> Refiner:
    pairs = [pair(seed) for seed in range(40)]
    change = Augmentation(rotation=0.0, scaling=0.0, gamma=0.0, noise=0.0)
    return train_refiner(
        pairs, Segmenter(by_threshold), classes=2, patch=PATCH, steps=400, batch_size=4, augmentation=change
    )


def test_what_a_voxel_cannot_tell_the_shape_does(refiner: Refiner, tmp_path: Path) -> None:
    segmenter = Segmenter(by_threshold)
    refined = Refined(segmenter, refiner)
    before, after = [], []
    for seed in range(100, 108):
        image, label = pair(seed)
        inputs = image.float()[None]
        found = refined(inputs)
        torch.testing.assert_close(found.sum(1), torch.ones(1, *PATCH), atol=1e-5, rtol=0)
        before.append(dice(by_threshold(inputs), label))
        after.append(dice(found, label))
    assert sum(after) / 8 > 0.85 > 0.7 > sum(before) / 8
    assert torch.equal(refined(inputs), found)
    refiner.save_pretrained(tmp_path / "refiner")
    assert {path.suffix for path in (tmp_path / "refiner").iterdir()} == {".json", ".safetensors"}
    again = Refined(segmenter, Refiner.from_pretrained(tmp_path / "refiner"))
    assert torch.equal(again(inputs), found)
    both = refined(torch.cat([inputs, pair(100)[0].float()[None]]))  # as sliding windows come
    assert torch.equal(both[:1], found) and not torch.equal(both[1:], found)
    odd = refined(torch.rand(1, 1, 30, 27))  # any size
    assert odd.shape == (1, 2, 30, 27)


def test_what_does_not_fit_is_refused(refiner: Refiner) -> None:
    three = Segmenter(lambda x: torch.cat([x, x, x], dim=1))
    with pytest.raises(BadInputError, match="expected 1 channel\\(s\\) and 2 classes, got 1 and 3"):
        Refined(three, refiner)(torch.rand(1, 1, 32, 32))
    with pytest.raises(BadInputError, match="expected 2 classes, got 3"):
        train_refiner([pair(0)], three, classes=2, patch=PATCH, steps=2)
    with pytest.raises(BadInputError, match="expected labelled scans"):
        train_refiner([], three, classes=2, patch=PATCH)
    with pytest.raises(BadInputError, match="num_samples: expected at least 1"):
        Refined(three, refiner, num_samples=0)
