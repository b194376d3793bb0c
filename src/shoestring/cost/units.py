"""Quantities as people write them: 14.8T tokens, 2.788M hours, $5.576M, 55 days, 2023-06-01; and back."""

from __future__ import annotations

import math
import re
from datetime import date

from shoestring.core.errors import UserError

SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
WORDS = {"thousand": "k", "million": "m", "billion": "b", "bn": "b", "trillion": "t"}
HOURS = {"h": 1.0, "hour": 1.0, "hours": 1.0, "d": 24.0, "day": 24.0, "days": 24.0, "w": 168.0, "weeks": 168.0,
         "week": 168.0, "months": 730.5, "month": 730.5, "y": 8766.0, "year": 8766.0, "years": 8766.0}  # fmt: skip
NUMBER = re.compile(r"^([+-]?(?:\d[\d,_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)$", re.IGNORECASE)


def ungrouped(text: str) -> str:
    """'2,048' -> '2048'. A comma before anything but three digits stays: '14,8' is not 148."""
    return re.sub(r"[,_](?=\d{3}(?!\d))", "", text)


def parse_count(
    text: str | float, what: str = "number", like: str = "14.8T, 500B, 2.5M or 3000", most: float = math.inf
) -> float:
    """'14.8T' -> 14.8e12; '2,048' -> 2048; 'million' and the like are read too. Above 0, and at most `most`."""
    if isinstance(text, (int, float)):
        value = float(text)
    else:
        match = NUMBER.match(text.strip())
        unit = match.group(2).lower() if match else ""
        unit = WORDS.get(unit, unit)
        if not match or unit not in SCALES:
            raise UserError(f'{what} "{text}" is not a number; write it like {like}.')
        plain = ungrouped(match.group(1))
        if "," in plain:
            raise UserError(f'{what} "{text}" is not a number: a decimal point is a dot, write it like {like}.')
        value = float(plain) * SCALES[unit]
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{what} is {text}; it must be a positive, finite number.")
    if value > most:
        raise UserError(f"{what} is {text}; that is beyond any run, give at most {most:.0e}.")
    return value


def parse_usd(text: str | float, what: str = "price") -> float:
    """'$5.576M' -> 5576000.0."""
    plain = text.replace("$", "").replace("USD", "").strip() if isinstance(text, str) else text
    return parse_count(plain, what, "$500K or 2.5M", 1e15)


def parse_hours(text: str | float, what: str = "duration") -> float:
    """'60d' -> 1440.0; '55 days', '12h', '2 months'. A bare number is days."""
    if isinstance(text, (int, float)):
        return parse_count(text, what) * 24
    match = NUMBER.match(text.strip())
    if not match or (match.group(2) and match.group(2).lower() not in HOURS):
        raise UserError(f'{what} "{text}" is not a duration; write it like 12h, 55d or 2months.')
    return parse_count(match.group(1), what) * HOURS[match.group(2).lower() or "d"]


def parse_date(text: str, what: str = "date") -> date:
    """'2023-06-01'."""
    try:
        return date.fromisoformat(text.strip())
    except ValueError:
        raise UserError(f'{what} "{text}" is not a date; write it like 2023-06-01.') from None


def show(value: float, digits: int = 3) -> str:
    """Three figures and a scale letter: 2.79M, 14.8T, 0.39."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    for scale, letter in ((1e15, "e"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale * (1 - 0.5 * 10**-digits):
            return f"{value:.{digits}g}" if letter == "e" else f"{float(f'{value / scale:.{digits}g}'):g}{letter}"
    return f"{float(f'{value:.{digits}g}'):g}"


def usd(value: float) -> str:
    """'$5.58M'."""
    return f"-${show(-value)}" if value < 0 else f"${show(value)}"
