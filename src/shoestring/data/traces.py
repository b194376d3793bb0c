"""The traces store: a teacher's kept answers, appended for good.

One `append` is one transaction on disk, however many traces it holds; a kill at any moment costs at most the append
it interrupted. A trace's id says what was asked of whom and how, not what was answered: appending an id that is there
already does nothing, so a batch asked again after a crash is stored once. The file is the one that `shoestring ask`
writes (`schema.py`); one .jsonl file of exported traces is read too, of whole traces or of conversations.

Left out: deletion; what curation drops is marked, and stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.core.atomic import read_lines
from shoestring.core.errors import UserError
from shoestring.core.nouns import CUT_OFF, Trace
from shoestring.data.claims import Answer
from shoestring.data.schema import ANSWERED, FILE, PICO, Sql, file_of, open_file
from shoestring.data.store import Store

NOT_CONTENT = ("date", "cost_usd")  # when it was said and at what price: not part of what was said
CHUNK = 1000
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))  # `dumps` would make one each time
_quoted = json.encoder.encode_basestring_ascii
_BODY = (
    "thinking", "answer", "prompt_ids", "token_ids", "task", "problem_id", "decoding", "usage", "cost_usd", "source",
)  # fmt: skip

_READ = """
SELECT a.row, r.trace, r.sample, h.fields, q.messages, q.ref, q.problem, a.finish, a.tokens_in, a.tokens_out, a.pico,
       a.date, a.body, a.correct
FROM (SELECT * FROM answers a WHERE a.row > ? {where} ORDER BY a.row LIMIT ?) AS a
JOIN rows r ON r.id = a.row JOIN questions q ON q.id = r.question JOIN hows h ON h.id = r.how ORDER BY a.row
"""  # the page first: joined whole, PostgreSQL reads every row before it anew for each page


def trace_id(teacher: str, messages: Sequence[Mapping[str, Any]], decoding: Mapping[str, Any], sample: int) -> str:
    """16 hex digits of teacher, messages, decoding parameters and sample index."""
    return _sha256([teacher, list(messages), dict(decoding), sample])[:16]


class TraceIds:
    """`trace_id` for one teacher and decoding: what does not change is hashed once."""

    def __init__(self, teacher: str, decoding: Mapping[str, Any]) -> None:
        self._head = hashlib.sha256(f"[{canonical(teacher)},".encode())
        self._tail = f",{canonical(dict(decoding))},"

    def of(self, messages: str, samples: int) -> list[str]:
        """The ids of samples 0, 1, ... of `messages`, given as `canonical` JSON."""
        question = self._head.copy()
        question.update(f"{messages}{self._tail}".encode())
        found = []
        for sample in range(samples):
            whole = question.copy()
            whole.update(b"%d]" % sample)
            found.append(whole.hexdigest()[:16])
        return found


class TraceStore:
    """Traces in one file: a store's folder or .db file, or an exported .jsonl. Opening it touches nothing; the first
    append makes the file. A folder that holds only traces.jsonl, as older runs do, is that export."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path if path.suffix == ".jsonl" else file_of(path)
        if not self.path.exists() and (path / "traces.jsonl").is_file():
            self.path = path / "traces.jsonl"

    def append(self, traces: Iterable[Trace]) -> int:
        """Store those whose id is new, on disk before this returns; the number stored.

        Safe between processes. Raises DiskFull (the store stays as it was) and UserError for a foreign file.
        """
        if self.path.suffix == ".jsonl":
            raise UserError(f"{self.path} is an export; append to a store (a folder, or a file named .db).")
        store = Store(self.path, create=True, share=True)
        try:
            with store.transaction():
                stored = _insert(store, list(traces))
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk: they are in the journal, which is enough
                store.base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return stored
        finally:
            store.close()

    def read(self) -> list[Trace]:
        """Every committed trace in the order of storing; none when there is no file. Raises UserError."""
        return list(self)

    def __iter__(self) -> Iterator[Trace]:
        """The traces one by one: those of a store with flat memory, an export's read whole."""
        if not self.path.exists():
            return
        if self.path.suffix == ".jsonl":
            yield from _read_jsonl(self.path)
            return
        base = open_file(self.path, create=False, writable=False)
        try:
            for _, trace in stored(base):
                yield trace
        finally:
            base.close()

    def __len__(self) -> int:
        if self.path.suffix == ".jsonl" or not self.path.exists():
            return sum(1 for _ in self)
        base = open_file(self.path, create=False, writable=False)
        try:
            return int(base.execute("SELECT count(*) FROM answers").fetchone()[0])
        finally:
            base.close()

    def digest(self) -> str:
        """12 hex digits of what the traces say, in any order of storing; dates and prices do not count."""
        said = []
        for trace in self:
            row = trace.to_dict()
            said.append(_sha256({key: value for key, value in row.items() if key not in NOT_CONTENT}))
        return _sha256(sorted(said))[:12]


def stored(base: Sql, *, after: int = 0, where: str = "") -> Iterator[tuple[int, Trace]]:
    """(row, trace) of every answer behind row `after`, in order; `where`: a condition on answers `a`, as "AND ..."."""
    statement, hows = _READ.format(where=where), dict[str, dict[str, Any]]()
    while rows := base.execute(statement, (after, CHUNK)).fetchall():
        for row in rows:
            yield row[0], _trace(row, hows)
        after = rows[-1][0]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values are equal text."""
    return _ENCODER.encode(value)


def texts(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(`canonical` JSON, which is ASCII and hashed; the same as UTF-8 text, which is stored and sent)."""
    escaped = _plain(messages) or canonical(messages)
    if "\\u" not in escaped:
        return escaped, escaped
    text = json.dumps(messages, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return (escaped, text) if _encodes(text) else (escaped, escaped)


def _plain(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """`canonical` of messages that are only a role and a text each, in a fifth of its time; None for others."""
    found = []
    for one in messages:
        if len(one) != 2 or type(role := one.get("role")) is not str or type(text := one.get("content")) is not str:
            return None
        found.append(f'{{"content":{_quoted(text)},"role":{_quoted(role)}}}')
    return f"[{','.join(found)}]"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: it stays escaped
        return False
    return True


def _trace(row: Sequence[Any], hows: dict[str, dict[str, Any]]) -> Trace:
    _, trace, sample, fields, messages, ref, problem, finish, tokens_in, tokens_out, pico, date, body, correct = row
    how = hows.get(fields)
    if how is None:
        how = hows[fields] = json.loads(fields)
    kept = json.loads(body)
    behind = json.loads(problem) if problem else {}
    usage = kept["usage"] if "usage" in kept else _usage(kept, tokens_in, tokens_out)
    return Trace(
        id=trace, teacher=how["teacher"], teacher_reported=kept.get("model") or how["teacher"],
        messages=json.loads(messages), thinking=kept.get("thinking"), answer=kept["answer"],
        prompt_ids=kept.get("prompt_ids"), token_ids=kept.get("token_ids"), finish_reason=finish,
        task=kept.get("task", behind.get("task")), problem_id=kept.get("problem_id", behind.get("id") or ref),
        correct=None if correct is None else bool(correct),
        decoding=kept["decoding"] if "decoding" in kept else how["decoding"] | {"sample": sample}, usage=usage,
        cost_usd=kept.get("cost_usd", pico / PICO), licence=how["licence"], date=date,
        source=kept["source"] if "source" in kept else _source(how, kept),
    )  # fmt: skip


def _usage(kept: Mapping[str, Any], tokens_in: int, tokens_out: int) -> dict[str, int]:
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    for name in ("cached", "reasoning"):
        if name in kept:
            usage[f"{name}_tokens"] = kept[name]
    return usage


def _source(how: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: how[key] for key in ("endpoint", "price", "terms", "permission") if how.get(key)}
    found |= {key: kept[key] for key in ("id", "fingerprint", "estimated", "logprobs") if key in kept}
    return found


def _insert(store: Store, traces: Sequence[Trace]) -> int:
    """Append inside a transaction."""
    before = store.base.execute("SELECT count(*) FROM answers").fetchone()[0]
    for trace in traces:
        fields = {"teacher": trace.teacher, "licence": trace.licence, "decoding": {}, "appended": True}
        how = store.how(_sha256(fields), fields)
        escaped, messages = texts(trace.messages)
        digest = question_hash(escaped)
        store.base.execute("INSERT OR IGNORE INTO questions(hash, messages) VALUES (?, ?)", (digest, messages))
        (question,) = store.base.execute("SELECT id FROM questions WHERE hash = ?", (digest,)).fetchone()
        found = store.base.execute(
            "INSERT INTO rows(trace, question, how, sample, state) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (trace) DO NOTHING RETURNING id",
            (trace.id, question, how, int(trace.decoding.get("sample", 0)), ANSWERED),
        ).fetchone()
        if found:
            answer = Answer(
                found[0], trace.finish_reason, trace.usage.get("prompt_tokens", 0),
                trace.usage.get("completion_tokens", 0), round(trace.cost_usd * PICO), trace.date, body_of(trace),
            )  # fmt: skip
            store.base.execute("INSERT INTO answers VALUES (?,?,?,?,?,?,?,?)", (*answer, trace.correct))
    after = store.base.execute("SELECT count(*) FROM answers").fetchone()[0]
    return int(after - before)


def body_of(trace: Trace, *, without: Sequence[str] = ()) -> str:
    """What a row keeps of a whole trace beside the columns."""
    row = trace.to_dict()
    kept = [name for name in _BODY if name not in without]
    return json.dumps({"model": trace.teacher_reported} | {name: row[name] for name in kept})


def question_hash(messages: str) -> str:
    """Of a question's `canonical` messages."""
    return hashlib.sha256(messages.encode()).hexdigest()[:32]


def _read_jsonl(path: Path) -> Iterator[Trace]:
    for number, row in enumerate(read_lines(path, appended=False), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is not a trace; each line of a traces file is one JSON object.")
        try:
            yield _of_chat(row) if "schema" not in row and "messages" in row else Trace.from_dict(row)
        except UserError as error:
            raise UserError(f"{path} line {number}: {error}") from error


def _of_chat(row: dict[str, Any]) -> Trace:
    """A conversation that ends with an answer, as `.chat.jsonl` exports and published data sets of traces hold it: the
    thinking as `reasoning_content`, or in the content's <think> tags. What the row does not say is unknown.
    """
    turns = row["messages"]
    plain = isinstance(turns, list) and all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
    )
    if not plain or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise UserError('"messages" must be turns with role and content (text), a question and then an answer.')
    if not isinstance(turns[-1].get("reasoning_content", ""), str | None):
        raise UserError('"reasoning_content" must be text.')
    said, asked = turns[-1], [{"role": t["role"], "content": t["content"]} for t in turns[:-1]]
    thinking, answer = said.get("reasoning_content"), said["content"]
    if thinking is None and answer.lstrip().startswith("<think>") and "</think>" in answer:
        thinking, _, answer = answer.lstrip().removeprefix("<think>").partition("</think>")
        thinking, answer = thinking.strip(), answer.strip()
    teacher, finish = str(row.get("teacher") or "unknown"), row.get("finish_reason")
    return Trace(
        id=str(row.get("id") or trace_id(teacher, turns, {}, 0)), teacher=teacher, teacher_reported=teacher,
        messages=asked, thinking=thinking, answer=answer, prompt_ids=None, token_ids=None,
        finish_reason=finish if finish in CUT_OFF else "stop",
        task=None, problem_id=None, correct=None, decoding={}, usage={}, cost_usd=0.0,
        licence=str(row.get("licence") or row.get("license") or "unknown"), date="",
    )  # fmt: skip


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


__all__ = ["FILE", "TraceIds", "TraceStore", "canonical", "question_hash", "stored", "texts", "trace_id"]
