"""Standard deviation that each sampler gives back, with the best possible denoiser of Gaussian data.

    python benchmarks/samplers.py

The true ratio is 1; few steps and ill-chosen spacings shrink or widen what a model learned. Beside it stands a mixture
of three Gaussians in one dimension, where the probability flow maps quantiles to quantiles: the mean distance from
there, in units of the data's standard deviation. Writes ``benchmarks/results/samplers.json``. No learned network, no
random numbers: the noise is the set of the normal distribution's quantiles.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from medgen.diffusion.objective import Objective
from medgen.diffusion.sampler import SPACINGS, sample, sampler_names

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = [
    Objective(prediction="flow"),
    Objective(prediction="v_prediction"),
    Objective(prediction="v_prediction", beta_schedule="squaredcos_cap_v2"),
    Objective(prediction="v_prediction", beta_schedule="linear"),
    Objective(prediction="v_prediction", zero_terminal_snr=False),
    Objective(prediction="epsilon", zero_terminal_snr=False),
    Objective(prediction="epsilon", beta_schedule="linear", zero_terminal_snr=False),
]
STEPS = (5, 10, 20, 50, 100)
POINTS = 400
GAUSSIANS = ((0.3, 0.2), (0.3, 0.4), (0.3, 1.0))
MIXTURE = ((-0.8, 0.1, 0.3), (0.1, 0.1, 0.5), (0.7, 0.1, 0.2))  # mean, standard deviation, share
SETTING = 'Gaussian data, mean 0.3; "ratio" is sampled over true standard deviation, by true standard deviation'


class BestDenoiser:
    """The network output that minimizes the training loss for a mixture of Gaussians, voxel by voxel."""

    def __init__(self, objective: Objective, components: tuple[tuple[float, float, float], ...]) -> None:
        self.objective = objective
        self.mean, self.std, self.share = (
            torch.tensor(values, dtype=torch.float64) for values in zip(*components, strict=True)
        )

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Network output for the state ``(B, C, *spatial)`` at times ``(B,)``."""
        alpha, sigma = (value.double().view(-1, *[1] * x.ndim) for value in self.objective.alpha_sigma(t))
        variance = alpha**2 * self.std**2 + sigma**2
        error = x.double().unsqueeze(-1) - alpha * self.mean
        member = (self.share.log() - variance.log() / 2 - error**2 / variance / 2).softmax(-1)
        x0 = (member * (self.mean + alpha * self.std**2 / variance * error)).sum(-1)
        noise = (member * (sigma / variance * error)).sum(-1)
        alpha, sigma = alpha.squeeze(-1), sigma.squeeze(-1)
        target = {"flow": noise - x0, "v_prediction": alpha * noise - sigma * x0, "epsilon": noise}
        return target[self.objective.prediction]


def exact_mixture(shares: np.ndarray) -> np.ndarray:
    """Quantiles of the mixture: where the probability flow takes the normal distribution's."""

    def below(x: float, share: float) -> float:
        return sum(w * norm.cdf((x - m) / c) for m, c, w in MIXTURE) - share

    return np.array([brentq(below, -5, 5, args=(share,)) for share in shares])


def main() -> None:
    """Measure everything that is offered, write the JSON, print the defaults."""
    torch.set_num_threads(1)
    shares = (np.arange(POINTS) + 0.5) / POINTS
    noise = torch.from_numpy(norm.ppf(shares)).float().view(1, 1, 20, 20)
    exact = torch.from_numpy(exact_mixture(shares)).view_as(noise)
    rows = []
    for objective in OBJECTIVES:
        for sampler in sampler_names(objective):
            for spacing in SPACINGS:
                for steps in STEPS:
                    run = partial(
                        sample,
                        noise=noise,
                        objective=objective,
                        sampler=sampler,
                        spacing=spacing,
                        num_inference_steps=steps,
                    )
                    ratio = {}
                    for mean, std in GAUSSIANS:
                        x0 = run(BestDenoiser(objective, ((mean, std, 1.0),)))
                        ratio[str(std)] = round(float(x0.std() / noise.std()) / std, 4)
                    x0 = run(BestDenoiser(objective, MIXTURE))
                    mixture = float((x0 - exact).abs().mean() / exact.std())
                    rows.append(
                        {
                            "prediction": objective.prediction,
                            "schedule": None if objective.is_flow else objective.beta_schedule,
                            "zero_terminal_snr": None if objective.is_flow else objective.zero_terminal_snr,
                            "sampler": sampler,
                            "spacing": spacing,
                            "default": spacing == "lu",
                            "steps": steps,
                            "ratio": ratio,
                            "mixture_error": round(mixture, 4),
                        }
                    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    result = {
        "what": SETTING,
        "command": "python benchmarks/samplers.py",
        "commit": commit.stdout.strip() or None,
        "device": f"cpu, {platform.machine()}, 1 thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "n": POINTS,
        "seeds": [],
        "rows": rows,
    }
    path = ROOT / "benchmarks" / "results" / "samplers.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows)
    print(f"written to {path.relative_to(ROOT)}")


def print_table(rows: list[dict]) -> None:
    """Worst ratio over the three standard deviations at the default spacing, and the mixture's error at 20 steps."""
    print("Sampled / true standard deviation, the worst of true 0.2, 0.4 and 1.0, at the default spacing\n")
    print(f"| model | sampler | {' | '.join(f'{steps} steps' for steps in STEPS)} | mixture error, 20 steps |")
    print("|---|---|" + "---|" * (len(STEPS) + 1))
    groups: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        if row["default"]:
            zero = ", zero SNR" if row["zero_terminal_snr"] else ""
            model = row["prediction"] + (f", {row['schedule']}{zero}" if row["schedule"] else "")
            groups.setdefault((model, row["sampler"]), {})[row["steps"]] = row
    for (model, sampler), by_steps in groups.items():
        worst = [max(by_steps[steps]["ratio"].values(), key=lambda ratio: abs(math.log(ratio))) for steps in STEPS]
        figures = " | ".join(f"{ratio:.3f}" for ratio in worst)
        print(f"| {model} | {sampler} | {figures} | {by_steps[20]['mixture_error']:.3f} |")


if __name__ == "__main__":
    main()
