from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from medgen.diffusion.bernoulli import flip, keep_schedule, posterior, sample_map


def test_the_schedule_goes_from_all_to_nothing() -> None:
    kept = keep_schedule(50)
    assert kept[0] == 1 and kept[-1] == 0 and (np.diff(kept) < 0).all()


def test_maps_are_flipped_as_often_as_the_schedule_says() -> None:
    y0 = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(3, 2, 200, 200).contiguous()
    kept = torch.tensor([1.0, 0.4, 0.0])
    found = flip(y0, kept, generator=torch.Generator().manual_seed(0)).mean(dim=(2, 3))
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0], [0.3, 0.7], [0.5, 0.5]]), atol=0.01, rtol=0)
    assert torch.equal(flip(y0[:1], kept[:1]), y0[:1])


@pytest.mark.parametrize(("s", "t"), [(3, 7), (1, 2), (5, 10)])
def test_the_posterior_is_that_of_the_chain_counted_out(s: int, t: int) -> None:
    """Over all paths of the two-state chain whose steps keep abar_i / abar_{i-1}."""
    kept = keep_schedule(12)
    matrices = []
    for i in range(1, t + 1):
        stay = (1 + kept[i] / kept[i - 1]) / 2
        matrices.append(np.array([[stay, 1 - stay], [1 - stay, stay]]))
    for y0, yt in itertools.product((0, 1), (0, 1)):
        to_s, to_t = np.linalg.multi_dot([np.eye(2), np.eye(2), *matrices[:s]]), np.eye(2)
        for matrix in matrices[s:]:
            to_t = to_t @ matrix
        joint = np.array([to_s[y0, ys] * to_t[ys, yt] for ys in (0, 1)])
        wanted = joint[1] / joint.sum()
        maps = (
            torch.full((1, 1, 1, 1), float(yt), dtype=torch.float64),
            torch.full((1, 1, 1, 1), float(y0), dtype=torch.float64),
        )
        assert float(posterior(*maps, float(kept[t]), float(kept[s]))) == pytest.approx(wanted, abs=1e-12)


def test_a_perfect_network_leads_back_to_its_distribution() -> None:
    """Maps are all ones or all zeros, 30 and 70 in 100: Bayes tells which from the voxels of y_t."""
    kept, voxels = keep_schedule(40), 6

    def bayes(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = torch.from_numpy(kept[t.long().numpy()]).float()[:, None]
        ones = y.flatten(1).sum(1, keepdim=True)
        up, down = (1 + a) / 2, (1 - a) / 2
        odds = 0.3 / 0.7 * (up / down.clamp(min=1e-9)) ** (2 * ones - voxels)
        return (odds / (1 + odds)).view(-1, 1, 1, 1).expand_as(y)

    random = torch.Generator().manual_seed(0)
    found = sample_map(bayes, (4000, 1, 2, 3), kept=kept, num_inference_steps=40, generator=random)
    assert float((found > 0.5).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(((found > 0.98) | (found < 0.02)).float().mean()) > 0.9
