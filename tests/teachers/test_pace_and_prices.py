"""How fast to ask, on a clock of the test's own; what a request costs; what the progress line says; keys."""
# ruff: noqa: E501 (tables of cases)

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asked import Server, job, write_questions

from shoestring.cli import main
from shoestring.core.errors import UserError
from shoestring.core.progress import Progress
from shoestring.cost.prices import all_prices
from shoestring.data.claims import Purse
from shoestring.data.traces import TraceStore
from shoestring.teachers._lane import Told
from shoestring.teachers._pace import Pace, seconds_of
from shoestring.teachers._price import pico, rate_of, usd
from shoestring.teachers._session import _shown, run


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_more_for_each_until_the_first_setback_then_one_a_round() -> None:
    clock = Clock()
    pace = Pace(40, start=4, clock=clock)
    for _ in range(6):
        pace.succeeded(clock.now, 10)
    assert pace.limit == 10
    pace.pushed_back(clock.now)
    assert pace.limit == 7.5
    for _ in range(8):  # a round of them
        pace.succeeded(clock.now, 10)
    assert 8.4 < pace.limit < 8.6
    for _ in range(10_000):
        pace.succeeded(clock.now, 10)
    assert pace.limit == 40  # never more than `most`


def test_what_was_under_way_together_is_one_setback() -> None:
    clock = Clock()
    pace = Pace(64, start=64, clock=clock)
    sent, clock.now = clock.now, 101.0
    for _ in range(30):
        pace.pushed_back(sent)
    assert pace.limit == 48 and pace.cuts == 1
    pace.pushed_back(clock.now)
    assert pace.limit == 36
    for _ in range(50):
        clock.now += 1
        pace.pushed_back(clock.now)
    assert pace.limit == 1  # never less


@pytest.mark.parametrize(("seconds", "tokens", "cuts"), [(30.0, 40, 1), (30.0, 400, 0), (7.0, 40, 0)])
def test_answers_four_times_slower_a_token_are_a_setback(seconds: float, tokens: int, cuts: int) -> None:
    """Longer answers that take longer are none."""
    clock = Clock()
    pace = Pace(8, start=8, clock=clock)
    for took, length in ((2.0, 40), (seconds, tokens)):
        sent, clock.now = clock.now, clock.now + took
        for _ in range(8):
            pace.succeeded(sent, length)
    assert pace.cuts == cuts


def test_answers_in_less_than_a_second_are_never_slow() -> None:
    clock = Clock()
    pace = Pace(8, start=8, clock=clock)
    for took in (0.01, 0.9):
        sent, clock.now = clock.now, clock.now + took
        for _ in range(8):
            pace.succeeded(sent, 40)
    assert pace.cuts == 0


def test_limits_of_requests_and_tokens_a_minute() -> None:
    clock = Clock()
    pace = Pace(1000, start=1000, rpm=120, clock=clock)
    admitted = 0
    for _ in range(6000):  # a minute, by hundredths of a second
        admitted += pace.try_enter(10)
        clock.now += 0.01
    assert 116 <= admitted <= 121
    pace, admitted = Pace(1000, start=1000, tpm=60_000, clock=clock), 0
    for _ in range(6000):
        admitted += pace.try_enter(500)
        clock.now += 0.01
    assert 116 <= admitted <= 121


def test_pauses_and_exhausted_headers() -> None:
    clock = Clock()
    pace = Pace(8, start=8, clock=clock)
    pace.heed({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "60s"})
    assert pace.try_enter(1)
    pace.heed({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m30s"})
    pace.pause(5)  # a shorter one changes nothing
    clock.now += 89
    assert not pace.try_enter(1)
    clock.now += 2
    assert pace.try_enter(1) and pace.in_flight == 2


def test_setbacks_of_a_server_slow_the_job_down(server: Server, tmp_path: Path) -> None:
    cuts: list[tuple[int, float]] = []
    asked = job(server, tmp_path, ["!overloaded*1 a", "!busy*1 b", *(f"c {i}" for i in range(20))], most=8, start=8)
    outcome = run(asked, watch=lambda one: cuts.append((one.lanes[0].pace.cuts, one.lanes[0].pace.limit)))
    assert outcome.counts["answered"] == 22 and 1 <= cuts[-1][0] <= 2


def test_seconds_in_headers() -> None:
    for text, seconds in (
        ("2", 2), ("1.5", 1.5), ("6m0s", 360), ("20ms", 0.02), ("1h2m3.5s", 3723.5), ("-3", 0), ("soon", None),
        ("1.2.3s", None), ("..s", None), ("nan", None),
        ("", None), (None, None),
    ):  # fmt: skip
        assert seconds_of(text) == seconds
    now = datetime(2020, 1, 1, tzinfo=UTC)
    later = format_datetime(now + timedelta(seconds=40), usegmt=True)
    assert seconds_of(later, format_datetime(now, usegmt=True)) == 40  # by the server's clock, whatever ours says


# ---- prices ----------------------------------------------------------------------------------------------------------


def test_whole_pico_dollars() -> None:
    rate = rate_of("m", "0.55,2.19,0.14")
    assert rate.cost(1000, 200, 400) == 600 * 550_000 + 400 * 140_000 + 200 * 2_190_000
    assert rate_of("m", "1,2").cost(10, 1, 5) == 12 * 10**6  # cached tokens cost what others do
    assert rate_of("m", "0.000001,0").cost(7, 9) == 7  # a millionth of a dollar a million tokens is exact
    assert rate_of("m", "0.0000015,0").cost(1, 0) == 2  # what is finer is rounded up
    half = rate_of("m", "0.000001,0.000003", discount=50)
    assert (half.cost(2, 0), half.cost(3, 0), half.cost(0, 1)) == (1, 2, 2)
    million = sum(rate_of("m", "0.27,1.1").cost(123, 457) for _ in range(1000))
    assert million == 1000 * (123 * 270_000 + 457 * 1_100_000) and usd(million) == pytest.approx(0.53591)


def test_the_list_s_newest_price() -> None:
    for name in ("deepseek-chat", "deepseek-reasoner", "gpt-4o-mini"):
        known = [p for p in all_prices() if p.model in (name, f"{name} (V3)", f"{name} (R1)")]
        found = rate_of(f"vendor/{name.upper()}", None)
        newest = max(p.date for p in known)
        assert found.date == newest and found.output in [round(p.output * 1e6) for p in known if p.date == newest]
    assert rate_of("anything", None, local=True).cost(10**6, 10**6) == 0
    with pytest.raises(UserError, match=r'no price is known for "deepseek-chatt".*Did you mean'):
        rate_of("deepseek-chatt", None)
    for bad in ("1", "1,2,3,4", "-1,2", "1,x", "nan,1"):
        with pytest.raises(UserError, match=r"IN,OUT|no price"):
            rate_of("m", bad)


def test_budgets_as_written() -> None:
    assert [pico(text) for text in ("20", "$1,000.5", "0.000000000001")] == [20 * 10**12, 1000_500 * 10**9, 1]
    for bad in ("lots", "-1", "nan", "1e9"):
        with pytest.raises(UserError, match="budget"):
            pico(bad)


# ---- what is shown, and whom it is asked ------------------------------------------------------------------------------


def test_the_progress_line() -> None:
    """Answers, tokens, what is spent and will be, the share accepted, errors by kind, requests in flight."""
    out, clock = io.StringIO(), Clock()
    told = Told(answers=50, tokens_in=1000, tokens_out=9000, pico=5 * 10**11, truncated=5)
    told.errors["rate limit"] = 3
    journal = SimpleNamespace(purse=Purse(spent=10**12, doubt=10**10))
    asking: Any = SimpleNamespace(told=told, in_flight=7, journal=journal)
    with Progress(200, title="ask", unit="answers", every_s=0, stream=out, clock=clock) as bar:
        show = _shown(bar, 50, clock)
        show(asking)
        clock.now += 10
        told.answers += 50
        told.tokens_out += 10_000
        told.pico *= 2
        show(asking)
    line = out.getvalue().splitlines()[-1]
    for part in (
        "150/200", "$ 1", "$ at the end 1.5", "$ in doubt 0.01", "accepted 0.95", "in flight 7", "rate limit 3", "1k tokens/s", "answers/s 10",
    ):  # fmt: skip
        assert part in line, (part, line)


@contextmanager
def listening() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that remembers headers and bodies."""
    heard: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            heard.append({"headers": dict(self.headers), "body": body, "path": self.path})
            reply = json.dumps({"model": body["model"], "usage": {"prompt_tokens": 3, "completion_tokens": 2}, "choices": [
                {"message": {"content": "said"}, "finish_reason": "stop"}]}).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_several_teachers_of_a_file_and_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its options; keys from the environment go into the header and nowhere else."""
    monkeypatch.setenv("ONE_KEY", "sk-first-secret")
    monkeypatch.setenv("OTHER_KEY", "sk-second-secret")
    write_questions(tmp_path / "q.jsonl", [f"question {i}" for i in range(40)])
    with listening() as (url, heard):
        (tmp_path / "teachers.yaml").write_text(
            f"- {{url: {url}, model: one, key: ONE_KEY, weight: 3, price: '1,2'}}\n"
            f"- {{url: {url}, model: other, key: OTHER_KEY, price: '0.5,1', licence: MIT, max_tokens: 9}}\n"
        )
        line = ["ask", "--teachers", str(tmp_path / "teachers.yaml"), "--questions", str(tmp_path / "q.jsonl"), "--out",
                str(tmp_path / "traces"), "--budget", "1", "--temperature", "0.6", "--seed", "5", "--quiet", "--json"]  # fmt: skip
        assert main(line) == 0
    keys = {one["body"]["model"]: one["headers"]["Authorization"] for one in heard}
    assert keys == {"one": "Bearer sk-first-secret", "other": "Bearer sk-second-secret"}
    assert {(one["body"]["model"], one["body"]["max_tokens"]) for one in heard} == {("one", 4096), ("other", 9)}
    assert all(one["path"] == "/v1/chat/completions" and one["body"]["seed"] == 5 for one in heard)
    traces = TraceStore(tmp_path / "traces").read()
    counts = [sum(trace.teacher.startswith(name) for trace in traces) for name in ("one", "other")]
    assert sum(counts) == 40 and counts[0] > 20 > counts[1] > 2
    assert {trace.licence for trace in traces} == {"unknown", "MIT"}
    assert {round(trace.cost_usd * 1e12) for trace in traces} == {7 * 10**6, 35 * 10**5}
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"-secret" not in path.read_bytes(), path
