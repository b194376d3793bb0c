"""A batch API that misbehaves: no answer that was written is lost or bought twice, and every end is a sentence."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from asked import Server, job
from test_ask import texts

from shoestring.core.errors import UserError
from shoestring.data.store import Store
from shoestring.data.traces import TraceStore
from shoestring.teachers import _remote
from shoestring.teachers._batch import run_batch


class Provider(BaseHTTPRequestHandler):
    """A provider of files and batches; `faults` say what goes wrong, by the name of a call."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    batches: list[dict[str, Any]] = []
    made: list[str] = []  # questions that were answered, one for each time
    calls: Counter[str] = Counter()
    faults: dict[str, Any] = {}

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/files":
            start = body.index(b"\r\n\r\n", body.index(b"filename=")) + 4
            self._answer("upload", lambda: self._keep(body[start : body.index(b"\r\n--", start)]))
        else:
            self._answer("create", lambda: self._make(json.loads(body)))

    def do_GET(self) -> None:
        path, _, query = self.path.removeprefix("/v1/").partition("?")
        if path == "batches":
            self._answer("list", lambda: self._page(query))
        elif path.startswith("batches/"):
            self._answer("look", lambda: next(b for b in self.batches if b["id"] == path.split("/")[1]))
        else:
            self._answer("download", lambda: self.files[path.split("/")[1]])

    def _answer(self, name: str, work: Callable[[], Any]) -> None:
        self.calls[name] += 1
        fault = self.faults.get(name)
        if callable(fault):
            fault = fault(self.calls[name])
        found = b"" if fault in (503, "redirect") else work()
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        if fault == "lost":  # it was done, and nobody hears of it
            self.connection.close()
            self.close_connection = True
            return
        if isinstance(fault, bytes):
            data = fault
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "half" else data)
        self.close_connection = fault == "half"

    def _keep(self, data: bytes) -> dict[str, str]:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return {"id": name}

    def _page(self, query: str) -> dict[str, Any]:
        """Newest first, two a page."""
        rows = self.batches[::-1]
        after = dict(part.split("=") for part in query.split("&")).get("after")
        start = 1 + [row["id"] for row in rows].index(after) if after else 0
        return {"data": rows[start : start + 2], "has_more": start + 2 < len(rows)}

    def _make(self, asked: dict[str, Any]) -> dict[str, Any]:
        good, bad = [], []
        for line in self.files[asked["input_file_id"]].splitlines():
            row = json.loads(line)
            said = row["body"]["messages"][-1]["content"]
            self.made.append(said)
            good.append(answer(row["custom_id"], f"answer to {said}"))
        good, bad, status = self.faults.get("results", lambda good, bad: (good, bad, "completed"))(good, bad)
        batch = {**asked, "id": f"batch-{len(self.batches)}", "status": status}
        for field, rows in (("output_file_id", good), ("error_file_id", bad)):
            if rows:
                text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
                batch[field] = self._keep(text.encode())["id"]
        self.batches.append(batch | self.faults.get("batch", {}))
        return batch


def answer(trace: str, text: str) -> dict[str, Any]:
    body = {
        "id": "c", "model": "m", "choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 15, "completion_tokens": 40},
    }  # fmt: skip
    return {"custom_id": trace, "response": {"status_code": 200, "body": body}}


def failure(row: dict[str, Any], status: Any = 500) -> dict[str, Any]:
    return {"custom_id": row["custom_id"], "response": {"status_code": status, "body": {"error": {"message": "no"}}}}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("files", "batches", "made", "calls", "faults"):
        monkeypatch.setattr(Provider, name, type(getattr(Provider, name))())
    running = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    found = Server.__new__(Server)  # only its address is asked for
    found.url = f"http://127.0.0.1:{running.server_address[1]}/v1"
    yield found
    running.shutdown()
    running.server_close()


def ask(provider: Server, folder: Path, count: int = 12) -> dict[str, Any]:
    """What a session reports, and what is in the store."""
    outcome = run_batch(job(provider, folder, texts(count)), poll_s=0.005)
    answers = {trace.messages[-1]["content"]: trace.answer for trace in TraceStore(folder / "traces")}
    return outcome.report() | {"answers": answers, "purse": outcome.purse}


def whole(found: dict[str, Any], count: int = 12) -> bool:
    return bool(found["answers"] == {text: f"answer to {text}" for text in texts(count)})


def first_three_gone(good: list[Any], bad: list[Any]) -> tuple[list[Any], list[Any], str]:
    return (good[3:], bad, "expired") if len(good) == 12 else (good, bad, "completed")


def in_both_files(good: list[Any], bad: list[Any]) -> tuple[list[Any], list[Any], str]:
    return good, [failure(row) for row in good], "completed"


def twice_and_other_ids(good: list[Any], bad: list[Any]) -> tuple[list[Any], list[Any], str]:
    again = [answer(row["custom_id"], "another answer") for row in good]
    failed = [failure(row) for row in good]
    return [*failed, answer("nobody", "x"), {"custom_id": None}, {}, *good, *again, *failed], bad, "completed"


@pytest.mark.parametrize("results", [in_both_files, twice_and_other_ids])
def test_an_answer_goes_before_a_failure_and_before_a_second_answer(
    provider: Server, tmp_path: Path, results: Any
) -> None:
    Provider.faults["results"] = results
    found = ask(provider, tmp_path)
    assert whole(found) and len(Provider.made) == 12 and not found["errors"]


def test_an_expired_batch_keeps_what_it_has_and_asks_for_the_rest(provider: Server, tmp_path: Path) -> None:
    Provider.faults["results"] = first_three_gone
    found = ask(provider, tmp_path)
    assert whole(found) and found["errors"] == {"expired": 3}
    assert sorted(Provider.made) == sorted([*texts(12), *texts(3)]) and found["purse"].doubts == 0


def test_expired_rows_as_openai_writes_them(provider: Server, tmp_path: Path) -> None:
    def expired(good: list[Any], bad: list[Any]) -> tuple[list[Any], list[Any], str]:
        if len(good) < 12:
            return good, bad, "completed"
        error = {"code": "batch_expired", "message": "This request could not be executed."}
        return good[3:], [{"custom_id": r["custom_id"], "response": None, "error": error} for r in good[:3]], "expired"

    Provider.faults["results"] = expired
    found = ask(provider, tmp_path)
    assert whole(found) and found["errors"] == {"expired": 3}


@pytest.mark.parametrize("line", ["{half\n", "[1, 2]\n", "\x00\xff\n", "[" * 10_000 + "\n", '"x"\n', "null\n"])
def test_a_broken_line_costs_its_own_row_alone(provider: Server, tmp_path: Path, line: str) -> None:
    """Whose it was cannot be known: the row without an answer is in doubt, and asked once more."""

    def broken(good: list[Any], bad: list[Any]) -> tuple[list[Any], list[Any], str]:
        return ([line, *good[1:]] if len(good) == 12 else good), bad, "completed"

    Provider.faults["results"] = broken
    found = ask(provider, tmp_path)
    assert whole(found) and len(Provider.made) == 13
    assert found["errors"] == {"not JSON": 1} and found["purse"].doubts == 1


def test_rows_of_another_shape(provider: Server, tmp_path: Path) -> None:
    """They fail, after a few tries, and the others are kept."""
    statuses = ["500", "abc", None, -1, 10**30, [], {"a": 1}]
    shapes = [(status, body) for status in statuses for body in (None, [], "words", {"error": "words"})]

    def odd(good: list[Any], bad: list[Any]) -> tuple[list[Any], list[Any], str]:
        odd_ones = {row["custom_id"]: shape for row, shape in zip(good[:-1], shapes, strict=False)}
        failed = [
            {"custom_id": name, "response": {"status_code": status, "body": body}, "error": body}
            for name, (status, body) in odd_ones.items()
        ]
        return good[-1:] if len(good) == 1 + len(shapes) else [], failed, "completed"

    Provider.faults["results"] = odd
    found = ask(provider, tmp_path, 1 + len(shapes))
    assert (found["answered"], found["failed"]) == (1, len(shapes)) and len(Provider.batches) <= 6


@pytest.mark.parametrize("call", ["list", "upload", "create", "look", "download"])
@pytest.mark.parametrize("fault", [503, "half", "lost", b"<html>"])
def test_each_call_may_fail_for_a_while(provider: Server, tmp_path: Path, call: str, fault: Any) -> None:
    """Made or not made when the connection was lost: the batch is made once, its answers are bought once."""
    Provider.faults[call] = lambda count: fault if count <= 2 else None
    if call == "download" and fault == b"<html>":  # a page that says 200: lines that are none
        Provider.faults[call] = None
    found = ask(provider, tmp_path)
    assert whole(found) and len(Provider.batches) == 1 and len(Provider.made) == 12
    assert found["purse"].doubts == found["purse"].reserved == 0


@pytest.mark.parametrize("call", ["list", "upload", "create", "download"])
def test_a_call_that_always_fails_ends_in_a_sentence_and_goes_on_later(
    provider: Server, tmp_path: Path, call: str
) -> None:
    Provider.faults[call] = 503
    with pytest.raises(UserError, match=r"^t: server error: [^\n]*503[^\n]*$"):
        ask(provider, tmp_path)
    store = Store(tmp_path / "traces")
    assert store.counts()["sent"] == 12 and store.read_purse().spent == 0
    store.close()
    Provider.faults.clear()
    assert whole(ask(provider, tmp_path)) and len(Provider.made) == 12


class Clock:
    """Twenty minutes later at every look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1200
        return self.now


@pytest.mark.parametrize("fault", [503, "lost", b"<html>"])
def test_a_provider_that_is_gone_is_not_waited_for_for_ever(
    provider: Server, tmp_path: Path, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour is given it, of silence; the same command collects what was made and paid for."""
    monkeypatch.setattr(_remote, "monotonic", Clock())
    Provider.faults["look"] = fault
    with pytest.raises(
        UserError, match=r"^t: no answer: [^\n]* of batch-0 for 80 minutes [^\n]*the same command goes on"
    ):
        ask(provider, tmp_path)
    assert Provider.calls["look"] in (4, 8)  # a lost connection is tried twice by the client itself
    store = Store(tmp_path / "traces")
    assert store.counts()["sent"] == 12
    store.close()
    Provider.faults.clear()
    assert whole(ask(provider, tmp_path)) and len(Provider.made) == 12 and len(Provider.batches) == 1


@pytest.mark.parametrize("answer", [429, json.dumps({"id": "batch-0", "status": "in_progress"}).encode()])
def test_a_batch_may_take_a_day_while_its_provider_answers(
    provider: Server, tmp_path: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty-four looks with two failures between answers: thirty hours, and never an hour of silence."""
    clock = Clock()
    monkeypatch.setattr(_remote, "monotonic", clock)
    Provider.faults["look"] = lambda count: None if count > 72 else answer if count % 3 == 0 else 503
    assert whole(ask(provider, tmp_path)) and clock.now > 24 * 3600


def test_the_patience_with_a_batch_can_be_told(
    provider: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_remote, "monotonic", Clock())
    Provider.faults["look"] = 503
    with pytest.raises(UserError, match="for 20 minutes"):
        run_batch(job(provider, tmp_path, texts(2), patience_s=600), poll_s=0.005)


def test_a_batch_is_found_behind_many_others(provider: Server, tmp_path: Path) -> None:
    """Made, and the note of it lost in a crash; meanwhile the account made others, more than a page of them."""
    Provider.faults["look"] = 400
    with pytest.raises(UserError, match="bad request"):
        ask(provider, tmp_path)
    store = Store(tmp_path / "traces")
    store.sql.execute("UPDATE batches SET remote = NULL")
    store.close()
    Provider.batches += [{"id": f"theirs-{i}", "status": "completed", "metadata": None} for i in range(7)]
    Provider.faults.clear()
    assert whole(ask(provider, tmp_path)) and len(Provider.made) == 12 and Provider.calls["create"] == 1


def test_half_collected_and_killed(provider: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before the end came is kept, and of the rest nothing is bought again."""
    monkeypatch.setattr(_remote, "TOGETHER", 4)
    real, calls = _remote._row, []

    def dies(line: bytes) -> Any:
        calls.append(line)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(line)

    with monkeypatch.context() as patch:
        patch.setattr(_remote, "_row", dies)
        patch.setattr(_remote.aiohttp.StreamReader, "iter_any", line_by_line)
        with pytest.raises(KeyboardInterrupt):
            ask(provider, tmp_path)
    assert len(list(TraceStore(tmp_path / "traces"))) == 4
    found = ask(provider, tmp_path)
    assert whole(found) and found["answers_now"] == 8 and len(Provider.made) == 12


async def line_by_line(content: Any) -> Any:
    """The body of a reply as a slow network gives it."""
    body = await content.read()
    for line in body.splitlines(keepends=True):
        yield line


def test_answers_larger_than_memory_should_hold_at_once(
    provider: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 MB of answers are settled a few at a time; a row beyond all bounds fails alone, and the job says so."""
    monkeypatch.setattr(_remote, "TOGETHER_BYTES", 1 << 20)
    monkeypatch.setattr(_remote, "LARGEST_LINE", 8 << 20)
    seen: list[int] = []
    real = _remote.Remote.results

    async def watched(self: Any, file: Any) -> Any:
        async for rows in real(self, file):
            seen.append(len(rows))
            yield rows

    def large(good: list[Any], bad: list[Any]) -> tuple[list[Any], list[Any], str]:
        for row in good:
            row["response"]["body"]["choices"][0]["message"]["content"] = "word " * 10**6
        return good, bad, "completed"

    monkeypatch.setattr("shoestring.teachers._batch.Remote.results", watched)
    Provider.faults["results"] = large
    found = ask(provider, tmp_path)
    assert {len(text) for text in found["answers"].values()} == {5 * 10**6 - 1, 5 * 10**6} or found["answered"] == 12
    assert max(seen) <= 2 and sum(seen) == 12


def test_a_refused_batch_says_why(provider: Server, tmp_path: Path) -> None:
    for errors in ({"data": [{"message": "no such model"}]}, {"data": "odd"}, None, []):
        Provider.faults["batch"] = {"status": "failed", "errors": errors, "output_file_id": None}
        with pytest.raises(UserError, match=r"refused the batch: (no such model|no reason given)\."):
            ask(provider, tmp_path)
