"""Numbers and strangers' text as they stand on a page: short, with units, and escaped.

Everything that comes from a model, a recipe or a file name passes through `text`; nothing else makes markup.
"""

from __future__ import annotations

import html
import unicodedata
from typing import Any

NONE = "–"
_GAP = "\u00a0"  # no-break space, between a number and its unit


def text(value: Any, limit: int = 4000) -> str:
    """Escaped for HTML, control and direction-changing characters shown as �, cut after `limit` characters."""
    raw = str(value)
    cut = raw if len(raw) <= limit else raw[:limit] + f" … ({len(raw) - limit:,} characters more)"
    return html.escape("".join(c if _is_shown(c) else "\ufffd" for c in cut), quote=True)


def _is_shown(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co")


def percent(value: float | None, digits: int = 1) -> str:
    """0.824 -> 82.4 %."""
    return NONE if value is None else f"{100 * value:.{digits}f}{_GAP}%"


def seconds(value: float | None) -> str:
    """42 s, 3 min 05 s, 2 h 10 min."""
    if value is None:
        return NONE
    if value < 59.5:
        return f"{value:.1f}{_GAP}s" if value < 9.95 else f"{value:.0f}{_GAP}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{_GAP}min {rest:02d}{_GAP}s"
    return f"{minutes // 60}{_GAP}h {minutes % 60:02d}{_GAP}min"


def count(value: float | None) -> str:
    """1234567 -> 1.23 M."""
    if value is None:
        return NONE
    number, unit = _three(value, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")))
    return f"{number}{_GAP}{unit}" if unit else number


def tick(value: float) -> str:
    """A round number on an axis: 20 k, 1 M."""
    number, _, unit = count(value).partition(_GAP)
    return _GAP.join(filter(None, (f"{float(number):g}", unit)))


def _three(value: float, sizes: tuple[tuple[float, str], ...]) -> tuple[str, str]:
    """Three digits and the unit that leaves one to three of them before the point, after rounding."""
    for size, unit in sizes:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip("."), unit
    return f"{value:.3g}", ""


def flops(value: float | None) -> str:
    """1.2e12 -> 1.20 TFLOP, 3e15 -> 3.00 PFLOP."""
    if not value:
        return NONE
    number, unit = _three(value, ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")))
    return f"{number}{_GAP}{unit}FLOP"


def usd(value: float | None) -> str:
    """Dollars; cents where it is less than ten of them."""
    if value is None:
        return NONE
    if value == 0:
        return "$0"
    if value >= 0.0995:
        return f"${value:,.2f}"
    return f"{100 * value:.2f}{_GAP}¢" if value >= 0.00005 else f"<0.01{_GAP}¢"


def in_unit(value: float | None, unit: str, *, sign: bool = True) -> str:
    """A claim's number: points, share, tokens or times."""
    if value is None:
        return NONE
    if unit == "points":
        return f"{100 * value:{'+' if sign else ''}.1f} points"
    if unit == "share":
        return percent(value)
    if unit == "times":
        return f"{value:.2f} times"
    return f"{value:{'+' if sign else ''}.1f} tokens"


def plus_minus(stderr: float | None, unit: str = "points") -> str:
    """± 1.2 in the unit of the number before it; empty when unknown."""
    if stderr is None:
        return ""
    scaled = 100 * stderr if unit in ("points", "share") else stderr
    return f"±{_GAP}{scaled:.2f}" if unit == "times" else f"±{_GAP}{scaled:.1f}"
