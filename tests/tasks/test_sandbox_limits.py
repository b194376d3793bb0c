"""Attacks on the limits and on what is left behind, on every layer: each ends, says how, and harms no later program."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.tasks.sandbox import Program, Sandbox

from .conftest import call, endless

BODIES = {
    "allocate at once": ("return bytearray(10**11)[0]", {"memory"}),
    "allocate bit by bit": ("kept = []\n    while True: kept.append(bytearray(2**20))", {"memory"}),
    "answer without end": ("return 'x' * 10**7", {"output"}),
    "a large file": ("open('big', 'wb').write(bytes(2**24))", {"exception"}),
    "many files": ("[open(f'f{i}', 'wb').write(bytes(2**19)) for i in range(20)] and 0", {"exception", None}),
    "many open files": ("return [open('/dev/null') for _ in range(1000)] and 0", {"exception"}),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", {"crash"}),
    "endless recursion": (
        "import sys; sys.setrecursionlimit(10**9)\n    class A: __repr__ = repr\n    return repr(A())",
        {"crash", "memory", "exception"},
    ),
    "abort": ("import os; os.abort()", {"crash"}),
    "kill itself": ("import os; os.kill(os.getpid(), 9)", {"crash"}),
    "kill its group": ("import os; os.kill(0, 9)", {"crash"}),
    "raise the limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        {"exception"} if os.geteuid() else {"exception", None},
    ),
    "an exception that cannot be printed": (
        "raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})()",
        {"exception"},
    ),
    "a deep answer": ("x = []\n    for _ in range(10**5): x = [x]\n    return x", {"output", "memory"}),
    "a huge number": ("return 10 ** 5000", {"output"}),
    "a set": ("return {1, 2}", {"output"}),
    "threads that never end": (
        "import threading, time\n    threading.Thread(target=time.sleep, args=(60,)).start()\n    return 0",
        {None, "exception"},
    ),
    "close every file": ("import os; os.closerange(0, 100)", {"output", "exception", "missing", "crash"}),
}
DAEMON = """
import os, time
def f(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(3):
                os.dup2(os.open("/dev/null", os.O_RDWR), fd)
            if path:
                open(path, "w").write(str(os.getpid()))
            time.sleep(60)
        os._exit(0)
    os.wait()
    time.sleep(0.1)
    return 1
"""
ALONE = """
import os
def f():
    others = []
    for pid in range(2, 400):
        try:
            os.kill(pid, 0)
            others.append(pid)
        except OSError:
            pass
    return others == [os.getpid()]
"""
DIRTY = """
import os
def f():
    for _ in range(300):
        os.mkdir("deep")
        os.chdir("deep")
    os.chdir("/scratch" if os.path.exists("/scratch") else os.environ["HOME"])
    os.mkdir("locked")
    open("locked/file", "w").close()
    os.chmod("locked", 0)
    open("plain", "w").close()
    return 1
"""


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(60)"])
def test_what_never_ends_is_ended(sandbox: Sandbox, body: str) -> None:
    outcome = endless(sandbox, f"def f():\n    {body}")
    assert outcome.error == "timeout" and not outcome.ok


@pytest.mark.parametrize("name", BODIES)
def test_ends_and_is_named(sandbox: Sandbox, name: str) -> None:
    body, kinds = BODIES[name]
    outcome = call(sandbox, f"def f():\n    {body}")
    assert not outcome.ok
    assert outcome.error in kinds, outcome


def test_processor_time_ends_before_the_clock(sandbox: Sandbox) -> None:
    limits = replace(sandbox.limits, cpu_seconds=1, wall_seconds=60)
    with Sandbox.open(sandbox.layer, workers=1, limits=limits) as patient:
        outcome = call(patient, "def f():\n    while True: pass")
    assert outcome.error == "timeout" and outcome.seconds < 50


@pytest.mark.slow
def test_processor_time_ends_even_for_the_deaf(sandbox: Sandbox) -> None:
    source = "import signal\ndef f():\n    signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n    while True: pass"
    with Sandbox.open(
        sandbox.layer, workers=1, limits=replace(sandbox.limits, cpu_seconds=1, wall_seconds=60)
    ) as patient:
        outcome = call(patient, source)
    assert outcome.error == "timeout" and outcome.seconds < 50


def test_printing_without_end_as_a_script(sandbox: Sandbox) -> None:
    outcome = sandbox.run([Program(source="while True: print('x' * 1000)", tests=((("",), "x"),))])[0]
    assert outcome.error == "output"


def test_signals_everyone_only_where_everyone_is_within() -> None:
    """Signal 0 reaches nobody and is checked like any other: a real one would end the machine that runs this."""
    with Sandbox.open("unsafe", workers=1) as sandbox:
        source = "import os\ndef f():\n    try: os.kill(-1, 0)\n    except PermissionError: return 'refused'"
        assert sandbox.run([Program(source=source, entry="f", tests=(((), "refused"),))])[0].ok
        own = "import os\ndef f():\n    os.kill(os.getpid(), 0)\n    return 'sent'"
        assert sandbox.run([Program(source=own, entry="f", tests=(((), "sent"),))])[0].ok


def test_leaves_no_process(sandbox: Sandbox, tmp_path: Path) -> None:
    note = tmp_path / "pid" if sandbox.layer == "unsafe" else ""
    started = time.monotonic()
    assert call(sandbox, DAEMON, str(note), expected=1).ok
    assert time.monotonic() - started < 45, "a process left behind holds nobody up"
    if note:
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.read_text()), 0)
    else:
        assert call(sandbox, ALONE, expected=True).ok


def test_scratch_is_fresh(sandbox: Sandbox) -> None:
    listing = "import os\ndef f(): return os.listdir('.')"
    assert call(sandbox, DIRTY, expected=1).ok
    assert call(sandbox, listing, expected=[]).ok


def test_clean_up_follows_no_link(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("whole")
    source = f"import os\ndef f():\n    os.symlink({str(tmp_path)!r}, 'folder')\n    return 1"
    assert call(sandbox, source, expected=1).ok
    assert (tmp_path / "kept").read_text() == "whole"
