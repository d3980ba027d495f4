"""A second stage for segmentations: a diffusion of binary maps that starts from what a segmenter says.

A segmenter judges voxel by voxel; a diffusion of whole maps knows which shapes there are. It sees the scan, the
segmenter's probabilities and a map whose voxels were flipped at random, and says what the map was.

Reference:
    Chen et al. 2024, arXiv:2407.03548 (HiDiff).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch.nn import functional as F

from medgen.diffusion.bernoulli import flip, keep_schedule, sample_map
from medgen.seeding import derive_seed, stream
from medgen.segmentation import Augmentation, Pair, Recipe, augment, build_segmenter, fit_network
from medgen.test_time.segmenter import Segmenter
from medgen.types import BadInputError


class Refiner(ModelMixin, ConfigMixin):
    """Chances that the voxels of each class but the background were 1 before they were flipped.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C of the scan.
        classes: K, with the background.
        features: Channels of its U-Net per level.
        num_train_timesteps: T of the diffusion.
    """

    @register_to_config
    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        classes: int = 2,
        features: Sequence[int] = (16, 32, 64),
        num_train_timesteps: int = 100,
    ) -> None:
        super().__init__()
        recipe = Recipe(steps=1, batch_size=1, features=tuple(features))
        inputs = (classes - 1) + in_channels + classes + 1
        self.network = build_segmenter(recipe, spatial_dims, inputs, classes - 1, seed=0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the chances.

        Args:
            inputs: ``(B, K - 1 + C + K + 1, *spatial)``: maps in {0, 1}, scan, probabilities of the segmenter, and the
                time over T in every voxel. Any size: it is padded and cropped back.

        Returns:
            ``(B, K - 1, *spatial)``.
        """
        size = inputs.shape[2:]
        divisor = 2 ** (len(self.config["features"]) - 1)
        pad = [amount for length in reversed(size) for amount in (0, -length % divisor)]
        padded = F.pad(inputs, pad, mode="replicate") if any(pad) else inputs
        return self.network(padded)[(..., *(slice(length) for length in size))]


def train_refiner(
    pairs: Sequence[Pair],
    segmenter: Segmenter,
    *,
    classes: int,
    patch: tuple[int, ...],
    steps: int = 600,
    batch_size: int = 2,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Refiner:
    """Train a refiner for one segmenter, best on scans that it has not learned from.

    Args:
        pairs: Image ``(C, *spatial)`` float16 in [0, 1] and label ``(*spatial)`` uint8 of each scan, as
            :func:`medgen.segmentation.load_pairs` gives them.
        segmenter: Sees the same images.
        classes: K, with the background.
        patch: Voxels of the crops per axis.
        steps: Optimizer steps.
        batch_size: Crops a step.
        augmentation: How crops are changed; None takes the default.
        seed: Of all draws.
        device: Where to train.

    Returns:
        The refiner, in evaluation mode.

    Raises:
        BadInputError: If there is no pair, or the segmenter has other classes.
    """
    from monai.losses import DiceCELoss

    if not pairs:
        raise BadInputError("pairs: expected labelled scans to learn from, got none.")
    refiner = Refiner(len(patch), len(pairs[0][0]), classes)
    kept, total = (
        torch.from_numpy(keep_schedule(refiner.config["num_train_timesteps"])).float(),
        refiner.config["num_train_timesteps"],
    )
    change = augmentation or Augmentation()

    def example(index: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = augment(pairs[index], change, patch, generator)
        prior = segmenter(image)
        if len(prior) != classes:
            raise BadInputError(f"segmenter: expected {classes} classes, got {len(prior)}. Give its own labels.")
        y0 = F.one_hot(label[0], classes).movedim(-1, 0)[1:].float()
        t = int(torch.randint(1, total + 1, (1,), generator=generator))
        noisy = flip(y0[None], kept[t : t + 1], generator=generator)[0]
        return _pack(noisy[None], image[None], prior[None], t / total)[0], y0

    recipe = Recipe(steps, batch_size)
    loss = DiceCELoss(sigmoid=True)
    fit_network(refiner, len(pairs), example, loss, recipe, seed=seed, device=torch.device(device), name="refiner")
    return refiner.eval()


def _pack(maps: torch.Tensor, image: torch.Tensor, prior: torch.Tensor, time: float) -> torch.Tensor:
    return torch.cat([maps, image, prior, torch.full_like(image[:, :1], time)], dim=1)


class Refined:
    """A segmenter with a refiner behind it, for :class:`medgen.test_time.GenerativeTTA` with ``probabilities``.

    Args:
        segmenter: The first stage.
        refiner: Trained for it.
        num_inference_steps: Steps of the diffusion.
        num_samples: Maps that are drawn; their mean is the answer.
        seed: Of all draws: equal scans get equal answers.

    Raises:
        BadInputError: If a number is below 1.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        refiner: Refiner,
        *,
        num_inference_steps: int = 10,
        num_samples: int = 4,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_inference_steps", num_inference_steps), ("num_samples", num_samples)):
            if value < 1:
                raise BadInputError(f"{name}: expected at least 1, got {value}.")
        self.segmenter, self.refiner = segmenter, refiner.eval()
        self.num_inference_steps, self.num_samples, self.seed = num_inference_steps, num_samples, seed

    @torch.inference_mode()
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Probabilities.

        Args:
            inputs: ``(B, C, *spatial)``, one after the other.

        Returns:
            ``(B, K, *spatial)``, sums of 1.

        Raises:
            BadInputError: If scan or classes are not those that the refiner was trained for.
        """
        return torch.cat([self._refine(row[None]) for row in inputs.cpu().float()]).to(inputs.device)

    def _refine(self, image: torch.Tensor) -> torch.Tensor:
        config: Any = self.refiner.config
        prior = self.segmenter(image[0])[None]
        if image.shape[1] != config["in_channels"] or prior.shape[1] != config["classes"]:
            raise BadInputError(
                f"refiner: expected {config['in_channels']} channel(s) and {config['classes']} classes, got "
                f"{image.shape[1]} and {prior.shape[1]}. Train one for this segmenter."
            )
        device = next(self.refiner.parameters()).device
        total, count = config["num_train_timesteps"], self.num_samples
        scans, priors = (part.expand(count, *part.shape[1:]) for part in (image, prior))

        def predict(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            packed = _pack(y, scans, priors, float(t[0]) / total)
            return self.refiner(packed.to(device)).sigmoid().float().cpu()

        drawn = sample_map(
            predict,
            (count, config["classes"] - 1, *image.shape[2:]),
            kept=keep_schedule(total),
            num_inference_steps=self.num_inference_steps,
            generator=stream(derive_seed(self.seed, "refiner"), "noise"),
        )
        chances = drawn.mean(dim=0, keepdim=True)
        # Classes exclude each other; where all chances are small it is the background.
        whole = torch.cat([(1 - chances).prod(dim=1, keepdim=True), chances], dim=1)
        return whole / whole.sum(dim=1, keepdim=True).clamp(min=1e-8)
