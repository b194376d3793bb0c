"""A temperature as far as fp32 can tell: the one that is drawn at, and that given tokens are scored at."""

from __future__ import annotations

COLD, HOT = 1e-30, 1e30  # beyond these a temperature draws what it draws here, but 1 / T leaves fp32


def warmth(temperature: float) -> float:
    """`temperature` within what fp32 can divide by; 0 stays 0, which is greedy."""
    return min(max(temperature, COLD), HOT) if temperature else 0.0
