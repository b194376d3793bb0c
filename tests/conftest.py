"""Which tests are quick enough for `make test-fast` (90 seconds), by folder; and how hypothesis draws.

By default the same examples every time, so that a change is judged by what it changes; `make test-all` draws new ones.
No deadlines, and no complaint of slow drawing: a busy machine is not a wrong result.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("steady", derandomize=True, **UNHURRIED)
settings.register_profile("exploring", print_blob=True, **UNHURRIED)
settings.load_profile("steady")

FAST = ("core", "cost", "text", "contracts", "rewards", "test_layers.py", "test_cli.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in the FAST folders that is not slow."""
    here = Path(__file__).parent
    for item in items:
        first = item.path.relative_to(here).parts[0]
        if first in FAST and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)
