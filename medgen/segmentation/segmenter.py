"""A small segmenter, the same for every set of scans: how it is trained, and its Dice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from medgen.seeding import derive_seed, stream


class DivergedError(RuntimeError):
    """The training of a segmenter came to no finite loss."""


Pair = tuple[torch.Tensor, torch.Tensor]  # image (C, *spatial) float16 in [0, 1], label (*spatial) uint8


@dataclass(frozen=True)
class Recipe:
    """How each segmenter is trained, fixed beforehand: nothing is chosen by what the validation scans show.

    Attributes:
        steps: Optimizer steps; the last weights are taken.
        batch_size: Crops a step.
        features: Channels of MONAI's BasicUNet.
        learning_rate: Peak of the one-cycle schedule of AdamW.
        rotation: Largest turn in degrees.
        scaling: Logarithm of the largest scale.
        shift: Largest move, in halves of the scan.
        gamma: Logarithm of the largest exponent of the intensities.
        noise: Largest standard deviation of the noise, in intensities of [0, 1].
    """

    steps: int
    batch_size: int
    features: tuple[int, ...] = (16, 16, 32, 64, 64, 16)
    learning_rate: float = 2e-3
    rotation: float = 15.0
    scaling: float = 0.15
    shift: float = 0.1
    gamma: float = 0.3
    noise: float = 0.05


def augment(pair: Pair, recipe: Recipe, patch: tuple[int, ...], generator: torch.Generator) -> Pair:
    """A crop, in 3D around a labelled voxel every other time, slightly turned, scaled, and changed in brightness.

    Nothing is mirrored: many labels tell left from right.

    Args:
        pair: Image and label.
        recipe: How much to change.
        patch: Voxels of the crop along each axis.
        generator: Of all draws.

    Returns:
        Image ``(C, *patch)`` float32, about in [0, 1], and label ``(1, *patch)`` int64.
    """
    image, label = pair[0].float(), pair[1]
    dims, size, crop = label.ndim, torch.tensor(label.shape), torch.tensor(patch)

    def uniform(bound: float, count: int = 1) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * bound

    skew = torch.zeros(dims, dims)
    angles = uniform(math.radians(recipe.rotation), 3 if dims == 3 else 1)
    for angle, (i, j) in zip(angles, [(0, 1), (0, 2), (1, 2)], strict=False):
        skew[i, j], skew[j, i] = -angle, angle
    matrix = torch.linalg.matrix_exp(skew) * torch.exp(uniform(recipe.scaling))
    center = uniform(1.0, dims) * (1 - crop / size).clamp(min=0) + uniform(recipe.shift, dims)
    on_label, which = torch.rand(2, generator=generator).tolist()
    if dims == 3 and on_label < 0.5 and len(inside := label.nonzero()):
        center = (2 * inside[int(which * len(inside))] + 1) / size - 1
    # From voxels to the units and the order of axes of grid_sample.
    affine = torch.cat([(matrix * crop / size[:, None]).flip(0, 1), center.flip(0)[:, None]], dim=1)[None]
    grid = F.affine_grid(affine, [1, 1, *patch], align_corners=False)
    image = F.grid_sample(image[None], grid, align_corners=False)[0]  # 0, the darkest value, outside
    label = F.grid_sample(label[None, None].float(), grid, mode="nearest", align_corners=False)[0].long()
    image = image.clamp(0, 1) ** torch.exp(uniform(recipe.gamma))
    return image + torch.randn(image.shape, generator=generator) * uniform(recipe.noise), label


def train_segmenter(
    pairs: Sequence[Pair],
    recipe: Recipe,
    patch: tuple[int, ...],
    classes: int,
    seed: int,
    device: torch.device,
    name: str,
) -> nn.Module:
    """Train from first weights that depend on `seed` and on nothing that the scans show.

    Args:
        pairs: What to learn from.
        recipe: How.
        patch: Voxels along each axis that the segmenter sees.
        classes: Classes, with the background.
        seed: Of the first weights and the crops.
        device: Where to train.
        name: Of the scans, for the progress bar.

    Returns:
        The trained network, in evaluation mode.

    Raises:
        DivergedError: If the loss is not finite in the end.
    """
    from monai.losses import DiceCELoss
    from monai.networks.nets import BasicUNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "utility", "weights"))
        network = BasicUNet(len(patch), len(pairs[0][0]), classes, features=recipe.features).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1)
    criterion = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    order: list[int] = []
    for step in tqdm(range(recipe.steps), desc=f"segmenter on {name.replace('_', ' ')} scans", unit="step"):
        generator = stream(seed, "utility", step)
        while len(order) < recipe.batch_size:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        batch = [augment(pairs[order.pop(0)], recipe, patch, generator) for _ in range(recipe.batch_size)]
        image, label = (torch.stack(column).to(device) for column in zip(*batch, strict=True))
        # In float32: under bfloat16 autocast on a CPU this network's transposed convolutions give NaN.
        loss = criterion(network(image), label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    if not math.isfinite(loss.item()):
        raise DivergedError(
            f"The segmenter on {name.replace('_', ' ')} scans: expected a finite loss, got {loss.item()}. "
            "Look for scans with broken intensities, or take another seed."
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
