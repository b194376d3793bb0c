"""Kill -9 at random moments, against a server that counts: nothing that was kept is lost or asked again.

The store is written by a thread, or by a process of its own that outlives the killed one for a moment.
"""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from asked import APART, ENVIRONMENT, Server, write_questions
from stub_api import said

from shoestring.data.store import Store
from shoestring.data.traces import TraceStore
from shoestring.data.workers import Worker

AT_ONCE = 16
SLOW = [pytest.param(50, 5000, apart, marks=pytest.mark.slow) for apart in (False, True)]


def command(server: Server, folder: Path, apart: bool, *more: str) -> list[str]:
    return [
        sys.executable, *(["-c", APART] if apart else ["-m", "shoestring.cli"]), "ask", "--teacher", server.url,
        "--model", "m", "--name", "t", "--questions", str(folder / "q.jsonl"), "--out", str(folder / "traces"),
        "--concurrency", str(AT_ONCE), "--price", "1,2,0.5", "--budget", "100", "--max-tokens", "50", "--quiet", *more,
    ]  # fmt: skip


def kill_after_some_answers(process: subprocess.Popen[bytes], out: Path, more: int, draw: random.Random) -> None:
    """Kill once `more` answers are in the store, one of this process's among them (so that it has counted what the one
    before had in flight), a random moment later; the process may end before."""
    more = max(more, answered(out) + 1)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and answered(out) < more:
        time.sleep(0.003)
    time.sleep(draw.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def answered(out: Path) -> int:
    """Answers in the store of a living or dead process, without opening it for writing."""
    try:
        with sqlite3.connect(f"file:{out / 'traces.db'}?mode=ro", uri=True, timeout=60) as base:
            return int(base.execute("SELECT count(*) FROM answers").fetchone()[0])
    except sqlite3.Error:
        return 0


def kills(server: Server, folder: Path, count: int, questions: int, apart: bool) -> dict[str, int]:
    """Kill `count` sessions, finish with one that is not killed, and check what holds after each."""
    texts = [f"question {i}" for i in range(questions)]
    write_questions(folder / "q.jsonl", texts)
    out, draw = folder / "traces", random.Random(7)
    kept: dict[str, str] = {}
    in_flight = 0
    step = questions // (count + 1)
    for number in range(count):
        process = subprocess.Popen(command(server, folder, apart), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        kill_after_some_answers(process, out, (number + 1) * step, draw)
        with Worker(out):  # waits for a writer that was left behind
            pass
        store = Store(out)
        sent = store.counts()["sent"]
        store.close()
        assert sent <= AT_ONCE
        in_flight += sent
        now = {trace.id: trace.answer for trace in TraceStore(out).read()}
        assert kept.items() <= now.items()  # nothing that was kept is lost or altered
        kept = now
    done = subprocess.run(command(server, folder, apart), env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    store = Store(out)
    purse, counts = store.read_purse(), store.counts()
    store.close()
    answers = {trace.messages[-1]["content"]: trace.answer for trace in TraceStore(out).read()}
    assert answers == {text: said(text, None).strip() for text in texts} or answers == {t: said(t, None) for t in texts}
    assert counts == {"planned": 0, "sent": 0, "answered": questions, "failed": 0}
    assert purse.doubts == in_flight and purse.in_flight == 0 and purse.reserved == 0
    assert purse.spent == questions * (15 * 10**6 + 5 * 500_000 + 40 * 2 * 10**6)
    assert (f"{purse.doubts:,} requests perhaps billed" in done.stdout) == (purse.doubts > 0)
    return server.stats() | {"doubts": purse.doubts}


@pytest.mark.parametrize(("count", "questions", "apart"), [(4, 400, True), *SLOW])
@pytest.mark.timeout(600)
def test_kill_9(start: Callable[..., Server], tmp_path: Path, count: int, questions: int, apart: bool) -> None:
    """What the server counted beyond the stored answers are the rows in doubt, and no more than were in flight."""
    stats = kills(start("--latency", "0.01"), tmp_path, count, questions, apart)
    assert questions <= stats["billed"] <= questions + stats["doubts"]
    assert stats["questions"] == questions


@pytest.mark.parametrize(("count", "questions", "apart"), [(4, 400, False), *SLOW])
@pytest.mark.timeout(600)
def test_kill_9_before_a_server_that_remembers_keys(
    start: Callable[..., Server], tmp_path: Path, count: int, questions: int, apart: bool
) -> None:
    """Every question is billed exactly once."""
    stats = kills(start("--latency", "0.01", "--remember"), tmp_path, count, questions, apart)
    assert stats["billed"] == stats["questions"] == questions
    assert stats["requests"] == questions + stats["replayed"]
