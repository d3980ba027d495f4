"""Transforms that mixes apply to pieces and views: seeded from the stream of the mix, and held to what they may do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from monai.transforms import Compose, Randomizable

from medgen.transforms.mixing import describe
from medgen.types import BadInputError

# Modules of transforms that change intensities alone, but for those in _MOVE; and modules of those that move voxels.
_INTENSITY = ("monai.transforms.intensity", "monai.transforms.smooth_field", "medgen.transforms.corruption")
_SPATIAL = ("monai.transforms.spatial", "monai.transforms.croppad")
_MOVE = ("RandSmoothDeform", "RandCoarseShuffle")


class OnImage(Randomizable):
    """An array transform as a dictionary transform of the key `image`.

    Args:
        transform: From ``(C, *spatial)`` to the same.
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> OnImage:
        """Set where the transform's draws come from.

        Args:
            seed: Seed of a new stream.
            state: The stream itself.

        Returns:
            This transform.
        """
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Transform the image.

        Args:
            data: Sample with `image`.

        Returns:
            The sample with the transformed image.
        """
        return {**data, "image": self.transform(data["image"])}


def seeded(transform: Callable[[Any], Any], seed: int) -> Callable[[Any], Any]:
    """A transform whose draws begin anew, so that they depend on the mix's own stream alone.

    Args:
        transform: A function, or a transform of MONAI.
        seed: In [0, 2**32).

    Returns:
        The function, or a copy of the transform: others may be at work with it in other threads.
    """
    if not isinstance(transform, Randomizable):
        return transform
    own = copy.deepcopy(transform)
    own.set_random_state(seed)
    return own


def check_in_place(transform: Callable[[Any], Any], *, if_moves: str, if_unknown: str | None) -> None:
    """Refuse a transform of an image that may move the anatomy away from where its label map has it.

    Args:
        transform: A function, or a transform of MONAI.
        if_moves: What to do about one that moves voxels, for the message.
        if_unknown: What to do about one that medgen does not know; None to trust it.

    Raises:
        BadInputError: If it moves voxels, or is not known to leave them.
    """
    if isinstance(transform, Compose):
        for part in transform.transforms:
            check_in_place(part, if_moves=if_moves, if_unknown=if_unknown)
        return
    kind = type(transform)
    if kind.__module__.startswith(_SPATIAL) or kind.__name__ in _MOVE:
        raise BadInputError(
            f"expected transforms that leave the anatomy where the label has it, got {kind.__name__}: {if_moves}"
        )
    if if_unknown is not None and not kind.__module__.startswith(_INTENSITY):
        name = getattr(transform, "__name__", kind.__name__)
        raise BadInputError(
            f"expected transforms that are known to leave the anatomy where the label has it, got {name}: {if_unknown}"
        )


def check_shape(what: str, value: Any, expected: Any) -> None:
    """Refuse the result of an inner transform that does not fit back in.

    Args:
        what: What it is, for the message.
        value: The result.
        expected: What it was made from.

    Raises:
        BadInputError: If the shapes differ.
    """
    if tuple(value.shape) != tuple(expected.shape):
        raise BadInputError(
            f"expected {what} to keep its shape {tuple(expected.shape)}, got {describe(value)}: use transforms that "
            "neither crop, pad, resize, nor turn by 90 degrees"
        )
