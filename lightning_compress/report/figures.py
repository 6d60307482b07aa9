"""Figures for people: counts, bytes, times, shares and ratios with three digits and a unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

_COUNT_UNITS = ("", "k", "M", "G", "T")
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_count(count: float) -> str:
    """Return a count with three digits: thousands as ``k``, millions as ``M``, then ``G`` and ``T``.

    Example:
        >>> format_count(0), format_count(812), format_count(272_474), format_count(1_090_000)
        ('0', '812', '272 k', '1.09 M')
    """
    return _with_unit(count, _COUNT_UNITS).rstrip()


def format_bytes(size_bytes: float) -> str:
    """Return a size with three digits; 1 kB is 1,000 bytes.

    Example:
        >>> format_bytes(900), format_bytes(312_400), format_bytes(44_700_000)
        ('900 B', '312 kB', '44.7 MB')
    """
    return _with_unit(size_bytes, _BYTE_UNITS)


def format_ms(milliseconds: float) -> str:
    """Return a time with three digits, in milliseconds.

    Example:
        >>> format_ms(0.61234), format_ms(12.345), format_ms(1234.5)
        ('0.612 ms', '12.3 ms', '1234 ms')
    """
    return f"{_three_digits(milliseconds)} ms"


def format_share(share: float) -> str:
    """Return a share of 1 in percent, never rounded to nothing or to everything.

    Example:
        >>> format_share(0.8), format_share(0.0), format_share(0.0001), format_share(0.9999)
        ('80.0 %', '0.0 %', '< 0.1 %', '> 99.9 %')
    """
    if 0.0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1.0:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def format_reduction(before: float, after: float) -> str:
    """Return how much smaller ``after`` is than ``before``.

    Example:
        >>> format_reduction(1_090_000, 312_000), format_reduction(100, 250), format_reduction(100, 101)
        ('3.5x smaller', '2.5x larger', 'same size')
    """
    return _ratio(before, after, digits=1, less="smaller", more="larger", same="same size")


def format_speedup(speedup: float) -> str:
    """Return a ratio of times, old over new, in words.

    Example:
        >>> format_speedup(2.018), format_speedup(0.8), format_speedup(1.001)
        ('2.02x faster', '1.25x slower', 'same speed')
    """
    return _ratio(speedup, 1.0, digits=2, less="faster", more="slower", same="same speed")


def _ratio(before: float, after: float, *, digits: int, less: str, more: str, same: str) -> str:
    ratio, word = (before / after, less) if before >= after > 0 else (after / max(before, 1e-12), more)
    return same if round(ratio, digits) == 1.0 else f"{ratio:.{digits}f}x {word}"


def _with_unit(value: float, units: Sequence[str]) -> str:
    if abs(value) < 1000:
        return f"{value:.0f} {units[0]}"
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:  # 999.5 would be written as 1000
        value /= 1000
        power += 1
    return f"{_three_digits(value)} {units[power]}"


def _three_digits(value: float) -> str:
    rounded = abs(float(f"{value:.3g}"))  # 9.996 has to count as 10.0
    if rounded == 0.0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(rounded)))}f}"
