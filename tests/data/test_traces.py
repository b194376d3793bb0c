"""The traces store: what is appended is there, whatever kills the writer."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shoestring
from shoestring.core.atomic import DiskFull
from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.curate._contract import example
from shoestring.data import schema
from shoestring.data.export import export as export_traces
from shoestring.data.traces import TraceIds, TraceStore, _plain, canonical, texts, trace_id

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
    return TraceStore(tmp_path / "traces.db")


def many(n: int, prefix: str = "a") -> list[Trace]:
    return [example(id=f"{prefix}{i}", answer=f"é\n\r\u2028 {i}") for i in range(n)]


def test_what_is_appended_is_read(store: TraceStore) -> None:
    assert store.read() == []
    assert not store.path.exists()  # opening and reading touch nothing
    assert store.append(many(3)) == 3
    assert store.append(many(2, "b")) == 2
    assert TraceStore(store.path).read() == many(3) + many(2, "b")
    assert TraceStore(store.path.parent).read() == many(3) + many(2, "b")  # a folder's store
    assert len(store) == 5


def test_every_field_survives(store: TraceStore) -> None:
    traces = [
        example(id="1", prompt_ids=[1, 2], token_ids=[3], cost_usd=1 / 3, decoding={"temperature": 0.6, "sample": 2}),
        example(id="2", correct=None, task=None, problem_id=None, finish_reason="length", thinking=None),
        example(id="3", usage={"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 1}, teacher_reported="x"),
        example(id="4", messages=[{"role": "user", "content": "世界 \ud800"}], source={"endpoint": "e"}),
    ]
    store.append(traces)
    assert store.read() == traces


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


def test_it_is_whole_in_one_file(store: TraceStore, tmp_path: Path) -> None:
    """What a run hashes as its output is everything: nothing is left in the write-ahead log."""
    store.append(many(3))
    (tmp_path / "copy.db").write_bytes(store.path.read_bytes())
    assert TraceStore(tmp_path / "copy.db").read() == many(3)


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


def test_two_writers_do_not_mix(store: TraceStore) -> None:
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
    connect = sqlite3.connect

    def cramped(*args: object, **options: object) -> sqlite3.Connection:
        base = connect(*args, **options)  # type: ignore[call-overload]
        base.execute(f"PRAGMA max_page_count = {base.execute('PRAGMA page_count').fetchone()[0]}")
        return base

    with monkeypatch.context() as patch:
        patch.setattr(schema.sqlite3, "connect", cramped)
        with pytest.raises(DiskFull, match="No space left"):
            store.append([example(id="long", answer="7" * 100_000)])
    assert store.read() == many(2)
    assert store.append(many(5)) == 3


def test_foreign_and_newer_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    newer, other, text = tmp_path / "newer.db", tmp_path / "other.db", tmp_path / "text.db"
    TraceStore(newer).append(many(1))
    with sqlite3.connect(newer) as base:
        base.execute("PRAGMA user_version = 99")
    with sqlite3.connect(other) as base:
        base.execute("CREATE TABLE mine(a)")
    text.write_text("this is no database, whatever its name says\n" * 50)
    for path, message in ((newer, "newer version"), (other, "something else"), (text, "not a traces store")):
        before = path.read_bytes()
        with pytest.raises(UserError, match=message):
            TraceStore(path).append(many(2))
        with pytest.raises(UserError, match=message):
            TraceStore(path).read()
        assert path.read_bytes() == before


def test_an_export_is_read_and_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    good = "".join(json.dumps(trace.to_dict()) + "\n" for trace in many(3))
    path.write_text(good)
    assert TraceStore(path).read() == TraceStore(tmp_path).read() == many(3)
    with pytest.raises(UserError, match="is an export"):
        TraceStore(path).append(many(1))
    for line, message in (
        (json.dumps(example().to_dict() | {"schema": 2}) + "\n", "line 4: trace a0 has schema 2"),
        ("oops\n", "line 4 is not JSON"),
        ("[1]\n", "line 4 is not a trace"),
        (json.dumps(example().to_dict() | {"colour": 1}) + "\n", "unknown field"),
    ):
        path.write_text(good + line + good)
        with pytest.raises(UserError, match=message):
            TraceStore(path).read()


def test_digest_is_of_what_was_said(tmp_path: Path) -> None:
    def digest(name: str, traces: list[Trace]) -> str:
        store = TraceStore(tmp_path / f"{name}.db")
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


def test_ids_in_one_go_are_the_same() -> None:
    """The fast twin."""
    for name, content in (("t", "x"), ('é"', "世界\n"), ("t", [{"type": "text", "text": "a"}])):
        messages = [{"role": "user", "content": content}]
        decoding = {"top_p": 0.9, "temperature": 1.0, "stop": ["a"]}
        found = TraceIds(name, decoding).of(texts(messages)[0], 3)
        assert found == [trace_id(name, messages, decoding, sample) for sample in range(3)]


def test_plain_messages_are_canonical() -> None:
    """The fast twin of `canonical`, and what it leaves to it."""
    odd = 'a"\\/\x00\x1f\x7f\n é 世界 \U0001f600 \ud800 </script>'
    for messages in (
        [],
        [{"role": "user", "content": odd}],
        [{"content": "b", "role": "system"}, {"role": odd, "content": ""}],
    ):
        assert _plain(messages) == canonical(messages) == texts(messages)[0]
    for other in ({"role": "user", "content": None}, {"role": "user", "content": ["a"]}, {"content": "a"},
                  {"role": "user", "content": "a", "name": "b"}, {"role": "user", "text": "a"}):  # fmt: skip
        assert _plain([other]) is None and texts([other])[0] == canonical([other])


def test_conversations_are_traces_too(tmp_path: Path) -> None:
    """What `.chat.jsonl` exports hold, and published traces with their thinking in the content; terms are unknown."""
    whole = [example(id="1", thinking="why"), example(id="2", thinking=None)]
    export_traces(whole, tmp_path / "mine.chat.jsonl")
    again = TraceStore(tmp_path / "mine.chat.jsonl").read()
    assert [(t.id, t.teacher, t.messages, t.thinking, t.answer, t.licence) for t in again] == [
        (t.id, t.teacher, t.messages, t.thinking, t.answer, t.licence) for t in whole
    ]
    said = "<think>\ntwo and two\n</think>\n\n4"
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": said}]
    path = tmp_path / "theirs.jsonl"
    path.write_text(json.dumps({"messages": turns, "source": "a data set"}))
    (trace,) = TraceStore(path).read()
    assert (trace.thinking, trace.answer, trace.messages) == ("two and two", "4", turns[:1])
    assert trace.licence == trace.teacher == "unknown" and trace.id == TraceStore(path).read()[0].id
    for broken in (turns[:1], [*turns, turns[0]], "text", [{"role": "user"}, turns[1]]):
        path.write_text(json.dumps({"messages": broken}))
        with pytest.raises(UserError, match=r"line 1: .*a question and then an answer"):
            TraceStore(path).read()


def test_an_answer_that_was_cut_off_stays_cut_off_in_a_conversation(tmp_path: Path) -> None:
    """Else it would be taught as an answer that ends there."""
    export_traces([example(id="1"), example(id="2", finish_reason="length")], path := tmp_path / "mine.chat.jsonl")
    assert [trace.finish_reason for trace in TraceStore(path).read()] == ["stop", "length"]
    path.write_text(path.read_text().replace('"length"', '"end_turn"'))  # another's word for an end of its own
    assert [trace.finish_reason for trace in TraceStore(path).read()] == ["stop", "stop"]


def test_a_store_on_a_read_only_disk_is_read(store: TraceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite would make files beside it; said to lie still, it does not."""
    store.append(many(3))
    before = sorted(store.path.parent.iterdir())
    made: list[str] = []
    connect = sqlite3.connect

    def seen(address: str, **options: object) -> sqlite3.Connection:
        made.append(address)
        return connect(address, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(schema.os, "access", lambda *_: False)  # root may write everywhere but there
    monkeypatch.setattr(schema.sqlite3, "connect", seen)
    assert len(store.read()) == 3 and made[-1].endswith("?immutable=1")
    assert sorted(store.path.parent.iterdir()) == before
    Path(f"{store.path}-wal").write_bytes(b"1")  # somebody has written there: then it must not be said
    assert "immutable" not in schema._address(store.path, writable=False)


@pytest.mark.parametrize("row", [1, 2])
def test_a_file_of_traces_that_breaks_off_is_damage(row: int, tmp_path: Path) -> None:
    """A download cut on its way, or a line cut in the middle, is not learnt from without its rest."""
    export_traces([example(id="1"), example(id="2")], path := tmp_path / "mine.jsonl")
    lines = path.read_text().splitlines()
    lines[row - 1] = lines[row - 1][:40]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"line {row} breaks off: the file is cut; copy it again"):
        TraceStore(path).read()
    path.write_text("no json\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        TraceStore(path).read()
