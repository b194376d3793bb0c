"""Waiting for what comes: soon as a rule, late on a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(check: Callable[[], Any], seconds: float = 60.0) -> bool:
    """Whether it becomes true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if check():
            return True
        time.sleep(0.02)
    return bool(check())
