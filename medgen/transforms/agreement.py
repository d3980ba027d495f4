"""Whether a sample and the scans of a bank went through the same transforms, as far as the voxels and affines tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from medgen.types import BadInputError

_SPACING = 0.1  # share; more than what rounding and resampling to whole voxels can change
_RANGE = 4.0  # factor between widths of the intensities
_REMEDY = "Give preprocess= the transforms that come before this one in the pipeline, from the loading of files on"


@dataclass(frozen=True)
class Facts:
    """What an array shows of the transforms that it went through.

    Attributes:
        shape: Channels first.
        spacing: Voxel edges in mm; None where nothing is known of them.
        orientation: Axis codes such as ``("R", "A", "S")``; None where nothing is known of them.
        low: 1st percentile of the intensities of each channel; of a label none.
        high: 99th percentile.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...] | None
    orientation: tuple[str, ...] | None
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def measure(image: np.ndarray, affine: np.ndarray | None) -> Facts:
    """Measure an image.

    Args:
        image: ``(C, H, W[, D])``.
        affine: Voxel index to RAS mm, ``(4, 4)``, or ``(3, 3)`` in 2D; None where it is not known.

    Returns:
        The facts.
    """
    low, high = np.percentile(image.reshape(len(image), -1), (1, 99), axis=1)
    spacing = orientation = None
    if affine is not None:
        dims = min(image.ndim - 1, len(affine) - 1)
        full = np.eye(4)
        side = len(affine) - 1
        full[:side, :side], full[:side, 3] = affine[:side, :side], affine[:side, side]
        spacing = tuple(float(value) for value in np.linalg.norm(full[:3, :dims], axis=0))
        codes = nib.orientations.io_orientation(full)[:dims]
        orientation = tuple(str(code) for code in nib.orientations.ornt2axcodes(codes))
    return Facts(image.shape, spacing, orientation, tuple(map(float, low)), tuple(map(float, high)))


def has_contrast(facts: Facts) -> bool:
    """Whether a scan can be compared by its intensities.

    Args:
        facts: Of the scan.

    Returns:
        False where a channel has one value nearly everywhere, as in an empty slice.
    """
    return all(high > low for low, high in zip(facts.low, facts.high, strict=True))


def check_images(found: Facts, bank: Sequence[Facts], name: str) -> None:
    """Refuse a sample that differs from all of the bank in a way that only transforms explain.

    Intensities differ where a channel of the sample spans, from its 1st to its 99th percentile, less than a quarter of
    the narrowest or more than four times the widest scan of the bank, or shares no value with any.

    Args:
        found: Of the sample.
        bank: Of the scans of the bank, at least one; all have the same channels and axes.
        name: Of the bank, for messages.

    Raises:
        BadInputError: If channels, axes, spacing, orientation or intensities differ.
    """
    kind = bank[0].shape
    if (found.shape[0], len(found.shape)) != (kind[0], len(kind)):
        raise BadInputError(
            f"{name}: expected samples of {kind[0]} channel(s) and {len(kind) - 1} further axes as in the bank, got "
            f"{found.shape[0]} and {len(found.shape) - 1}. {_REMEDY}, or make a bank for these scans."
        )
    known = [facts.spacing for facts in bank if facts.spacing is not None]
    if found.spacing is not None and known:
        low, high = np.min(known, axis=0) * (1 - _SPACING), np.max(known, axis=0) * (1 + _SPACING)
        if len(found.spacing) != len(low) or (np.array(found.spacing) < low).any() or (found.spacing > high).any():
            raise BadInputError(
                f"{name}: expected voxels of {_words(np.median(known, axis=0))} mm as in the bank, got "
                f"{_words(found.spacing)} mm. {_REMEDY}, with Spacingd among them."
            )
    turned = {facts.orientation for facts in bank if facts.orientation is not None}
    if found.orientation is not None and turned and found.orientation not in turned:
        raise BadInputError(
            f"{name}: expected axes in the order {', '.join(sorted(''.join(each) for each in turned))} as in the bank, "
            f"got {''.join(found.orientation)}. {_REMEDY}, with Orientationd among them."
        )
    lows, highs = np.array([facts.low for facts in bank]), np.array([facts.high for facts in bank])
    for channel, (low, high) in enumerate(zip(found.low, found.high, strict=True)):
        widths = (highs - lows)[:, channel]
        apart = high < lows[:, channel].min() or low > highs[:, channel].max()
        if apart or not widths.min() / _RANGE <= high - low <= widths.max() * _RANGE:
            raise BadInputError(
                f"{name}: expected intensities of channel {channel} in a range like {_range(lows, highs, channel)} of "
                f"the bank (1st to 99th percentile), got {low:.4g} to {high:.4g}. {_REMEDY}, and scale intensities "
                "per scan in them where scanners differ."
            )


def label_channels(label: np.ndarray, image: np.ndarray) -> int:
    """Channels of a label map.

    Args:
        label: ``([C, ]H, W[, D])``.
        image: ``(C, H, W[, D])``, of the same pair.

    Returns:
        Number of channels; 0 where it has no axis of channels.
    """
    return len(label) if label.ndim == image.ndim else 0


def label_values(label: np.ndarray, channels: int) -> tuple[int, ...]:
    """Classes that a label map shows, background (0) included.

    Args:
        label: ``([C, ]H, W[, D])``; more than one channel is one-hot, channel 0 being the background.
        channels: As :func:`label_channels` gives them.

    Returns:
        Class values, sorted.

    Raises:
        BadInputError: If a value is not whole.
    """
    if channels > 1:
        return tuple(int(index) for index in np.flatnonzero(label.reshape(channels, -1).any(axis=1)))
    values = np.unique(label)
    if (values != np.round(values)).any():
        raise BadInputError(
            f"label: expected whole class values, got {values[values != np.round(values)][0]:g}. Resample labels with "
            "mode='nearest', and leave them out of transforms of intensities."
        )
    return tuple(int(value) for value in values)


def check_labels(channels: int, values: set[int], bank_channels: int, known: set[int], name: str) -> None:
    """Refuse a label map that the bank's could not stand for.

    Args:
        channels: Of the sample's label.
        values: Classes that it shows.
        bank_channels: Of the labels of the bank.
        known: Classes that labels of the bank may show.
        name: Of the bank, for messages.

    Raises:
        BadInputError: If channels or classes differ.
    """
    if channels != bank_channels:
        raise BadInputError(
            f"{name}: expected labels of {bank_channels or 'no'} channel(s) as in the bank, got {channels or 'none'}. "
            f"{_REMEDY}."
        )
    if values - known:
        raise BadInputError(
            f"{name}: expected label values {_list(known)} as in the bank, got {_list(values - known)} too. {_REMEDY}, "
            "or make a bank with the classes of these scans."
        )


def _list(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def _words(spacing: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{value:.3g}" for value in spacing)


def _range(lows: np.ndarray, highs: np.ndarray, channel: int) -> str:
    return f"{np.median(lows[:, channel]):.4g} to {np.median(highs[:, channel]):.4g}"
