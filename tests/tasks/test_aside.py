"""A function in a process that can be killed: results, lateness in any thread, deaths, what it prints."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoestring.core.errors import UserError
from shoestring.tasks._aside import Aside, Late

SOURCE = """
import os, time
def work(what, value=None):
    if what == "sleep": time.sleep(value)
    if what == "die": os._exit(3)
    if what == "print": print("not a reply")
    if what == "raise": raise KeyError(value)
    if what == "hoard": bytearray(10**12)
    return [what, value, os.getpid()]
"""


@pytest.fixture()
def aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aside]:
    (tmp_path / "aside_work.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    function = Aside("aside_work:work")
    yield function
    function.close()


def test_keeps_its_process(aside: Aside) -> None:
    first, second = aside("a", {"b": [1.5, None]}, seconds=60), aside("print", seconds=60)
    assert first[:2] == ["a", {"b": [1.5, None]}] and second[:2] == ["print", None] and first[2] == second[2]


def test_late_in_a_thread_is_killed_and_replaced(aside: Aside) -> None:
    before = aside("a", seconds=60)[2]
    found: list[object] = []

    def work() -> None:
        try:
            aside("sleep", 60, seconds=0.2)
        except Late as late:
            found.append(late)

    started = time.monotonic()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1 and time.monotonic() - started < 30  # and not the minute it would sleep
    assert aside("a", seconds=60)[2] != before


def test_errors_have_names(aside: Aside) -> None:
    with pytest.raises(ValueError, match="KeyError: 'x'"):
        aside("raise", "x", seconds=60)
    with pytest.raises(ValueError, match="MemoryError"):
        aside("hoard", seconds=60)
    with pytest.raises(RuntimeError, match="ended"):
        aside("die", seconds=60)
    assert aside("a", seconds=60)[0] == "a", "a fresh process after a death"


def test_a_missing_package_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match='"no_such_package" is not installed'):
        Aside("no_such_package:work")(1, seconds=1)
