"""The collector is left as it was found."""

from __future__ import annotations

import gc

import pytest

from shoestring.core.garbage import SELDOM, seldom_searched


@pytest.mark.parametrize("before", [(700, 10, 10), (0, 10, 10), (SELDOM * 2, 5, 5)])
def test_seldom_and_only_inside(before: tuple[int, int, int]) -> None:
    found = gc.get_threshold()
    gc.set_threshold(*before)
    try:
        with pytest.raises(KeyError), seldom_searched():
            assert gc.get_threshold() == ((SELDOM, 10, 10) if before[0] == 700 else before)
            raise KeyError
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*found)
