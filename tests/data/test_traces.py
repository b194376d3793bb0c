"""The traces store: what is appended is there, whatever kills the writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import shoestring
from shoestring.core.atomic import DiskFull
from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._contract import example
from shoestring.data.traces import TraceStore, trace_id

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(shoestring.__file__).parent.parent)}
WRITER = """
import sys
from shoestring.curate._contract import example
from shoestring.data.traces import TraceStore
store = TraceStore(sys.argv[1])
for batch in range(100000):
    store.append([example(id=f"{batch}-{i}", answer="é7" * 300) for i in range(20)])
    print(batch, flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> TraceStore:
    return TraceStore(tmp_path / "traces.jsonl")


def many(n: int, prefix: str = "a") -> list[Trace]:
    return [example(id=f"{prefix}{i}", answer=f"é\n\r\u2028 {i}") for i in range(n)]


def test_what_is_appended_is_read(store: TraceStore) -> None:
    assert store.read() == []
    assert not store.path.exists()  # opening and reading touch nothing
    assert store.append(many(3)) == 3
    assert store.append(many(2, "b")) == 2
    assert TraceStore(store.path).read() == many(3) + many(2, "b")
    assert len(store) == 5


def test_an_empty_append_makes_the_file(store: TraceStore) -> None:
    assert store.append([]) == 0
    assert store.path.exists()
    assert store.read() == []


def test_an_id_is_stored_once(store: TraceStore) -> None:
    store.append(many(3))
    assert store.append(many(5)) == 2
    assert TraceStore(store.path).append([*many(6), *many(6)]) == 1  # another process, and repeats in one append
    assert store.append(many(7)) == 1  # and the first one notices
    assert [trace.id for trace in store.read()] == [f"a{i}" for i in range(7)]


@pytest.mark.parametrize("cut", [1, 2, 50, 300])
def test_a_torn_last_line_is_cut(store: TraceStore, cut: int) -> None:
    store.append(many(3))
    data = store.path.read_bytes()
    store.path.write_bytes(data[:-cut])
    again = TraceStore(store.path)
    assert again.read() == many(2)
    assert store.path.read_bytes() == data[:-cut]  # reading repairs nothing
    assert again.append(many(3)) == 1
    assert store.path.read_bytes() == data


def test_one_append_is_one_fsync(store: TraceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append([])
    calls = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(fd), fsync(fd))[1])
    store.append(many(100))
    assert len(calls) == 1


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.05])
def test_kill_9_loses_nothing_that_was_acknowledged(store: TraceStore, delay: float) -> None:
    command = [sys.executable, "-c", WRITER, str(store.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as writer:
        assert writer.stdout is not None
        for _ in range(5):
            acknowledged = int(writer.stdout.readline())
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout:
            acknowledged = int(line)
    again = TraceStore(store.path)
    ids = [trace.id for trace in again.read()]
    complete = [f"{batch}-{i}" for batch in range(acknowledged + 1) for i in range(20)]
    assert ids[: len(complete)] == complete
    assert again.append([example(id="after")]) == 1
    assert [trace.id for trace in again.read()] == [*ids, "after"]


def test_two_writers_do_not_mix_lines(store: TraceStore) -> None:
    code = WRITER.replace("100000", "10").replace('f"{batch}-', 'sys.argv[2] + f"{batch}-')
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(store.path), name], stdout=subprocess.DEVNULL, env=ENVIRONMENT
        )
        for name in ("x", "y")
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len({trace.id for trace in store.read()}) == len(store) == 400


def test_a_full_disk_leaves_the_store_as_it_was(store: TraceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(many(2))
    before = store.path.read_bytes()
    write: Callable[[int, bytes], int] = os.write
    room = [300]

    def full(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = write(fd, data[: room[0]])
        room[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskFull, match="No space left"):
            store.append(many(5))
    assert store.path.read_bytes() == before
    assert store.append(many(5)) == 3


def test_foreign_lines_are_refused_in_one_sentence(store: TraceStore) -> None:
    store.append(many(1))
    good = store.path.read_text()
    newer = json.dumps(example().to_dict() | {"schema": 2}) + "\n"
    for line, message in (
        (newer, "line 2: trace a0 has schema 2"),
        ("{oops}\n", "line 2 is not JSON"),
        ("[1]\n", "line 2 is not a trace"),
        (json.dumps(example().to_dict() | {"colour": 1}) + "\n", "unknown field"),
    ):
        store.path.write_text(good + line)
        with pytest.raises(UserError, match=message):
            TraceStore(store.path).read()
        with pytest.raises(UserError):
            TraceStore(store.path).append(many(2))
        assert store.path.read_text() == good + line


def test_digest_is_of_what_was_said(tmp_path: Path) -> None:
    def digest(name: str, traces: list[Trace]) -> str:
        store = TraceStore(tmp_path / name)
        store.append(traces)
        return store.digest()

    first = digest("1", many(3))
    assert first == digest("2", many(3)[::-1])
    later = [example(**trace.to_dict() | {"date": "2030-01-01T00:00:00+00:00", "cost_usd": 1.0}) for trace in many(3)]
    assert first == digest("3", later)
    assert first != digest("4", [*many(2), example(id="a2", answer="other")])


def test_ids_are_of_what_was_asked() -> None:
    asked = ("t", [{"role": "user", "content": "x"}], {"temperature": 1.0}, 0)
    assert trace_id(*asked) == trace_id(*asked) == "cbd3daa43b823de7"
    for place, other in enumerate(("u", [], {"temperature": 0.9}, 1)):
        assert trace_id(*(other if i == place else part for i, part in enumerate(asked))) != trace_id(*asked)  # type: ignore[arg-type]
