"""How numbers are written: three significant digits, and the same decimals for numbers that are read side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NOT_DEFINED = "not defined"
_SMALLEST, _LARGEST = 1e-4, 1e6  # beyond these, powers of ten are easier to read than zeros
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: Any) -> float | None:
    """A number, or None where there is none.

    Args:
        value: Number, None, NaN or infinity.

    Returns:
        The finite number as a float.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def finite_pair(values: Any) -> tuple[float, float] | None:
    """Both ends of an interval, or None where one is missing.

    Args:
        values: Two numbers, or None.

    Returns:
        The ends.
    """
    ends = [finite(value) for value in values or ()]
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def number(value: Any, *, beside: Sequence[Any] = (), digits: int = 3) -> str:
    """A number in three significant digits.

    Args:
        value: The number; None and NaN become "not defined".
        beside: Numbers that it is read with; the largest of all sets the decimals.
        digits: Significant digits of the largest.

    Returns:
        Text with a true minus sign.
    """
    shown = finite(value)
    if shown is None:
        return NOT_DEFINED
    sizes = [abs(other) for other in map(finite, (shown, *beside)) if other is not None]
    largest = max(sizes)
    if shown == 0:
        return "0"
    if largest < _SMALLEST or largest >= _LARGEST:
        mantissa, power = f"{shown:.{digits - 1}e}".split("e")
        return f"{mantissa} × 10{str(int(power)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(largest)))
    text = f"{shown:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else f"{0:.{decimals}f}"


def interval(ends: tuple[float, float] | None, *, beside: Sequence[Any] = ()) -> str:
    """An interval as "1.2 to 3.4".

    Args:
        ends: Its ends, or None.
        beside: Numbers that it is read with.

    Returns:
        Text; "not defined" without ends.
    """
    if ends is None:
        return NOT_DEFINED
    return " to ".join(number(end, beside=(*ends, *beside)) for end in ends)


def p_value(value: float | None) -> str:
    """A p-value in up to three decimals.

    Args:
        value: In [0, 1], or None.

    Returns:
        Text such as "0.005" or "< 0.001".
    """
    if value is None:
        return NOT_DEFINED
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.0995 else f"{value:.2f}"


def p_equals(value: float | None) -> str:
    """A p-value in a sentence.

    Args:
        value: In [0, 1], or None.

    Returns:
        Text such as "p = 0.005" or "p < 0.001".
    """
    text = p_value(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def percent(share: Any) -> str:
    """A share of 1 in percent.

    Args:
        share: Number, or None.

    Returns:
        Text such as "12 %".
    """
    value = finite(share)
    if value is None:
        return NOT_DEFINED
    return f"{100 * value:.0f} %" if value >= 0.0995 or value == 0 else f"{100 * value:.1f} %"


def count(amount: int, noun: str) -> str:
    """A number of things.

    Args:
        amount: How many.
        noun: Of what, in the singular, with a regular plural.

    Returns:
        Text such as "1 scan" or "2 scans".
    """
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def listed(items: Sequence[str]) -> str:
    """Items in a sentence.

    Args:
        items: At least one.

    Returns:
        Text such as "a, b and c".
    """
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
