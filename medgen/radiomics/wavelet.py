"""The stationary wavelet transform, one level at a time, to the last bit as PyWavelets computes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pywt
from numba import njit

from medgen.types import BadInputError


def wavelet_bands(
    image: np.ndarray, wavelet: str, axes: Sequence[int], start_level: int = 0, level: int = 1
) -> Iterator[tuple[str, np.ndarray]]:
    """Detail bands of every level, then the last approximation, under PyRadiomics's names.

    As in PyRadiomics, the filters are not widened from one level to the next: each level transforms the approximation
    of the one before anew. Borders are periodic; an odd axis is lengthened by its own first voxel and cut again.

    Args:
        image: ``(y, x)`` or ``(z, y, x)`` float64.
        wavelet: PyWavelets's name of a discrete wavelet, whose decomposition filters are used.
        axes: Array axes to transform, in the order of the letters.
        start_level: Levels to skip.
        level: Levels to give.

    Yields:
        Name (``wavelet-LH``, from the second level ``wavelet2-LH``) and band of the image's shape and units.

    Raises:
        BadInputError: There is no such wavelet.
    """
    try:
        filters = pywt.Wavelet(wavelet)
    except (AttributeError, TypeError, ValueError):
        raise BadInputError(
            f"wavelet: expected a name such as coif1, out of pywt.wavelist(kind='discrete'), got {wavelet!r}"
        ) from None
    low, high = np.array(filters.dec_lo), np.array(filters.dec_hi)
    whole = tuple(slice(n) for n in image.shape)
    # Axes that are not transformed need no even length.
    padding = [(0, n % 2 if axis in axes else 0) for axis, n in enumerate(image.shape)]
    approximation = np.pad(image, padding, "wrap") if any(after for _, after in padding) else image
    for index in range(start_level + level):
        bands = {"": approximation}
        for axis in axes:
            bands = {
                name + letter: band
                for name, parent in bands.items()
                for letter, band in zip("LH", _split_axis(parent, axis, low, high), strict=True)
            }
        approximation = bands.pop("L" * len(axes))
        if index >= start_level:
            number = index - start_level + 1
            prefix = "wavelet-" if number == 1 else f"wavelet{number}-"
            for name, band in bands.items():
                yield prefix + name, np.ascontiguousarray(band[whole])
    yield (
        ("wavelet-" if level == 1 else f"wavelet{level}-") + "L" * len(axes),
        np.ascontiguousarray(approximation[whole]),
    )


def _split_axis(image: np.ndarray, axis: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """``(2, *shape)``: the image convolved along one axis with each of the two filters."""
    lines = (int(np.prod(image.shape[:axis])), image.shape[axis], int(np.prod(image.shape[axis + 1 :])))
    out = np.empty((2, *lines))
    _convolve(image.reshape(lines), low, high, out)
    return out.reshape(2, *image.shape)


@njit(cache=True, nogil=True)
def _convolve(image, low, high, out):  # type: ignore[no-untyped-def]
    """Convolve ``(outer, n, inner)`` along n, periodically, with both filters of F taps.

    As out[o] = Σⱼ filter[j] · image[o + F/2 - j]. The sums run in PyWavelets's order, which at the end of a line is not
    that of the taps: bands of flat regions are pure rounding, and its sign decides into which bin they fall.
    """
    outer, n, inner = image.shape
    taps = low.size
    half = taps // 2
    order = np.empty((n, taps), np.int64)
    for o in range(n):
        past = min(max(o + half - n + 1, 0), taps)
        for j in range(taps):
            order[o, j] = past - 1 - j if j < past else j
    # Along the last axis the inner loop runs over the line itself, up to where the sums change order.
    regular = max(n - half, 0) if inner == 1 else 0
    line = np.empty(n + taps)
    for a in range(outer):
        for o in range(n):
            for c in range(inner):
                out[0, a, o, c] = out[1, a, o, c] = 0.0
        # Filters have even length; two taps at a time halve the traffic to memory.
        if regular > 0:
            for i in range(n + taps):
                line[i] = image[a, (i + half + 1 - taps) % n, 0]
            for j in range(0, taps, 2):
                low1, high1, low2, high2, first = low[j], high[j], low[j + 1], high[j + 1], taps - 1 - j
                for o in range(regular):
                    value1, value2 = line[first + o], line[first + o - 1]
                    out[0, a, o, 0] = (out[0, a, o, 0] + low1 * value1) + low2 * value2
                    out[1, a, o, 0] = (out[1, a, o, 0] + high1 * value1) + high2 * value2
        for o in range(regular, n):
            for t in range(0, taps, 2):
                j, k = order[o, t], order[o, t + 1]
                low1, high1, i1 = low[j], high[j], (o + half - j) % n
                low2, high2, i2 = low[k], high[k], (o + half - k) % n
                for c in range(inner):
                    value1, value2 = image[a, i1, c], image[a, i2, c]
                    out[0, a, o, c] = (out[0, a, o, c] + low1 * value1) + low2 * value2
                    out[1, a, o, c] = (out[1, a, o, c] + high1 * value1) + high2 * value2
