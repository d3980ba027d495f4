"""Test-time augmentation by generative views, for any segmenter.

References:
    Ma et al. 2026, arXiv:2406.17608 (TTGA). Wang et al. 2019, arXiv:1807.07356 (test-time augmentation).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from monai.utils import convert_to_tensor

from medgen.generator import Generator
from medgen.generator.scans import affine_of
from medgen.precision import Precision, resolve_precision
from medgen.test_time.aggregate import Agreement, Combination, Consensus, Weighting
from medgen.test_time.geometric import Flip, Pose, change_intensities, flips, random_pose
from medgen.test_time.making import Making, ScanViews
from medgen.test_time.masks import MaskKind, check_kind
from medgen.test_time.segmenter import Network, Output, Segmenter
from medgen.test_time.views import ViewSettings
from medgen.types import BadInputError

NULL_TEXT = "null_text"
_STABLE = 0.999  # share of the voxels of the classes that stay, from which a consensus counts as the same


@dataclass(frozen=True, eq=False)
class Prediction(Agreement):
    """What came of all views of a scan.

    Attributes:
        evaluations: Rows that the denoiser has seen; a backward pass counts as two.
        segmentations: Passes of the segmenter.
        seconds: All together.
        fallback: Why there are no generative views; empty where there are.
        stopped: Why there are fewer views than were asked for; empty where there are all.
        familiarity: Score of the scan by what the generator knows, about 1 for known ones; None where it was not asked
            or has not learned it.
    """

    evaluations: int
    segmentations: int
    seconds: float
    fallback: str
    stopped: str
    familiarity: float | None


class GenerativeTTA:
    """A segmenter that also sees what a generator makes of a scan, and says how sure it is.

    The scan and its views are segmented, the predictions averaged. A view is the scan after some noise and the way back
    (:mod:`medgen.diffusion.inversion`): of the anatomy that the generator knows, with other noise, and inside a mask
    only, outside of which it has the scan bit for bit. Then it is turned and scaled a little, and mirrored if you say
    so; predictions are brought back.

    The generator sees the scan by its own normalization and on its own grid; the segmenter gets what it is given, and
    views in the same units and on the same voxels.

    Args:
        segmenter: From ``(1, C, H, W[, D])`` to ``(1, K, H, W[, D])``: a module, TorchScript, exported
            program or function.
        generator: A Generator on its device, or folder, embedded name or Hub id of one. 2D models see volumes slice by
            slice.
        num_views: Generative views beside the scan itself and its mirror images.
        mask: Where views may differ: ``uncertainty``, where the segmenter is unsure of the scan; ``everywhere``;
            ``attention``, where a model that texts steer attends to the words; random ``blocks``, others in each view;
            or ``hybrid``, blocks of the region of attention, or of uncertainty where there are no words.
        strength: Share in (0, 1] of the noise process that is gone.
        randomness: rho in [0, 1]: 0 goes the same way back, which with a detail of 1 gives the scan; 1 draws all noise
            anew.
        num_inference_steps: Steps within the strength.
        method: An inversion of :data:`medgen.diffusion.inversion.METHODS`, or ``null_text``, the published method
            (:mod:`medgen.test_time.null_text`), for comparison.
        guidance_scale: w for the conditions, of all or by name; 1 makes one pass a step.
        detail: Share in [0, 1] of the scan's own detail that views keep (:class:`medgen.test_time.views.ViewSettings`).
        geometric: Axes of the array, from 0, along which scan and views are mirrored; True is all. Name those alone
            along which the segmenter has seen mirror images in training: a segmenter of left and right organs takes
            one for the other in a mirror. Views are turned and scaled in any case but for False.
        rotation: Largest turn of a view about each axis, in degrees.
        scaling: Largest logarithm of the scale of a view.
        intensity: Whether views also get another gamma, contrast, brightness and noise.
        combination: ``mean`` of probabilities, ``logit`` mean or ``vote``.
        weighting: ``equal`` or by ``confidence``.
        outlier_dice: Views that agree less with the others than this share of their own agreement do not count.
        patience: Stop after so many generative views that leave the consensus as it is; 0 makes all.
        max_evaluations: Most denoiser rows for a scan; None has no limit.
        max_seconds: Time for a scan, after which the best so far is returned; looked at after each prediction, so that
            it is exceeded by as much as one batch of views takes. None has no limit. With it results depend on the
            machine.
        check_familiarity: Whether scans that the generator does not know get geometric views instead. A generator that
            has not learned what it knows (training does, from eight scans on) cannot tell; `familiarity` then is None.
        condition_on_prediction: Whether the prediction for the scan steers the model, which has the same classes.
        view_batch: Views that go through the networks together; memory grows with it, and with nothing else.
        window: Latent voxels per axis of the windows that the denoiser sees of a large scan; None shows it whole.
        slice_axis: Spatial axis along which a volume is cut for a 2D generator, from 0 or, negative, from the end.
        output: What the segmenter gives: ``logits``, ``probabilities`` or ``sigmoid``.
        inferer: Called as ``inferer(inputs, segmenter)``, such as MONAI's SlidingWindowInferer or SliceInferer.
        max_memory_gb: Bound for what decoding a view adds to the memory in use; None decodes in one piece.
        scaled_window: For a generator with a fixed intensity window: what its two ends have become in the scans.
        precision: Of the generator's networks: ``fp32``, ``bf16``, or ``auto`` for what is fast on the device.
        seed: Of noise, blocks and poses.
        device: Where a named generator is loaded.

    Raises:
        BadInputError: If an option is none or a number is out of range.
    """

    def __init__(
        self,
        segmenter: Network | Segmenter,
        generator: Generator | str,
        *,
        num_views: int = 10,
        mask: MaskKind = "uncertainty",
        strength: float = 0.3,
        randomness: float = 0.5,
        num_inference_steps: int = 5,
        method: str = "edit_friendly",
        guidance_scale: float | Mapping[str, float] | None = 1.0,
        detail: float = 0.0,
        geometric: bool | Sequence[int] = (),
        rotation: float = 10.0,
        scaling: float = 0.1,
        intensity: bool = False,
        combination: Combination = "mean",
        weighting: Weighting = "equal",
        outlier_dice: float = 0.5,
        patience: int = 0,
        max_evaluations: int | None = None,
        max_seconds: float | None = None,
        check_familiarity: bool = True,
        condition_on_prediction: bool = False,
        view_batch: int = 4,
        window: Sequence[int] | None = None,
        slice_axis: int = -1,
        output: Output = "logits",
        inferer: Any = None,
        max_memory_gb: float | None = None,
        scaled_window: tuple[float, float] | None = None,
        precision: Precision = "auto",
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        for name, value, least in (
            ("num_views", num_views, 1),
            ("view_batch", view_batch, 1),
            ("patience", patience, 0),
        ):
            if value < least:
                raise BadInputError(f"{name}: expected at least {least}, got {value}.")
        for name, amount, most in (("rotation", rotation, 180.0), ("scaling", scaling, 1.0)):
            if not 0 <= amount <= most:
                unit = "degrees" if name == "rotation" else "as a logarithm"
                raise BadInputError(f"{name}: expected 0 to {most:g} {unit}, got {amount}. 0 leaves it out.")
        for name, bound in (("max_evaluations", max_evaluations), ("max_seconds", max_seconds)):
            if bound is not None and not bound > 0:
                raise BadInputError(f"{name}: expected a number above 0, got {bound}.")
        check_kind(mask)  # before a generator is loaded
        Consensus(combination=combination, weighting=weighting, outlier_dice=outlier_dice)
        if isinstance(segmenter, Segmenter) and (output != "logits" or inferer is not None):
            raise BadInputError(
                "output and inferer: expected none beside a Segmenter, which has its own. Leave them out."
            )
        if method == NULL_TEXT and (
            (num_inference_steps, randomness, guidance_scale, window) != (5, 0.5, 1.0, None)
            or mask in ("attention", "hybrid")
        ):
            raise BadInputError(
                "method null_text: expected no num_inference_steps, randomness, guidance_scale or window, which the "
                "publication sets, and no mask by attention. Leave them out."
            )
        self.segmenter = (
            segmenter if isinstance(segmenter, Segmenter) else Segmenter(segmenter, output=output, inferer=inferer)
        )
        self.generator = (
            generator if isinstance(generator, Generator) else Generator.from_pretrained(generator, device=device)
        )
        self.making = Making(
            generator=self.generator,
            settings=ViewSettings(
                method="edit_friendly" if method == NULL_TEXT else method,
                strength=strength,
                randomness=randomness,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                detail=detail,
                max_memory_gb=max_memory_gb,
                precision=resolve_precision(precision, self.generator.device),
            ),
            mask=mask,
            published=method == NULL_TEXT,
            condition_on_prediction=condition_on_prediction,
            window=None if window is None else tuple(window),
            slice_axis=slice_axis,
            scaled_window=scaled_window,
            seed=seed,
        )
        self.num_views, self.intensity, self.seed = num_views, intensity, seed
        self.geometric, self.rotation, self.scaling = geometric, rotation, scaling
        self.combination, self.weighting, self.outlier_dice = combination, weighting, outlier_dice
        self.patience, self.max_evaluations, self.max_seconds = patience, max_evaluations, max_seconds
        self.check_familiarity, self.view_batch = check_familiarity, view_batch

    def __call__(
        self,
        image: Any,
        *,
        mask: torch.Tensor | None = None,
        text: str | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> Prediction:
        """Segment a scan with all of its views.

        Args:
            image: ``(C, H, W[, D])`` tensor, MetaTensor or array, as the segmenter takes it. Without an affine it is
                taken to lie on the generator's grid.
            mask: ``(H, W[, D])`` bool, where views may differ, in place of the kind that was chosen.
            text: What the scan shows, for a generator that texts steer.
            attributes: Facts about it, for one that they steer.

        Returns:
            The consensus, its uncertainty, and what it took.

        Raises:
            BadInputError: If the scan does not fit the generator or holds other than finite numbers, or the segmenter's
                output does not fit the scan.
            MemoryError: If the scan is too large for a network.
        """
        started = time.monotonic()
        inputs, mask = self._read(image, mask)
        calls = self.segmenter.calls
        consensus = Consensus(combination=self.combination, weighting=self.weighting, outlier_dice=self.outlier_dice)
        first = self.segmenter(inputs)
        consensus.add(first)
        made = ScanViews(self.making, image, first=first, mask=mask, text=text, attributes=attributes)
        familiarity = made.familiarity() if self.check_familiarity else None
        count = self._affordable(made)
        fallback = self._refusal(made, familiarity, count)
        stopped = f"{self.max_evaluations} evaluations allow {count} views" if count < self.num_views else ""
        mirrors = self._mirrors(inputs.ndim - 1)
        poses = self._poses(mirrors, self._spacing(image))
        plain = ((inputs, Pose(mirror), False) for mirror in mirrors[1:])
        beyond = self._unchanged(inputs, poses) if fallback else self._generated(inputs, made, poses, count)
        last, same, seen = consensus.label(), 0, 0
        for view, pose, generative in chain(plain, beyond):
            counts = consensus.add(pose.back(self.segmenter(pose.there(view)), first))
            if generative:
                now, seen = consensus.label(), seen + 1
                same = same + 1 if counts and _alike(now, last) else 0
            last = consensus.label()
            if self.patience and same >= self.patience:
                stopped = f"the consensus stayed the same over {same} views"
                break
            if self.max_seconds is not None and time.monotonic() - started > self.max_seconds:
                stopped = f"{self.max_seconds:g} seconds were over"
                fallback = fallback or ("" if seen else f"{stopped} before the first generative view")
                break
        agreement = consensus.result()
        return Prediction(
            **{item.name: getattr(agreement, item.name) for item in fields(Agreement)},
            evaluations=made.evaluations,
            segmentations=self.segmenter.calls - calls,
            seconds=time.monotonic() - started,
            fallback=fallback,
            stopped="" if fallback and not stopped.endswith("over") else stopped,
            familiarity=familiarity,
        )

    def views(
        self,
        image: Any,
        count: int = 4,
        *,
        mask: torch.Tensor | None = None,
        text: str | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> list[torch.Tensor]:
        """Some of the generative views that a prediction is made of, to look at; neither mirrored nor turned.

        Args:
            image: As for a prediction, like all that follow.
            count: How many.
            mask: Where they may differ.
            text: What the scan shows.
            attributes: Facts about it.

        Returns:
            ``(C, H, W[, D])`` float32 each, in the units of the scan.

        Raises:
            BadInputError: As for a prediction.
        """
        inputs, mask = self._read(image, mask)
        first = self.segmenter(inputs)
        made = ScanViews(self.making, image, first=first, mask=mask, text=text, attributes=attributes)
        return [view for view, *_ in self._generated(inputs, made, [Pose(Flip())] * count, count)]

    def _read(self, image: Any, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scan as the segmenter gets it, and the mask, checked."""
        inputs = convert_to_tensor(image, track_meta=False).detach().cpu().float()
        if inputs.ndim not in (3, 4):
            raise BadInputError(
                f"image: expected (C, H, W) or (C, H, W, D), got shape {tuple(inputs.shape)}. Put the channels first, "
                "and give one scan at a time."
            )
        if not bool(torch.isfinite(inputs).all()):
            raise BadInputError("image: expected finite intensities, got NaN or infinity. Repair the scan.")
        dims = self.generator.config.spatial_dims
        if dims > inputs.ndim - 1:
            raise BadInputError(
                f"image: expected a volume for the {dims}D generator '{self.generator.config.name}', got shape "
                f"{tuple(inputs.shape)}. Choose a 2D one."
            )
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != tuple(inputs.shape[1:])):
            raise BadInputError(
                f"mask: expected bool of the shape of the scan {tuple(inputs.shape[1:])}, got {mask.dtype} "
                f"{tuple(mask.shape)}."
            )
        return inputs, None if mask is None else mask.cpu()

    def _affordable(self, made: ScanViews) -> int:
        """Views that the bound on evaluations allows."""
        if self.max_evaluations is None:
            return self.num_views
        before, each = made.cost()
        return min(self.num_views, (self.max_evaluations - before) // max(each, 1))

    def _refusal(self, made: ScanViews, familiarity: float | None, count: int) -> str:
        """Why there can be no generative views; empty if there can."""
        known = self.generator.config.familiarity
        if familiarity is not None and known is not None and familiarity > known.limit:
            return (
                f"the generator '{self.generator.config.name}' does not know such scans: score {familiarity:.2f}, "
                f"limit {known.limit:.2f}"
            )
        if count < 1:
            return f"{self.max_evaluations} evaluations allow no view: the first takes {sum(made.cost())}"
        return ""

    def _mirrors(self, dims: int) -> tuple[Flip, ...]:
        if isinstance(self.geometric, bool):
            return flips(dims) if self.geometric else flips(dims, ())
        unknown = [axis for axis in self.geometric if not 0 <= axis < dims]
        if unknown:
            raise BadInputError(f"geometric: expected spatial axes from 0 to {dims - 1}, got {unknown}.")
        return flips(dims, tuple(self.geometric))

    def _spacing(self, image: Any) -> Sequence[float]:
        """Voxel size of each axis of the scan; of one that does not say, that of the generator."""
        dims, affine = image.ndim - 1, affine_of(image)
        if affine is not None:
            return list(np.linalg.norm(affine[:3, :dims], axis=0))
        own = self.generator.config.spacing
        return own if own is not None and len(own) == dims else [1.0] * dims

    def _poses(self, mirrors: tuple[Flip, ...], spacing: Sequence[float]) -> list[Pose]:
        """Of each view beyond the mirror images of the scan."""
        turns = self.geometric is not False
        options: dict[str, Any] = {"rotation": turns * self.rotation, "scaling": turns * self.scaling}
        numbers = range(1, 1 + self.num_views)
        return [
            random_pose(mirrors[number % len(mirrors)], spacing, seed=self.seed, number=number, **options)
            for number in numbers
        ]

    def _unchanged(self, inputs: torch.Tensor, poses: Sequence[Pose]) -> Iterator[tuple[torch.Tensor, Pose, bool]]:
        """Views beyond the mirror images where there are no generative ones."""
        for number, pose in enumerate(poses, 1):
            if self.intensity:
                yield change_intensities(inputs, seed=self.seed, number=number), pose, False
            elif pose.matrix is not None:
                yield inputs, pose, False

    def _generated(
        self, inputs: torch.Tensor, made: ScanViews, poses: Sequence[Pose], count: int
    ) -> Iterator[tuple[torch.Tensor, Pose, bool]]:
        """Generative views, each in its own pose."""
        numbers = iter(range(1, 1 + count))
        while chunk := list(islice(numbers, self.view_batch)):
            for number, change in zip(chunk, made.make(chunk), strict=True):
                view = inputs + change
                if self.intensity:
                    view = change_intensities(view, seed=self.seed, number=number)
                yield view, poses[number - 1], True


def _alike(label: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether nearly all voxels of the classes are the same."""
    differ, shown = int((label != other).sum()), int(((label > 0) | (other > 0)).sum())
    return differ <= (1 - _STABLE) * shown
