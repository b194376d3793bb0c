"""The writer in a process of its own: the same store as the thread's, and nothing left behind whoever is killed."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from asked import APART, ENVIRONMENT, Server, job, write_questions
from test_ask import ONE, texts

from shoestring.core.atomic import DiskFull
from shoestring.core.errors import UserError
from shoestring.data import far, journal
from shoestring.data.claims import Answer, Budget, Claim, Returned, Settled
from shoestring.data.questions import Asked
from shoestring.data.store import Store
from shoestring.data.traces import TraceStore
from shoestring.data.workers import Worker
from shoestring.data.writer import Frames, frame, packed, unpacked
from shoestring.teachers import _job
from shoestring.teachers._session import run


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[far.Far]]:
    """Every job is written by a process, whatever the machine; those that were started."""
    started: list[far.Far] = []

    class Watched(far.Far):
        def __init__(self, store: Store) -> None:
            super().__init__(store)
            started.append(self)

    monkeypatch.setattr(journal, "MANY", 1)
    monkeypatch.setattr(journal, "cores", lambda: 2)
    monkeypatch.setattr(journal, "Far", Watched)
    yield started
    assert all(one._process.returncode is not None for one in started)  # none is left behind


def dump(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """Everything a store holds that does not depend on the order of answers."""
    store = Store(folder)
    try:
        found = {
            "rows": "SELECT trace, question, sample, state, reserved, attempts, turn, doubts, kind, told FROM rows "
            "ORDER BY id",
            "answers": "SELECT row, finish, tokens_in, tokens_out, pico, body FROM answers ORDER BY row",
            "purse": "SELECT * FROM purse", "troubles": "SELECT * FROM troubles ORDER BY kind",
        }  # fmt: skip
        return {name: store.base.execute(statement).fetchall() for name, statement in found.items()}
    finally:
        store.close()


ODD = ["!badrequest a", "!busy*1 b", "!length c", "世界 é \0", "!server*1 d", "!html*1 e"]


def test_the_same_as_the_thread(
    start: Callable[..., Server], tmp_path: Path, apart: list[far.Far], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plain twin: a thread writes the same store out of the same answers, errors and drops."""
    stores = []
    for name, many in (("far", 1), ("near", 1 << 30)):
        monkeypatch.setattr(journal, "MANY", many)
        (tmp_path / name).mkdir()
        outcome = run(job(start(), tmp_path / name, [*texts(100), *ODD], truncated="drop"))
        assert outcome.counts["answered"] == 104 and outcome.counts["failed"] == 2
        assert outcome.purse.spent == 105 * ONE and outcome.purse.in_flight == outcome.purse.reserved == 0
        stores.append(dump(tmp_path / name / "traces"))
    assert len(apart) == 1 and stores[0] == stores[1]


def test_frames_in_any_pieces() -> None:
    claim = Claim((7, 8), 1 << 62, 5)
    ops = [
        claim, Settled(claim, [Answer(7, "stop", 1, 2, 3, "now", '{"é": "\ud800\0"}')], (8,), 9, 10, (11,)),
        Returned(claim, True, False, True, "kind", "told"),
    ]  # fmt: skip
    data, frames, found = packed(ops) + frame((3, [0, 1], None)), Frames(), []
    draw = random.Random(1)
    while data:
        size = draw.randint(1, 9)
        found += frames.feed(data[:size])
        data = data[size:]
    assert sorted(map(repr, unpacked(found[0]))) == sorted(map(repr, ops)) and found[1] == (3, [0, 1], None)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_it_plans_too(
    server: Server, tmp_path: Path, apart: list[far.Far], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """The same rows in the same order as in this process, for several teachers and samples; then what is new."""
    monkeypatch.setattr(_job, "CHUNK", chunk)
    stores = []
    for name, many in (("far", 1), ("near", 1 << 30)):
        monkeypatch.setattr(journal, "MANY", many)
        (tmp_path / name).mkdir()
        asked = job(server, tmp_path / name, [*texts(60), "世界 é \0"], samples=2, budget=Budget(0))
        asked = replace(asked, apis=[*asked.apis, replace(asked.apis[0], name="u", weight=0.5)])
        assert run(asked).counts["planned"] == 122
        stores.append(dump(tmp_path / name / "traces")["rows"])
    assert stores[0] == stores[1] and len(apart) == 1
    monkeypatch.setattr(journal, "MANY", 1)
    again = job(server, tmp_path / "far", [*texts(70), "世界 é \0"], name="t")
    assert run(again).counts["answered"] == 71 and len(apart) == 2


@pytest.mark.parametrize(
    ("fault", "message"), [("id", "already stands on line 3"), ("killed", "was killed"), ("full", "No space")]
)
def test_planning_that_fails_leaves_no_process(
    server: Server, tmp_path: Path, apart: list[far.Far], monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    """Two questions of one id, a writer that is killed, a disk that is full: told before anything is sent."""
    monkeypatch.setattr(_job, "CHUNK", 5)
    asked = job(server, tmp_path, texts(200))
    if fault == "id":
        lines = (tmp_path / "q.jsonl").read_text().splitlines()
        (tmp_path / "q.jsonl").write_text("\n".join([*lines, lines[2].replace("question 2", "another")]) + "\n")
    source = asked.source

    def faulty() -> Iterator[Asked]:
        for number, one in enumerate(source()):
            if fault == "killed" and number == 100:
                os.kill(apart[0]._process.pid, signal.SIGKILL)
            if fault == "full" and number == 100:
                resource.prlimit(apart[0]._process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
            yield one

    with pytest.raises(UserError, match=message):
        run(replace(asked, source=faulty))
    assert len(apart) == 1 and server.stats()["requests"] == 0


def test_a_disk_that_is_full_from_the_start(
    server: Server, tmp_path: Path, apart: list[far.Far], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space to set aside: told before anything is sent, and the process ends."""

    def full(path: Path) -> None:
        raise DiskFull(f"Less than 16 MB are free for {path}.")

    monkeypatch.setattr(journal, "keep_aside", full)
    with pytest.raises(DiskFull, match="are free"):
        run(job(server, tmp_path, texts(20)))
    assert len(apart) == 1 and server.stats()["requests"] == 0


def test_a_budget_is_held(server: Server, tmp_path: Path, apart: list[far.Far]) -> None:
    worst = (len('[{"content":"question 10","role":"user"}]') + 64) * 10**6 + 50 * 2 * 10**6
    for limit in (0, worst, 12 * ONE + worst):
        spent = []
        asked = job(server, tmp_path, texts(90), budget=Budget(limit))
        outcome = run(asked, watch=lambda a, s=spent: s.append(a.journal.purse))  # type: ignore[misc]
        assert all(p.spent + p.reserved + p.doubt <= limit for p in spent) and outcome.purse.spent <= limit
        assert outcome.told.stopped and "budget" in outcome.told.stopped
        assert limit - outcome.purse.spent < worst or limit < worst
    assert run(replace(asked, budget=Budget(200 * worst))).counts["answered"] == 90 and len(apart) == 4


def test_only_large_jobs_on_machines_with_a_core_to_spare(
    server: Server, tmp_path: Path, apart: list[far.Far], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MANY", 60)
    run(job(server, tmp_path, texts(59)))
    run(replace(job(server, tmp_path, texts(200)), share=True))
    monkeypatch.setattr(journal, "cores", lambda: 1)
    run(job(server, tmp_path, texts(300)))
    assert not apart
    monkeypatch.setattr(journal, "cores", lambda: 2)
    assert run(job(server, tmp_path, texts(400))).counts["answered"] == 400 == server.stats()["billed"]
    assert len(apart) == 1


def test_it_starts_without_what_it_does_not_need() -> None:
    code = "import sys, shoestring.data.writer; print(*sorted(sys.modules))"
    root = str(Path(far.__file__).parents[2])
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({root!r}); {code}"]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout.split())
    assert not loaded & {"torch", "asyncio", "aiohttp", "pydantic", "numpy", "psycopg"} and "sqlite3" in loaded


def test_its_death_ends_the_session(start: Callable[..., Server], tmp_path: Path, apart: list[far.Far]) -> None:
    """At once, with a sentence, while a slow server still thinks; the rows in flight are in doubt, and it goes on."""
    server = start("--hold-after", "100")
    asked = job(server, tmp_path, ["!hang*1 x", *texts(300)], most=8)
    killed = []

    def kill(asking: object) -> None:
        if asking.told.answers > 20 and not killed:  # type: ignore[attr-defined]
            killed.append(apart[0]._process.pid)
            os.kill(killed[0], signal.SIGKILL)

    outcome = run(asked, watch=kill)
    assert outcome.told.stopped is not None and not outcome.told.mistake
    assert "was killed (signal 9); what is kept is kept" in outcome.told.stopped
    assert 20 < outcome.counts["answered"] <= 100 and outcome.counts["sent"] <= 8
    server.release()
    again = run(asked)
    assert again.counts["answered"] == 301 and again.doubtful == outcome.counts["sent"]
    assert 301 <= server.stats()["billed"] <= 301 + again.purse.doubts


def begin(server: Server, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APART, "ask", "--teacher", server.url, "--model", "m", "--questions",
               str(folder / "q.jsonl"), "--out", str(folder / "traces"), "--quiet", *more]  # fmt: skip
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def children(pid: int) -> list[int]:
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(journal.cores() < 2, reason="one core: a thread writes")
def test_it_ends_with_the_process_that_asks(start: Callable[..., Server], tmp_path: Path) -> None:
    """Killed, the one that asks leaves neither a process nor a lock; what had reached the writer is kept."""
    server = start("--hold-after", "200")  # more than are sent at first: answers have come, and it does not end
    write_questions(tmp_path / "q.jsonl", texts(2000))
    process = begin(server, tmp_path)
    server.asked(201)
    (writer,) = children(process.pid)
    process.kill()
    process.communicate()
    with Worker(tmp_path / "traces"):  # waits for it
        pass
    end = time.monotonic() + 60
    while (status := Path(f"/proc/{writer}/status")).exists() and "zombie" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    store = Store(tmp_path / "traces")
    purse, counts = store.read_purse(), store.counts()
    store.close()
    assert purse.answers == counts["answered"] == len(TraceStore(tmp_path / "traces").read()) > 0
    assert purse.in_flight == counts["sent"] <= 64


@pytest.mark.skipif(journal.cores() < 2, reason="one core: a thread writes")
def test_ctrl_c_reaches_both_and_nothing_is_lost(start: Callable[..., Server], tmp_path: Path) -> None:
    """A terminal interrupts the whole group: the writer goes on until what is in flight is kept."""
    server = start("--latency", "0.3")
    write_questions(tmp_path / "q.jsonl", texts(5000))
    process = begin(server, tmp_path, "--json")
    server.asked(10)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "interrupted" in err and "Traceback" not in err
    report = json.loads(out)
    assert report["answered"] == server.stats()["billed"] > 0 and report["in_doubt_rows"] == 0 and report["sent"] == 0


@pytest.mark.skipif(journal.cores() < 2, reason="one core: a thread writes")
def test_a_second_process_is_refused(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start("--hold-after", "20")
    write_questions(tmp_path / "q.jsonl", texts(400))
    first = begin(server, tmp_path, "--concurrency", "4")
    server.asked(21)
    try:
        for share in (False, True):
            with pytest.raises(UserError, match="Another process is asking"):
                Worker(tmp_path / "traces", share=share)
    finally:
        first.kill()
        first.communicate()
    with Worker(tmp_path / "traces"):  # and let in afterwards, once the writer has ended
        pass


def test_a_writer_that_stays_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoestring.data import workers

    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'a+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 1 << 40); "
            "print(flush=True); time.sleep(60)")  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        monkeypatch.setattr(workers, "WRITER_S", 0.05)
        with pytest.raises(UserError, match="writer still holds"):
            Worker(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    Worker(tmp_path).__exit__(None, None, None)


FULL = """
import shutil, subprocess, sys
folder, copy = sys.argv[1:3]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", folder], check=True)
del sys.argv[1:3]
from shoestring.data import journal
from shoestring.cli import main
journal.MANY = 1
code = main()
shutil.copytree(folder, copy)  # the mount ends with this process
sys.exit(code)
"""


@pytest.mark.skipif(journal.cores() < 2, reason="one core: a thread writes")
def test_a_disk_that_is_really_full(start: Callable[..., Server], tmp_path: Path) -> None:
    """What was in flight is kept in the space set aside; nothing more is sent, and with space it goes on."""
    out, copy = tmp_path / "traces", tmp_path / "copy"
    out.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(out)], capture_output=True).returncode:
        pytest.skip("no mount of one's own here")
    server = start("--latency", "0.02")
    write_questions(tmp_path / "q.jsonl", texts(1500))
    options = ["ask", "--teacher", server.url, "--model", "m", "--questions", str(tmp_path / "q.jsonl"),
               "--concurrency", "16", "--quiet"]  # fmt: skip
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL, str(out), str(copy), *options, "--out", str(out)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 2 and "No space left on the disk" in done.stderr and "Traceback" not in done.stderr
    store = Store(copy)
    counts = store.counts()
    store.close()
    assert counts["answered"] == server.stats()["billed"] > 0 and counts["sent"] == 0
    again = subprocess.run([sys.executable, "-c", APART, *options, "--out", str(copy)], env=ENVIRONMENT, timeout=250)
    assert again.returncode == 0 and server.stats()["billed"] == 1500
