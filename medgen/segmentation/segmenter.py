"""A small segmenter, the same for every set of scans: how it is trained, and its Dice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from medgen.seeding import derive_seed, stream
from medgen.segmentation.augmentation import Augmentation, Pair, augment


class DivergedError(RuntimeError):
    """The training of a segmenter came to no finite loss."""


@dataclass(frozen=True)
class Recipe:
    """How each segmenter is trained, fixed beforehand: nothing is chosen by what the validation scans show.

    Attributes:
        steps: Optimizer steps; the last weights are taken.
        batch_size: Crops a step.
        features: Channels of MONAI's residual UNet; each level after the first halves the resolution.
        learning_rate: Peak of the one-cycle schedule of AdamW.
        augmentation: How crops are changed.
    """

    steps: int
    batch_size: int
    features: tuple[int, ...] = (16, 32, 64, 128)
    learning_rate: float = 2e-3
    augmentation: Augmentation = field(default_factory=Augmentation)


def build_segmenter(recipe: Recipe, dims: int, channels: int, classes: int, seed: int) -> nn.Module:
    """A segmenter with fresh weights.

    Args:
        recipe: Gives its size.
        dims: 2 or 3.
        channels: Of the image.
        classes: Classes, with the background.
        seed: Of the weights, on which nothing else bears.

    Returns:
        The network, ``(B, C, *spatial)`` to logits ``(B, classes, *spatial)``.
    """
    from monai.networks.nets import UNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "utility", "weights"))
        strides = (2,) * (len(recipe.features) - 1)
        return UNet(dims, channels, classes, recipe.features, strides, num_res_units=2, norm="instance")


def train_segmenter(
    pairs: Sequence[Pair],
    recipe: Recipe,
    patch: tuple[int, ...],
    classes: int,
    seed: int,
    device: torch.device,
    name: str,
    start: nn.Module | None = None,
) -> nn.Module:
    """Train from first weights that depend on `seed` and on nothing that the scans show, or from given ones.

    Args:
        pairs: What to learn from.
        recipe: How.
        patch: Voxels along each axis that the segmenter sees.
        classes: Classes, with the background.
        seed: Of the first weights and the crops.
        device: Where to train.
        name: Of the scans, for the progress bar.
        start: A network to go on from, which is changed; None begins with fresh weights.

    Returns:
        The trained network, in evaluation mode.

    Raises:
        DivergedError: If the loss is not finite in the end.
    """
    from monai.losses import DiceCELoss

    network = start or build_segmenter(recipe, len(patch), len(pairs[0][0]), classes, seed)
    return fit_network(
        network,
        len(pairs),
        lambda index, generator: augment(pairs[index], recipe.augmentation, patch, generator),
        DiceCELoss(softmax=True, to_onehot_y=True, include_background=False),
        recipe,
        seed=seed,
        device=device,
        name=f"segmenter on {name.replace('_', ' ')} scans",
    )


def fit_network(
    network: nn.Module,
    count: int,
    example: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    name: str,
) -> nn.Module:
    """Train a network on random examples, in passes over all scans.

    Args:
        network: Is changed.
        count: Number of scans.
        example: Gives input and target of a scan, changed at random.
        criterion: Loss of outputs and targets of a batch.
        recipe: Steps, batch size and rate.
        seed: Of the order and of all that is random in the examples.
        device: Where to train.
        name: What is trained, for the progress bar.

    Returns:
        The network, in evaluation mode.

    Raises:
        DivergedError: If the loss is not finite in the end.
    """
    network = network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    # A hair above a tenth: where that is exactly one step, OneCycleLR divides by zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1 + 1e-9)
    order: list[int] = []
    for step in tqdm(range(recipe.steps), desc=name, unit="step"):
        generator = stream(seed, "utility", step)
        while len(order) < recipe.batch_size:
            order += torch.randperm(count, generator=generator).tolist()
        batch = [example(order.pop(0), generator) for _ in range(recipe.batch_size)]
        inputs, targets = (torch.stack(column).to(device) for column in zip(*batch, strict=True))
        loss = criterion(network(inputs), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    if not math.isfinite(loss.item()):
        raise DivergedError(
            f"The {name}: expected a finite loss, got {loss.item()}. Look for scans with broken intensities, or take "
            "another seed."
        )
    return network.eval()


@torch.inference_mode()
def score_segmenter(network: nn.Module, pairs: Sequence[Pair], patch: tuple[int, ...], classes: int) -> torch.Tensor:
    """Dice of each scan and class.

    Args:
        network: The segmenter.
        pairs: N scans that it is tested on.
        patch: Voxels of the sliding window along each axis.
        classes: K, without the background.

    Returns:
        ``(N, K)`` float64; NaN where the label does not show the class.
    """
    from monai.inferers import sliding_window_inference

    device = next(network.parameters()).device
    rows = []
    for image, label in pairs:
        output = sliding_window_inference(image[None].float().to(device), patch, 4, network, mode="gaussian")
        found, given = torch.as_tensor(output).argmax(1)[0].cpu(), label
        row = []
        for k in range(1, classes + 1):
            right, both = ((found == k) & (given == k)).sum(), (found == k).sum() + (given == k).sum()
            row.append(float(2 * right / both) if (given == k).any() else math.nan)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)
