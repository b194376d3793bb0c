"""Every part in every folder keeps the contract of its kind: the checks `shoestring check-part` runs on a user's."""

from __future__ import annotations

import pytest

from shoestring.core.parts import check, checkable
from shoestring.core.registry import list_parts, part_path

LONG = {"tasks/reasoning_gym"}  # a hundred generators, minutes
NEEDS = {"tasks/reasoning_gym": "reasoning_gym"}  # a package that may be absent: then skipped, and counted by name


def parts() -> list:
    """One parameter for each part of each kind that has a contract."""
    names = [f"{kind}/{name}" for kind in checkable() for name in list_parts(kind)]
    marks = [pytest.mark.slow, pytest.mark.timeout(900)]
    return [pytest.param(name, id=name, marks=marks if name in LONG else []) for name in names]


@pytest.mark.parametrize("part", parts())
def test_contract(part):
    if part in NEEDS:
        pytest.importorskip(NEEDS[part])
    kind, _, name = part.rpartition("/")
    assert check(kind, part_path(kind, name)) == []
