"""Which tests are quick enough for `make test-fast` (90 seconds), by folder."""

from __future__ import annotations

from pathlib import Path

import pytest

FAST = ("core", "cost", "text", "contracts", "rewards", "test_layers.py", "test_cli.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in the FAST folders that is not slow."""
    here = Path(__file__).parent
    for item in items:
        first = item.path.relative_to(here).parts[0]
        if first in FAST and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)
