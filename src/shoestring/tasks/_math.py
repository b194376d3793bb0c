"""math-verify, to be run aside: it sets alarms of its own, which work in the main thread only. Imports sympy."""

from __future__ import annotations

from math_verify import parse, verify


def equal(gold: str, answer: str) -> bool:
    """Whether two expressions are equal, each taken whole as LaTeX mathematics. The gold goes first: for sets and
    relations the order matters."""
    return bool(verify(_parse(gold), _parse(answer), timeout_seconds=None))


def _parse(text: str) -> list[object]:
    parsed: list[object] = parse(f"${text.strip('$ ')}$", parsing_timeout=None)
    return parsed
