"""Every part in every folder keeps the contract of its kind: the checks `shoestring check-part` runs on a user's."""

from __future__ import annotations

import pytest

from shoestring.core.parts import check, checkable
from shoestring.core.registry import list_parts, part_path

PARTS = [(kind, name) for kind in checkable() for name in list_parts(kind)]


@pytest.mark.parametrize(("kind", "name"), PARTS, ids=[f"{kind}/{name}" for kind, name in PARTS])
def test_contract(kind, name):
    assert check(kind, part_path(kind, name)) == []
