"""Views of a volume by a generator of slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medgen.test_time.views import GenerativeViews


class SliceViews:
    """Makes views of a volume slice by slice, with the same noise in all of them, so that neighbors change alike.

    Args:
        slices: Views of each slice, of one seed.
        axis: Spatial axis that they were cut along, from 0.
    """

    def __init__(self, slices: Sequence[GenerativeViews], axis: int) -> None:
        self.slices, self.axis = slices, axis

    @property
    def evaluations(self) -> int:
        """Denoiser rows so far."""
        return sum(part.evaluations for part in self.slices)

    def cost(self) -> tuple[int, int]:
        """Denoiser rows before the first view, and for each; fewer where masks leave slices as they are.

        Returns:
            Both numbers.
        """
        before, each = zip(*(part.cost() for part in self.slices), strict=True)
        return sum(before), sum(each)

    def make(self, numbers: Sequence[int], masks: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Some of the views.

        Args:
            numbers: Which.
            masks: ``(H, W, D)`` bool of each, where it may differ from the scan; None is everywhere.

        Returns:
            ``(C, H, W, D)`` float32 each, as of :meth:`GenerativeViews.make`.
        """
        made = []
        for index, part in enumerate(self.slices):
            cut = [None if mask is None else mask.select(self.axis, index) for mask in masks]
            if any(mask is None or bool(mask.any()) for mask in cut):
                made.append(part.make(numbers, cut))
            else:
                made.append([torch.zeros(len(part.scan), *mask.shape) for mask in cut if mask is not None])
        return [torch.stack(parts, dim=self.axis + 1) for parts in zip(*made, strict=True)]
