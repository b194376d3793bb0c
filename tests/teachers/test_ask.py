"""Asking: only what is missing, within the budget, at the pace the server bears, and what bad replies come to."""

# ruff: noqa: E501 (tables of cases)
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from asked import ENVIRONMENT, Server, job, write_questions
from stub_api import said

from shoestring.core.errors import UserError
from shoestring.data.claims import Budget
from shoestring.data.questions import Skipped, source_of
from shoestring.data.store import Store
from shoestring.data.traces import TraceStore
from shoestring.teachers._accept import Acceptance
from shoestring.teachers._ask import Asking
from shoestring.teachers._job import Api
from shoestring.teachers._session import Job, run

ONE = 15 * 10**6 + 5 * 500_000 + 40 * 2 * 10**6  # pico-dollars of one of the stub's answers at 1, 2 and 0.5 $/M


def texts(n: int) -> list[str]:
    return [f"question {i}" for i in range(n)]


def test_answers_with_their_provenance(server: Server, tmp_path: Path) -> None:
    outcome = run(
        job(server, tmp_path, ["!deepseek hm", "!vllm hm", "世界 é"], decoding={"temperature": 0.6, "seed": 7})
    )
    assert outcome.counts == {"planned": 0, "sent": 0, "answered": 3, "failed": 0}
    first, second, third = TraceStore(tmp_path / "traces")
    assert (first.thinking, second.thinking, third.thinking) == (
        "thinking of !deepseek hm",
        "thinking of !vllm hm",
        None,
    )
    assert third.answer == said("世界 é", 7) and third.messages == [{"role": "user", "content": "世界 é"}]
    assert (third.teacher, third.teacher_reported, third.finish_reason, third.licence) == ("t", "m", "stop", "unknown")
    assert third.decoding == {"temperature": 0.6, "seed": 7, "max_tokens": 50, "sample": 0}
    assert third.usage == {"prompt_tokens": 20, "completion_tokens": 40, "cached_tokens": 5}
    assert third.cost_usd == pytest.approx(ONE / 1e12, rel=1e-12)
    assert third.source["endpoint"] == f"{server.url}/chat/completions" and third.source["id"] == "chatcmpl-1"
    assert third.source["fingerprint"] == "fp_1" and third.source["price"]["output"] == 2 * 10**6
    assert third.date.endswith("+00:00") and third.problem_id == "2"
    assert outcome.purse.spent == 3 * ONE and outcome.report()["spent_usd"] == pytest.approx(3 * ONE / 1e12)


def test_only_what_is_missing_is_asked(server: Server, tmp_path: Path) -> None:
    """Rows added, another order, more samples: the missing ones. Another prompt, parameter or teacher: anew."""
    first = job(server, tmp_path, texts(10), decoding={"seed": 1})
    run(first)
    assert server.stats()["billed"] == 10
    run(first)
    assert server.stats()["billed"] == 10
    run(job(server, tmp_path, texts(12)[::-1], decoding={"seed": 1}))
    assert server.stats()["billed"] == 12
    run(job(server, tmp_path, texts(12), decoding={"seed": 1}, samples=3))
    assert server.stats()["billed"] == 36 and server.stats()["most_of_one"] == 1  # each sample has a seed of its own
    run(job(server, tmp_path, texts(12), decoding={"seed": 2}))
    assert server.stats()["billed"] == 48
    write_questions(tmp_path / "q.jsonl", texts(12), system="be brief")
    run(job(server, tmp_path, None, decoding={"seed": 2}))
    assert server.stats()["billed"] == 60
    run(job(server, tmp_path, texts(12), decoding={"seed": 2}, name="another"))
    assert server.stats()["billed"] == 72
    assert len({trace.id for trace in TraceStore(tmp_path / "traces")}) == 72


def test_another_price_or_licence_asks_what_is_missing(server: Server, tmp_path: Path) -> None:
    """They are no part of what is asked: nothing is asked twice, and what is still open is billed by the new one."""
    run(job(server, tmp_path, texts(20), budget=Budget(answers=5)))
    outcome = run(job(server, tmp_path, price="2,4,1", licence="MIT"))
    assert outcome.counts["answered"] == 20 == server.stats()["billed"]
    assert outcome.purse.spent == 5 * ONE + 15 * 2 * ONE
    traces = TraceStore(tmp_path / "traces").read()
    assert [t.licence for t in traces] == ["unknown"] * 5 + ["MIT"] * 15 and traces[5].source["price"][
        "input"
    ] == 2 * 10**6


def test_fewer_questions_or_samples_leave_the_others_alone(server: Server, tmp_path: Path) -> None:
    """What an earlier, larger command planned is not asked by a smaller one."""
    stopped = job(server, tmp_path, texts(20), samples=2, budget=Budget(answers=5))
    assert run(stopped).counts == {"planned": 35, "sent": 0, "answered": 5, "failed": 0}
    run(job(server, tmp_path, texts(4)))
    answers = list(TraceStore(tmp_path / "traces"))
    assert {t.messages[-1]["content"] for t in answers} >= set(texts(4)) and len(answers) < 5 + 4
    before = len(answers)
    run(replace(stopped, budget=Budget(answers=40)))  # and the larger one still asks all of its own
    assert len(TraceStore(tmp_path / "traces")) == 40 > before


@pytest.mark.parametrize("most", [1, 7, 64])
def test_a_budget_is_never_exceeded(server: Server, tmp_path: Path, most: int) -> None:
    """The worst case of everything in flight included; and it is used up as far as that allows."""
    worst = (len('[{"content":"question 10","role":"user"}]') + 64) * 10**6 + 50 * 2 * 10**6
    for limit in (0, worst - 1, worst, 12 * ONE + worst, 10 * worst):
        spent = []
        asked = job(server, tmp_path, texts(90), most=most, budget=Budget(limit))
        outcome = run(asked, watch=lambda a, s=spent: s.append(a.journal.purse))  # type: ignore[misc]
        assert all(p.spent + p.reserved + p.doubt <= limit for p in spent)
        assert outcome.purse.spent <= limit
        assert outcome.told.stopped and "budget" in outcome.told.stopped
        assert limit - outcome.purse.spent < worst or limit < worst  # not a question less than it allows
    assert run(replace(asked, budget=Budget(200 * worst))).counts["answered"] == 90


def test_budgets_of_tokens_and_answers(server: Server, tmp_path: Path) -> None:
    assert run(job(server, tmp_path, texts(50), budget=Budget(answers=17))).counts["answered"] == 17
    outcome = run(job(server, tmp_path, texts(50), budget=Budget(tokens=3000)))
    assert 3000 - 200 < outcome.purse.tokens <= 3000


def test_a_paid_teacher_needs_a_budget_and_a_price(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--budget"):
        run(job(server, tmp_path, texts(1), budget=Budget()))
    with pytest.raises(UserError, match=r'no price is known for "mm"'):
        run(job(server, tmp_path, texts(1), apis=[Api("https://api.example.com/v1", "mm")]))
    run(job(server, tmp_path, texts(1), price=None, budget=Budget()))  # a server on this machine is free


def test_terms_that_forbid_need_permission(server: Server, tmp_path: Path) -> None:
    api = Api(server.url, "gpt-4o-mini")
    with pytest.raises(UserError, match="terms of gpt-4o-mini forbid"):
        run(job(server, tmp_path, texts(1), apis=[api]))
    run(job(server, tmp_path, texts(1), apis=[replace(api, permission="contract 12")]))
    (trace,) = TraceStore(tmp_path / "traces")
    assert trace.source["permission"] == "contract 12" and trace.source["terms"] == "forbid competing models"


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("html", "not JSON"), ("nothing", "empty reply"), ("half", "not JSON"), ("error200", "error in the reply"),
        ("emptytext", "empty reply"), ("overloaded", "server error"), ("reset", "connection lost"),
    ],
)  # fmt: skip
def test_bad_replies_are_asked_again_a_few_times(
    server: Server, tmp_path: Path, word: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice bad: the third is kept. Always bad: the row fails after its tries, the others are answered."""
    monkeypatch.setattr("shoestring.teachers._ask.Asking._backoff", lambda self, attempts: 0.01)
    outcome = run(job(server, tmp_path, [f"!{word}*2 a", f"!{word} b", "c"], tries=3, most=1))
    assert outcome.counts == {"planned": 0, "sent": 0, "answered": 2, "failed": 1}
    assert outcome.told.errors[kind] == 5
    assert outcome.purse.doubts == (0 if word == "overloaded" else 5)  # perhaps billed, and said so
    asked = server.stats()["requests"]
    run(job(server, tmp_path, None, tries=3))
    assert server.stats()["requests"] == asked  # a row that failed is not asked again
    run(job(server, tmp_path, None, tries=3, retry_failed=True))  # unless told to
    assert server.stats()["requests"] == asked + 3


def test_what_the_server_refuses_fails_at_once(server: Server, tmp_path: Path) -> None:
    outcome = run(job(server, tmp_path, ["a", "!badrequest b", "c"], most=1))
    assert outcome.counts["failed"] == 1 and outcome.counts["answered"] == 2
    assert server.stats()["requests"] == 3
    assert outcome.troubles["bad request"] == (1, "HTTP 400, no such parameter")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("badkey", "Incorrect API key"), ("nocredit", "Insufficient Balance"), ("quota", "exceeded your quota"),
        ("redirect", "redirects to https://elsewhere.example/v1"),
    ],
)  # fmt: skip
def test_some_replies_stop_the_job(server: Server, tmp_path: Path, word: str, message: str) -> None:
    outcome = run(job(server, tmp_path, ["a", f"!{word} b", *texts(20)], most=1))
    assert outcome.told.stopped and message in outcome.told.stopped and outcome.told.mistake
    assert server.stats()["requests"] == 2
    assert outcome.counts == {"planned": 21, "sent": 0, "answered": 1, "failed": 0}


def test_a_model_that_does_not_exist_stops_the_job(server: Server, tmp_path: Path) -> None:
    outcome = run(job(server, tmp_path, [f"!notfound {i}" for i in range(30)], most=1))
    assert outcome.told.stopped and "refuses every question" in outcome.told.stopped
    assert server.stats()["requests"] == 5


def test_a_server_that_is_not_there(server: Server, tmp_path: Path) -> None:
    server.close()
    outcome = run(job(server, tmp_path, texts(3), patience_s=0.5))
    assert outcome.told.stopped and "is the server running?" in outcome.told.stopped and outcome.told.mistake
    assert outcome.purse.doubts == 0  # nothing was sent
    assert outcome.counts["planned"] == 3


def test_rate_limits_are_heeded(server: Server, tmp_path: Path) -> None:
    """A 429 costs no attempt, and all sending pauses for as long as Retry-After says."""
    started = time.monotonic()
    outcome = run(job(server, tmp_path, ["!busy*3 a", *texts(5)], most=2, tries=1))
    assert outcome.counts["answered"] == 6 and outcome.told.errors["rate limit"] == 3
    assert time.monotonic() - started >= 0.6
    started = time.monotonic()
    run(job(server, tmp_path, ["!exhausted b", *(f"more {i}" for i in range(5))], most=1))
    assert time.monotonic() - started >= 0.3


def test_requests_a_minute(server: Server, tmp_path: Path) -> None:
    started = time.monotonic()
    run(job(server, tmp_path, texts(6), rpm=600))
    assert 0.5 <= time.monotonic() - started < 30  # half a minute on the busiest machine, and never a whole one


def test_truncated_answers_are_kept_and_never_bought_again(server: Server, tmp_path: Path) -> None:
    asked = job(server, tmp_path, ["!length a", "!filtered b"])
    outcome = run(asked)
    run(asked)
    first, second = TraceStore(tmp_path / "traces")
    assert (first.finish_reason, first.answer, first.thinking) == ("length", "", "cut off inside")
    assert second.finish_reason == "content_filter"
    assert server.stats()["requests"] == 2 and outcome.told.truncated == 1 and outcome.told.filtered == 1


def test_wrong_token_counts_are_billed_at_their_worst(server: Server, tmp_path: Path) -> None:
    outcome = run(
        job(server, tmp_path, ["!wrongcounts a", "!nocounts b", "!hugecounts c"], most=1, budget=Budget(10**15))
    )
    first, second, third = TraceStore(tmp_path / "traces")
    assert first.usage["completion_tokens"] == second.usage["completion_tokens"] == 50
    assert first.source["estimated"] and outcome.told.estimated == 2
    assert third.usage["completion_tokens"] == 10_000_000 and outcome.told.over_estimate == 1


def test_another_model_is_told(server: Server, tmp_path: Path) -> None:
    outcome = run(job(server, tmp_path, ["!other a", "b"]))
    assert outcome.told.other_models == {"another-model": 1}
    assert next(iter(TraceStore(tmp_path / "traces"))).teacher_reported == "another-model"


@pytest.mark.parametrize("word", ["endless", "blanks", "hang"])
def test_a_reply_without_end_is_cut_off(server: Server, tmp_path: Path, word: str) -> None:
    from shoestring.teachers._send import Limits

    limits = Limits(total_s=100 if word == "endless" else 2, idle_s=0.3, largest=4 << 20)
    outcome = run(job(server, tmp_path, [f"!{word} a"], tries=1, limits=limits))
    assert outcome.counts["failed"] == 1 and outcome.purse.doubts == 1
    assert outcome.told.errors == {"endless reply" if word == "endless" else "timeout": 1}
    outcome = run(job(server, tmp_path, [f"!{word} a", "b"], tries=1))
    assert outcome.counts["answered"] == 1 and outcome.counts["failed"] == 1 and not outcome.told.errors


def test_streams(server: Server, tmp_path: Path) -> None:
    outcome = run(job(server, tmp_path, ["!deepseek a", "b", "!broken*9 c", "!half*1 d"], stream=True, tries=2,
                      most=1))  # fmt: skip
    found = {trace.messages[0]["content"]: trace for trace in TraceStore(tmp_path / "traces")}
    assert found["!deepseek a"].thinking == "thinking of !deepseek a"
    assert found["b"].answer == said("b", None) and found["b"].usage["completion_tokens"] == 40
    assert "!broken*9 c" not in found and outcome.told.errors["broken stream"] == 2 + 1
    assert found["!half*1 d"].answer == said("!half*1 d", None)


def test_several_samples_in_one_request(server: Server, tmp_path: Path) -> None:
    outcome = run(job(server, tmp_path, texts(4), samples=3, n=3))
    assert server.stats()["requests"] == 4 and outcome.counts["answered"] == 12
    answers = {(t.messages[0]["content"], t.decoding["sample"]): t for t in TraceStore(tmp_path / "traces")}
    assert answers["question 2", 1].answer == said("question 2", None, 1)
    assert sum(t.usage["completion_tokens"] for t in answers.values()) == 480
    assert outcome.purse.spent == 4 * (15 * 10**6 + 5 * 500_000 + 120 * 2 * 10**6)


def test_a_server_that_ignores_n(server: Server, tmp_path: Path) -> None:
    outcome = run(job(server, tmp_path, ["!onechoice a"], samples=3, n=3))
    assert outcome.counts["answered"] == 3 and server.stats()["requests"] == 3


def test_several_teachers_with_weights(start: Callable[..., Server], tmp_path: Path) -> None:
    one, two = start(), start()
    asked = job(one, tmp_path, texts(300))
    apis = [replace(asked.apis[0], name="one"), replace(asked.apis[0], name="two", url=two.url, weight=2.0)]
    run(replace(asked, apis=apis))
    run(replace(asked, apis=apis))
    assert one.stats()["billed"] + two.stats()["billed"] == 300
    assert 70 <= one.stats()["billed"] <= 130
    assert {t.teacher for t in TraceStore(tmp_path / "traces")} == {"one", "two"}


def test_a_dry_run_asks_twenty_and_prices_the_rest(server: Server, tmp_path: Path) -> None:
    asked = job(server, tmp_path, texts(400))
    outcome = run(replace(asked, pilot=True))
    assert server.stats()["billed"] == 20 == outcome.counts["answered"]
    assert outcome.forecast is not None and outcome.forecast["usd"] == pytest.approx(400 * ONE / 1e12)
    places = sorted(int(t.messages[0]["content"].split()[1]) for t in TraceStore(tmp_path / "traces"))
    assert places[0] < 40 and places[-1] > 350  # spread over the job
    run(replace(asked, pilot=True))
    assert server.stats()["billed"] == 20
    run(asked)
    assert server.stats()["billed"] == 400  # what the pilot asked is not asked again


def test_two_processes_on_one_store(start: Callable[..., Server], tmp_path: Path) -> None:
    """The second is refused, or both share the work."""
    server = start("--latency", "0.02", "--hold-after", "40")  # nobody is done before all have begun
    write_questions(tmp_path / "q.jsonl", texts(600))

    def begin(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "shoestring.cli", "ask", "--teacher", server.url, "--model", "m", "--questions",
                   str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "traces"), "--concurrency", "4", "--quiet", *more]  # fmt: skip
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = begin("--share")
    server.asked(44)  # the first one's four wait
    second, refused = begin("--share"), begin()
    out, err = refused.communicate(timeout=200)
    assert refused.returncode == 2 and "Another process is asking" in err and not out
    server.asked(48)
    server.release()
    found = [process.communicate(timeout=200) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], found
    assert server.stats()["billed"] == server.stats()["questions"] == 600
    assert all(int(out.split(" answers now")[0].splitlines()[-1].replace(",", "")) >= 4 for out, _ in found), found


def test_ctrl_c_keeps_what_is_in_flight(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start("--latency", "0.3")
    write_questions(tmp_path / "q.jsonl", texts(5000))
    command = [sys.executable, "-m", "shoestring.cli", "ask", "--teacher", server.url, "--model", "m", "--questions",
               str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "traces"), "--quiet", "--json"]  # fmt: skip
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server.asked(10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "interrupted" in err and "Traceback" not in err
    report = json.loads(out)
    assert report["answered"] == server.stats()["billed"] > 0 and report["in_doubt_rows"] == 0 and report["sent"] == 0


def test_a_clock_that_jumps_changes_nothing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    jumps = iter([0.0, 1e6, -1e6] * 10_000)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    outcome = run(job(server, tmp_path, ["!busy*2 a", *texts(50)]))
    assert outcome.counts["answered"] == 51


def test_a_full_disk_keeps_what_came(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space kept aside holds the answers in flight; nothing more is sent, and afterwards it goes on."""
    from shoestring.core.atomic import DiskFull
    from shoestring.data import commits

    server = start("--latency", "0.05", "--hold-after", "200")
    asked = job(server, tmp_path, texts(400), most=8)
    freed = Path.unlink

    def cramp(asking: object) -> None:
        store = asking.store  # type: ignore[attr-defined]
        pages = store.base.execute("PRAGMA page_count").fetchone()[0]
        store.base.execute(f"PRAGMA max_page_count = {pages}")
        monkeypatch.setattr(commits.Path, "unlink", lambda path, **o: (
            store.base.execute("PRAGMA max_page_count = 1000000") if path.name.endswith(".ballast") else None,
            freed(path, **o))[1])  # fmt: skip
        server.release()

    with pytest.raises(DiskFull, match="No space left"):
        run(asked, watch=cramp)
    monkeypatch.undo()
    store = Store(tmp_path / "traces")
    counts = store.counts()
    store.close()
    assert counts["answered"] == server.stats()["billed"] > 0 and counts["sent"] == 0
    assert run(asked).counts["answered"] == 400 == server.stats()["billed"]


def test_the_page(server: Server, tmp_path: Path) -> None:
    from shoestring.report.asked import write_asked

    run(job(server, tmp_path, [*texts(30), "!length a", "!badrequest b", "<script>alert(1)</script>"]))
    store = Store(tmp_path / "traces")
    page = write_asked(store, tmp_path / "summary.html").read_text()
    store.close()
    assert "<b>32</b><span>answers" in page and "31 stop" in page and "1 length" in page
    assert "bad request (last: HTTP 400, no such parameter)" in page
    assert "<script" not in page and "&lt;script&gt;" in page and "http://" not in page.replace(server.url, "")
    empty = Store(tmp_path / "empty", create=True)
    assert "0</b><span>answers" in write_asked(empty, tmp_path / "empty.html").read_text()
    empty.close()


def test_questions_that_are_not(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "q.jsonl"

    def read(skipped: Skipped | None = None) -> list[str]:
        return [asked.messages[-1]["content"] for asked in source_of(str(path), skipped=skipped)[0]()]

    for bad, message in (
        (b"{oops\n", "line 2 is not JSON"), (b"[1]\n", "line 2 is no JSON object"), (b'{"a": 1}\n', "line 2 has no messages"),
        (b'"\xff"\n', "line 2 is not UTF-8"), (b'{"messages": [{"role": "me"}]}\n', "line 2 has messages"),
        (b'{"question": "' + b"x" * 10_000_000 + b'"}\n', "line 2 is longer than"),
    ):  # fmt: skip
        path.write_bytes(b'{"question": "a"}\n' + bad + b'{"question": "b"}\n')
        with pytest.raises(UserError, match=message):
            read()
        skipped = Skipped()
        assert read(skipped) == ["a", "b"] and skipped.count == 1 and message in skipped.first
    for empty in (b"", b"\n\n"):
        path.write_bytes(empty)
        with pytest.raises(UserError, match="holds no questions"):
            read()
    path.write_text('{"question": "a", "id": "1"}\n{"question": "b", "id": "2"}\n{"question": "c", "id": "1"}\n')
    with pytest.raises(UserError, match='line 3: the id "1" already stands on line 1'):
        run(job(server, tmp_path))
    skipped = Skipped()
    assert run(job(server, tmp_path, skipped=skipped)).counts["answered"] == 2 and skipped.count == 1
    with pytest.raises(UserError, match=r'no file and no task "gsm9k".*gsm8k'):
        source_of("gsm9k")
    path.write_text('{"question": "a", "id": "1"}\n{"question": "a", "id": "1"}\n')
    assert run(job(server, tmp_path)).counts == {"planned": 0, "sent": 0, "answered": 1, "failed": 0}


def test_mistakes_of_the_command(server: Server, tmp_path: Path) -> None:
    write_questions(tmp_path / "q.jsonl", ["a"])
    base = ["--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "traces")]
    teacher = ["--teacher", server.url, "--model", "m"]
    for arguments, message in (
        ([*base], "say whom to ask"), ([*teacher], "say what to ask"),
        ([*base, "--teacher", "nowhere", "--model", "m"], "is no address"),
        ([*base, "--teacher", "https://api.example.com", "--model", "m"], "no price is known"),
        ([*base, *teacher, "--price", "free"], "no price is known"), ([*base, *teacher, "--price", "1"], "IN,OUT"),
        ([*base, *teacher, "--budget", "lots"], "not a number of dollars"),
        ([*base, *teacher, "--extra", "{"], "not JSON"), ([*base, *teacher, "--extra", '{"n": 2}'], "option of its own"),
        ([*base, *teacher, "--key", "NO_SUCH_KEY"], "holds no key"), ([*base, *teacher, "--concurrency", "0"], "at least 1"),
    ):  # fmt: skip
        environment = {k: v for k, v in ENVIRONMENT.items() if k != "NO_SUCH_KEY"}
        from shoestring.cli import main

        told = _told(main, ["ask", *arguments], environment)
        assert message in told, (arguments, told)


def _told(main: Callable[[list[str]], int], arguments: list[str], environment: dict[str, str]) -> str:
    import contextlib
    import io

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert main(arguments) == 2
    assert "Traceback" not in errors.getvalue() and len(errors.getvalue().strip().splitlines()) <= 2
    return errors.getvalue()


def test_a_job_is_a_job(server: Server, tmp_path: Path) -> None:
    """--out that is a file; and a store of a folder that cannot be written."""
    (tmp_path / "traces").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        run(job(server, tmp_path, ["a"]))
    if os.getuid() != 0:
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot"):
            run(replace(job(server, tmp_path, ["a"]), out=tmp_path / "shut" / "t"))
    assert isinstance(job(server, tmp_path, ["a"]), Job)


def test_answers_that_were_cut_off(start: Callable[..., Server], tmp_path: Path) -> None:
    """Kept and marked; or dropped, paid for and not asked again; or asked once with more tokens, and no more than once."""
    texts = ["question", "!length a", "!length*1 b", "!length*2 c"]
    for policy, answers, requests in (("keep", 8, 8), ("drop", 3, 8), ("longer", 8, 13)):
        server, folder = start(), tmp_path / policy
        folder.mkdir()
        given = {"samples": 2, "truncated": policy, "max_tokens": 50}
        outcome = run(job(server, folder, texts, **given))
        assert (
            server.stats()["billed"] == requests == outcome.purse.spent // (15 * 10**6 + 5 * 500_000 + 40 * 2 * 10**6)
        )
        again = run(job(server, folder, retry_failed=True, **given))
        assert again.told.answers == 0 and server.stats()["requests"] == requests  # never billed again
        assert outcome.counts["answered"] == again.counts["answered"] == answers
        traces = TraceStore(folder / "traces").read()
        cut = [trace.finish_reason for trace in traces].count("length")
        told = outcome.report()
        if policy == "drop":
            assert cut == 0 and outcome.counts["failed"] == 5 == len(texts) * 2 - len(traces)
        elif policy == "keep":
            assert cut == told["truncated"] and len(traces) == 8
        else:
            longer = [trace for trace in traces if trace.decoding["max_tokens"] == 200]
            assert told["asked_longer"] == len(longer) == 5 and told["whole_longer"] == 3 == 5 - [
                t.finish_reason for t in longer
            ].count("length")
    for more, words in (({"truncated": "no"}, "must be one of"), ({"truncated": "longer", "longer_tokens": 50}, "more than --max-tokens"),
                        ({"longer_tokens": 500}, "belongs to --truncated longer")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            run(job(server, tmp_path, ["a"], **more))


def test_the_share_accepted_while_asking(start: Callable[..., Server], tmp_path: Path) -> None:
    """Of questions with a gold, those answered rightly, graded on the way; of others, those that ended by themselves."""
    seen: list[float | None] = []
    rows = [{"question": f"question {i}", "answer": "#### 7"} for i in range(60)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = start("--hold-after", "20")

    def watch(one: Asking) -> None:
        seen.append(one.told.accepted)
        if seen.count(0.0) >= 2:
            server.release()

    outcome = run(job(server, tmp_path, most=4, start=4), watch=watch)
    report = outcome.report()
    assert 16 <= report["graded_sample"] <= 60 and report["accepted"] == 0.0 and outcome.counts["answered"] == 60
    assert seen.count(0.0) >= 2  # while asking, not in the end alone
    store = Store(tmp_path / "traces")
    ids = [number for (number,) in store.base.execute("SELECT id FROM questions ORDER BY id")]
    acceptance = Acceptance(store)
    for number, answer, finish in (
        (0, "\\boxed{7}", "stop"),
        (1, "\\boxed{8}", "stop"),
        (2, "\\boxed{7}", "length"),
        (3, "\\boxed{7}", "stop"),
    ):
        acceptance.hear(ids[number], answer, finish)
    acceptance.start()
    acceptance.stop()
    acceptance._thread.join(60)  # `stop` waits no longer than a person would
    store.close()
    assert (acceptance.graded, acceptance.right) == (4, 2)
    (tmp_path / "b").mkdir()
    outcome = run(job(start(), tmp_path / "b", ["a", "b", "c", "!length d"]))
    assert outcome.report()["accepted"] == 0.75 and outcome.told.graded == 0
