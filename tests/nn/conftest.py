"""Puts `model_sizes` (small configurations and their twins) within reach of the tests here."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """As if no native library had been looked for in this process."""
    from shoestring.nn import native

    native.library.cache_clear()
    yield
    native.library.cache_clear()
