"""The ways to train that are compared: from which scans, how changed, and in how many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from medgen.seeding import draw
from medgen.segmentation import UNCHANGED, Pair, Recipe
from medgen.trial.task import Task

BASELINE = "classical"
DUPLICATES = "duplicates"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Short name.
        words: What it learns from, for tables.
        real: Whether real scans are learned from.
        ratio: Synthetic scans for each real one; None takes all that there are.
        copies: Whether copies of real scans stand in the place of the synthetic ones.
        augmented: Whether scans are changed by classical augmentation.
        pretrained: Whether the synthetic scans are learned from first, in half of the steps, and the real ones then.
    """

    name: str
    words: str
    real: bool = True
    ratio: float | None = 0.0
    copies: bool = False
    augmented: bool = True
    pretrained: bool = False

    @property
    def uses_synthetic(self) -> bool:
        """Whether it learns from synthetic scans."""
        return self.ratio != 0 and not self.copies


def plan_arms(ratios: Sequence[float]) -> list[Arm]:
    """All arms of a comparison.

    Args:
        ratios: Synthetic scans for each real one, positive; without any, only the arms of real scans are left.

    Returns:
        The arms, the baseline among them.
    """
    arms = [
        Arm("real", "real scans, unchanged", augmented=False),
        Arm(BASELINE, "real scans with classical augmentation"),
    ]
    if not ratios:
        return arms
    most = max(ratios)
    return [
        *arms,
        Arm(DUPLICATES, f"real scans, and {_copies(most)} of each", ratio=most, copies=True),
        *(Arm(f"synthetic_{r:.3g}", f"real scans, and {_scans(r)} for each", ratio=r) for r in ratios),
        Arm("pretrained", "all synthetic scans first, then the real ones", ratio=None, pretrained=True),
        Arm("synthetic_only", "synthetic scans alone", real=False, ratio=None),
    ]


def _scans(ratio: float) -> str:
    return f"{ratio:.2g} synthetic scan{'' if ratio == 1 else 's'}"


def _copies(ratio: float) -> str:
    return "1 copy" if ratio == 1 else f"{ratio:.2g} copies"


def count_synthetic(arm: Arm, num_real: int, num_synthetic: int) -> int:
    """Synthetic scans, or copies in their place, that an arm takes.

    Args:
        arm: The arm.
        num_real: Real training scans.
        num_synthetic: Synthetic scans that there are.

    Returns:
        How many; may be more than there are.
    """
    return num_synthetic if arm.ratio is None else round(arm.ratio * num_real)


def train_arm(
    arm: Arm, task: Task, real: Sequence[Pair], synthetic: Sequence[Pair], recipe: Recipe, seed: int
) -> nn.Module:
    """Train the network of an arm; each takes as many steps, from the same first weights.

    Args:
        arm: The arm.
        task: What is learned.
        real: Real training scans.
        synthetic: Synthetic scans, of which each seed takes others where not all are wanted, as it does of copies.
        recipe: How networks are trained.
        seed: Of weights, crops and the synthetic scans that are taken.

    Returns:
        The trained network.

    Raises:
        DivergedError: If the loss is not finite in the end.
    """
    wanted = count_synthetic(arm, len(real), len(synthetic))
    if arm.copies:
        whole, rest = divmod(wanted, len(real))
        added = [*real] * whole + [real[index] for index in draw(range(len(real)), rest, seed, "utility", "copies")]
    else:
        added = [synthetic[index] for index in draw(range(len(synthetic)), wanted, seed, "utility", "synthetic")]
    if not arm.augmented:
        recipe = replace(recipe, augmentation=UNCHANGED)
    if not arm.pretrained:
        return task.learn([*(real if arm.real else ()), *added], recipe, seed, arm.name, None)
    first = replace(recipe, steps=recipe.steps // 2)
    network = task.learn(added, first, seed, "synthetic", None)
    return task.learn(real, replace(recipe, steps=recipe.steps - first.steps), seed, "real", network)
