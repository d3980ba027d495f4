"""Whether a sample and the scans of a bank went through the same transforms, as far as the voxels and affines tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np

from medgen.types import BadInputError, Shape

_SPACING = 0.1  # share; more than what rounding and resampling to whole voxels can change
_RANGE = 4.0  # factor between widths of the intensities
_REMEDY = "Give preprocess= the transforms that come before this one in the pipeline, from the loading of files on"
_SAME = "Put what makes them alike into preprocess= and before this transform in the pipeline"


@dataclass(frozen=True)
class Facts:
    """What an array shows of the transforms that it went through.

    Attributes:
        shape: Channels first.
        spacing: Voxel edges in mm; None where nothing is known of them.
        orientation: Axis codes such as ``("R", "A", "S")``; None where nothing is known of them.
        low: 1st percentile of the intensities of each channel; none where they were not looked at.
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
    return replace(measure_place(image.shape, affine), low=tuple(map(float, low)), high=tuple(map(float, high)))


def measure_place(shape: Shape, affine: np.ndarray | None) -> Facts:
    """Measure all of an image but its intensities, which costs next to nothing.

    Args:
        shape: ``(C, H, W[, D])``.
        affine: As for :func:`measure`.

    Returns:
        The facts.
    """
    spacing = orientation = None
    if affine is not None:
        dims = min(len(shape) - 1, len(affine) - 1)
        full = np.eye(4)
        side = len(affine) - 1
        full[:side, :side], full[:side, 3] = affine[:side, :side], affine[:side, side]
        spacing = tuple(float(value) for value in np.linalg.norm(full[:3, :dims], axis=0))
        codes = nib.orientations.io_orientation(full)[:dims]
        orientation = tuple(str(code) for code in nib.orientations.ornt2axcodes(codes))
    return Facts(shape, spacing, orientation)


def has_contrast(facts: Facts) -> bool:
    """Whether a scan can be compared by its intensities.

    Args:
        facts: Of the scan.

    Returns:
        False where a channel has one value nearly everywhere, as in an empty slice.
    """
    return all(high > low for low, high in zip(facts.low, facts.high, strict=True))


def reference(bank: Sequence[Facts]) -> Facts:
    """What the scans of a bank have in common: channels, axes, spacing and orientation.

    Args:
        bank: Of its scans, at least one.

    Returns:
        The facts of the first scan of which the spacing is known, else of the first.
    """
    return next((facts for facts in bank if facts.spacing is not None), bank[0])


def check_bank(found: Facts, case: str, common: Facts, name: str) -> None:
    """Refuse a scan of a bank that the others could not stand for.

    Args:
        found: Of the scan.
        case: Its identifier.
        common: As :func:`reference` gives them.
        name: Of the bank, for messages.

    Raises:
        BadInputError: If channels, axes, spacing or orientation differ.
    """
    if not _same_kind(found, common):
        raise BadInputError(
            f"{name}: expected scans of one number of channels, got {found.shape} of {case} and {common.shape} before. "
            "Keep them in banks of their own."
        )
    if not _same_orientation(found, common):
        raise BadInputError(
            f"{name}: expected scans of one orientation, got {_axes(found)} of {case} and {_axes(common)} before: some "
            f"would come turned or mirrored. {_SAME}, with Orientationd among them."
        )
    if not _same_spacing(found, common):
        raise BadInputError(
            f"{name}: expected scans of one voxel size, got {_edges(found)} of {case} and {_edges(common)} before. "
            f"{_SAME}, with Spacingd among them."
        )


def check_place(found: Facts, common: Facts, name: str) -> None:
    """Refuse a sample whose voxels lie in another way than those of the bank, which only transforms explain.

    Args:
        found: Of the sample.
        common: Of the bank, as :func:`reference` gives them.
        name: Of the bank, for messages.

    Raises:
        BadInputError: If channels, axes, spacing or orientation differ.
    """
    if not _same_kind(found, common):
        raise BadInputError(
            f"{name}: expected samples of {common.shape[0]} channel(s) and {len(common.shape) - 1} further axes as in "
            f"the bank, got {found.shape[0]} and {len(found.shape) - 1}. {_REMEDY}, or make a bank for these scans."
        )
    if not _same_spacing(found, common):
        raise BadInputError(
            f"{name}: expected voxels of {_edges(common)} as in the bank, got {_edges(found)}. {_REMEDY}, with "
            "Spacingd among them."
        )
    if not _same_orientation(found, common):
        raise BadInputError(
            f"{name}: expected axes in the order {_axes(common)} as in the bank, got {_axes(found)}. {_REMEDY}, with "
            "Orientationd among them."
        )


def check_intensities(found: Facts, bank: Sequence[Facts], name: str) -> None:
    """Refuse a sample whose intensities differ from all of the bank in a way that only transforms explain.

    They do where a channel of the sample spans, from its 1st to its 99th percentile, less than a quarter of the
    narrowest or more than four times the widest scan of the bank, or shares no value with any.

    Args:
        found: Of the sample.
        bank: Of the scans of the bank, at least one; all have the same channels.
        name: Of the bank, for messages.

    Raises:
        BadInputError: If intensities differ.
    """
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


def label_channels(label: Shape, image: Shape) -> int:
    """Channels of a label map.

    Args:
        label: Its shape, ``([C, ]H, W[, D])``.
        image: ``(C, H, W[, D])``, of the same pair.

    Returns:
        Number of channels; 0 where it has no axis of channels.
    """
    return label[0] if len(label) == len(image) else 0


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


def check_label_channels(channels: int, bank_channels: int, name: str) -> None:
    """Refuse a label map of another form than the bank's.

    Args:
        channels: Of the sample's label.
        bank_channels: Of the labels of the bank.
        name: Of the bank, for messages.

    Raises:
        BadInputError: If they differ.
    """
    if channels != bank_channels:
        raise BadInputError(
            f"{name}: expected labels of {bank_channels or 'no'} channel(s) as in the bank, got {channels or 'none'}. "
            f"{_REMEDY}."
        )


def check_classes(values: set[int], known: set[int], name: str) -> None:
    """Refuse a label map with classes that the bank does not know.

    Args:
        values: Classes that the sample's label shows.
        known: Classes that labels of the bank may show.
        name: Of the bank, for messages.

    Raises:
        BadInputError: If there are others.
    """
    if values - known:
        raise BadInputError(
            f"{name}: expected label values {_list(known)} as in the bank, got {_list(values - known)} too. {_REMEDY}, "
            "or make a bank with the classes of these scans."
        )


def _list(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def _same_kind(found: Facts, common: Facts) -> bool:
    return (found.shape[0], len(found.shape)) == (common.shape[0], len(common.shape))


def _same_spacing(found: Facts, common: Facts) -> bool:
    one, other = found.spacing, common.spacing
    if one is None or other is None:
        return True
    return len(one) == len(other) and bool(np.allclose(one, other, rtol=_SPACING, atol=0))


def _same_orientation(found: Facts, common: Facts) -> bool:
    return found.orientation is None or common.orientation is None or found.orientation == common.orientation


def _axes(facts: Facts) -> str:
    return "".join(facts.orientation or ())


def _edges(facts: Facts) -> str:
    return " x ".join(f"{value:.3g}" for value in facts.spacing or ()) + " mm"


def _range(lows: np.ndarray, highs: np.ndarray, channel: int) -> str:
    return f"{np.median(lows[:, channel]):.4g} to {np.median(highs[:, channel]):.4g}"
