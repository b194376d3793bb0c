"""What training computes in C, where there is a compiler (csrc/; the plain twins stand on the Python side)."""

from __future__ import annotations

import ctypes
from pathlib import Path

from shoestring.core.build_c import Missing, load, once

SOURCES = Path(__file__).parent / "csrc"


@once
def library() -> ctypes.CDLL:
    """All of csrc as one library, built or found in the cache. Raises Missing (core/build_c.py)."""
    return load(SOURCES, "train")


def why_not() -> str | None:
    """None when the library can be had, else the reason."""
    try:
        library()
    except Missing as missing:
        return str(missing)
    return None
