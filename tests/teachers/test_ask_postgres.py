"""Many workers and one store in PostgreSQL: the promises of the local store, and workers that are killed."""
# ruff: noqa: E501 (command lines)

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from asked import ENVIRONMENT, Server, a_port, job, write_questions
from postgres import binaries, running
from stub_api import said

from shoestring.cli import main
from shoestring.core.errors import UserError
from shoestring.data.claims import Budget
from shoestring.data.pg_worker import PgWorker, copy_down
from shoestring.data.postgres import PgStore
from shoestring.data.store import Store
from shoestring.data.traces import TraceStore
from shoestring.teachers._session import run

psycopg = pytest.importorskip("psycopg")
if binaries() is None:
    pytest.skip("no PostgreSQL here (Debian: apt-get install postgresql)", allow_module_level=True)
NUMBERS = count()
AT_ONCE = 8


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with running(a_port()) as url:
        yield url


@pytest.fixture
def url(server_url: str) -> str:
    """A store of its own."""
    return f"{server_url}#s{next(NUMBERS)}"


def state(url: str) -> tuple[dict[str, int], Any]:
    store = PgStore(url)
    try:
        return store.counts(), store.read_purse()
    finally:
        store.close()


def answers(url: str, folder: Path) -> dict[str, str]:
    copy_down(url, folder)
    return {trace.messages[-1]["content"]: trace.answer for trace in TraceStore(folder)}


def command(server: Server, folder: Path, url: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "shoestring.cli", "ask", "--teacher", server.url, "--model", "m", "--name", "t",
        "--questions", str(folder / "q.jsonl"), "--out", url, "--concurrency", str(AT_ONCE),
        "--price", "1,2,0.5", "--budget", "100", "--max-tokens", "50", "--quiet", "--json", *more,
    ]  # fmt: skip


def test_the_same_as_a_folder(start: Callable[..., Server], tmp_path: Path, url: str) -> None:
    """Questions, errors, several samples and a system of prices: both stores hold the same traces and the same bill."""
    texts = [f"question {i} é\0 😀" for i in range(60)] + [
        "!badrequest",
        "!busy*1 q",
        "!half*1 q",
        "!length",
        "!nocounts q",
        "!overloaded*2 q",
    ]
    near, far = start(), start()
    one = run(job(near, tmp_path, texts, samples=2))
    other = run(job(far, tmp_path, samples=2, out=url))
    assert one.counts == other.counts == {"planned": 0, "sent": 0, "answered": 130, "failed": 2}
    assert one.purse == other.purse and other.purse.reserved == 0
    kinds = {kind: number for kind, (number, _) in one.troubles.items()}
    assert kinds == {kind: number for kind, (number, _) in other.troubles.items()}
    copy_down(url, tmp_path / "copy")
    folders = [TraceStore(tmp_path / name).read() for name in ("traces", "copy")]
    said_ = [
        {t.id: (t.answer, t.thinking, t.finish_reason, t.usage, t.cost_usd, t.problem_id) for t in found}
        for found in folders
    ]
    assert said_[0] == said_[1] and len(said_[0]) == 130
    assert near.stats()["billed"] == far.stats()["billed"]
    before = far.stats()["requests"]
    again = run(job(far, tmp_path, samples=3, out=url))  # only what is missing
    assert again.told.answers == 65 and far.stats()["requests"] >= before + 65
    assert run(job(far, tmp_path, samples=3, out=url, retry_failed=True)).counts["failed"] == 3


def test_curation_and_export_of_a_copy(
    server: Server, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(tmp_path / "q.jsonl", [f"question {i}" for i in range(20)])
    arguments = [*command(server, tmp_path, url)[3:], "--copy-to", str(tmp_path / "copy")]
    assert main(arguments) == 0 and json.loads(capsys.readouterr().out)["answered"] == 20
    assert (tmp_path / "copy" / "summary.html").is_file()
    assert (
        main(
            [
                "curate",
                str(tmp_path / "copy"),
                "--filters",
                "finished",
                "--export",
                str(tmp_path / "kept.jsonl"),
                "--quiet",
                "--json",
            ]
        )
        == 0
    )
    assert (
        json.loads(capsys.readouterr().out)["kept"] == 20
        and len((tmp_path / "kept.jsonl").read_text().splitlines()) == 20
    )
    assert main(arguments) == 0 and json.loads(capsys.readouterr().out)["answers_now"] == 0  # a copy is made anew


def test_curation_in_the_database(
    server: Server, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its address as in a folder: grading, every usual filter, the exports; late answers; going on."""
    monkeypatch.setattr("shoestring.curate._sieve.CHUNK", 16)
    leaked = "How many apples are left when seven of the twelve that lay there were eaten by noon today?"
    questions = [*(f"question {i} é\0" for i in range(90)), "!badrequest*1 late", "!length", leaked]
    rows = [{"question": text, "answer": "#### 7", "id": str(i)} for i, text in enumerate(questions)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.txt").write_text(f"{leaked}\n")

    def curated(store: str, *more: str) -> Any:
        names = "finished,refused,not_wrong,decontaminate,one_language,dedup,near_duplicates,majority,length"
        line = [
            "curate",
            store,
            "--filters",
            names,
            "--against",
            str(tmp_path / "test.txt"),
            "--option",
            "majority.fewest=1",
        ]
        assert main([*line, "--quiet", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    found = []
    for _ in range(2):  # the second time, what failed is answered: a row before those that were judged
        run(job(server, tmp_path, out=url, samples=2, retry_failed=True))
        copy_down(url, tmp_path / "copy")
        exports = [str(tmp_path / f"{name}.jsonl") for name in ("far", "near")]
        far = curated(
            url,
            "--no-grading",
            "--export",
            exports[0],
            "--page",
            str(tmp_path / "page.html"),
            "--card",
            str(tmp_path / "CARD.md"),
        )
        near = curated(str(tmp_path / "copy"), "--no-grading", "--export", exports[1])
        assert far["funnel"] == near["funnel"] and far["answers"] == near["answers"]
        assert 0 < far["kept"] < far["answers"], far["funnel"]
        assert Path(exports[0]).read_bytes() == Path(exports[1]).read_bytes()
        found.append(far["answers"])
    assert found == [185, 186] and "cut off (2)" in (tmp_path / "page.html").read_text()
    graded = curated(url)
    assert graded["kept"] == 0 and {"wrong": 184} in [step["dropped"] for step in graded["funnel"]]
    assert curated(url) == graded


def test_a_page_of_traces_reads_no_others(server_url: str, url: str) -> None:
    """In a large store too: a page that read every row before it would make a million traces take hours."""
    from shoestring.curate._sieve import View, _count_anew
    from shoestring.data import traces

    store = PgStore(url, create=True)
    for statement in (
        'INSERT INTO hows(hash, fields) VALUES (\'h\', \'{"teacher": "t", "licence": "MIT", "decoding": {}}\')',
        "INSERT INTO questions(hash, messages) SELECT 'q' || i, '[]' FROM generate_series(1, 40000) AS i",
        "INSERT INTO rows(trace, question, how, sample, state) SELECT 't' || i, i, 1, 0, 2 FROM generate_series(1, 40000) AS i",
        "INSERT INTO answers(row, finish, tokens_in, tokens_out, pico, date, body) SELECT i, 'stop', 1, 1, 0, '', "
        '\'{"answer": "a"}\' FROM generate_series(1, 40000) AS i',
        "INSERT INTO filters(name, hash, upto) VALUES ('f', 'f', 0)",
        "INSERT INTO marks(filter, row, why) SELECT 1, i, 'w' FROM generate_series(1, 40000, 100) AS i",
    ):
        store.base.execute(statement)
    view = View(store.sql, [1])
    assert sum(1 for _ in view) == 39_600

    def read(node: dict[str, Any]) -> float:
        return float(node["Actual Rows"] * node["Actual Loops"]) + sum(read(part) for part in node.get("Plans", ()))

    _count_anew(store)
    explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {traces._READ.format(where=view._where)}"
    ((found,),) = store.sql.execute(explain, (20_000, 100)).fetchall()
    assert read(found[0]["Plan"]) < 3000, found
    store.close()


def test_a_database_of_the_first_schema(server: Server, tmp_path: Path, url: str) -> None:
    run(job(server, tmp_path, ["a"], out=url))
    store = PgStore(url)
    store.base.execute("ALTER TABLE filters DROP COLUMN judged")
    store.base.execute("UPDATE stores SET schema = 1")
    store.close()
    store = PgStore(url)
    assert store._one("SELECT schema FROM stores") == (2,) and store._all("SELECT judged FROM filters") == []
    store.close()


def test_a_budget_over_several_workers(start: Callable[..., Server], tmp_path: Path, url: str) -> None:
    """Three processes at once never spend more than all of them may, in doubt and in flight included."""
    server = start("--latency", "0.01")
    write_questions(tmp_path / "q.jsonl", [f"question {i}" for i in range(400)])
    line = command(server, tmp_path, url, "--share")
    line[line.index("--budget") + 1] = "0.02"
    processes = [
        subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(3)
    ]
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        try:
            _, purse = state(url)
        except UserError:  # not made yet
            continue
        assert purse.spent + purse.reserved + purse.doubt <= 2 * 10**10
    counts, purse = state(url)
    assert counts["planned"] > 0 and counts["sent"] == 0 and purse.reserved == 0 and purse.spent > 1.5 * 10**10
    assert server.stats()["billed"] == server.stats()["questions"] == counts["answered"]


@pytest.mark.parametrize("remember", [False, True])
def test_kill_9_one_of_several_workers(start: Callable[..., Server], tmp_path: Path, url: str, remember: bool) -> None:
    """The others take its rows over; what it had sent is in doubt, no more than were in flight; all is answered."""
    texts = [f"question {i}" for i in range(600)]
    write_questions(tmp_path / "q.jsonl", texts)
    server = start("--latency", "0.02", "--hold-after", "150", *(["--remember"] if remember else []))
    processes: list[subprocess.Popen[str]] = []
    for _ in range(3):
        line = command(server, tmp_path, url, "--share")
        processes.append(subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True))
        reach(url, 20, processes)  # the first one, which is killed, is at work before the others are
    reach(url, 150, processes)
    server.asked(151)
    until(lambda: sent_by(url, processes[0].pid) > 0)  # its questions wait for their answers
    processes[0].kill()
    processes[0].wait()
    server.release()
    reports = [json.loads(process.communicate(timeout=250)[0]) for process in processes[1:]]
    assert [process.returncode for process in processes[1:]] == [0, 0]
    counts, purse = state(url)
    assert counts == {"planned": 0, "sent": 0, "answered": 600, "failed": 0}
    assert 0 < purse.doubts <= AT_ONCE and purse.in_flight == purse.reserved == purse.tokens_reserved == 0
    assert sum(report["found_in_doubt"] for report in reports) == purse.doubts
    assert answers(url, tmp_path / "copy") == {text: said(text, None).strip() for text in texts} or answers(
        url, tmp_path / "copy"
    ) == {text: said(text, None) for text in texts}
    stats = server.stats()
    assert stats["questions"] == 600 and (
        stats["billed"] == 600 if remember else 600 <= stats["billed"] <= 600 + purse.doubts
    )
    assert purse.spent == 600 * (15 * 10**6 + 5 * 500_000 + 40 * 2 * 10**6)


@pytest.mark.parametrize(("kills", "questions"), [(3, 300), pytest.param(50, 5000, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_kill_9(start: Callable[..., Server], tmp_path: Path, url: str, kills: int, questions: int) -> None:
    """As against the local store: nothing kept is lost or asked again, over many kills."""
    texts, draw = [f"question {i}" for i in range(questions)], random.Random(5)
    write_questions(tmp_path / "q.jsonl", texts)
    server = start("--latency", "0.01")
    kept: dict[str, str] = {}
    for number in range(kills):
        process = subprocess.Popen(command(server, tmp_path, url), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        reach(url, (number + 1) * questions // (kills + 1), [process])
        time.sleep(draw.random() * 0.02)
        process.kill()
        process.wait()
        now = answers(url, tmp_path / "copy")
        assert kept.items() <= now.items()
        kept = now
    done = again(
        lambda: subprocess.run(
            command(server, tmp_path, url), env=ENVIRONMENT, capture_output=True, text=True, timeout=250
        )
    )
    assert done.returncode == 0, done.stderr
    counts, purse = state(url)
    assert counts == {"planned": 0, "sent": 0, "answered": questions, "failed": 0}
    stats = server.stats()
    assert (
        stats["questions"] == questions <= stats["billed"] <= questions + purse.doubts
        and purse.doubts <= kills * AT_ONCE
    )


def sent_by(url: str, pid: int) -> int:
    """Rows that a worker has sent and has no answer to yet."""
    store = PgStore(url)
    try:
        found = store._one(
            f"SELECT count(*) FROM rows r JOIN workers w ON r.worker = w.id WHERE r.state = 1 AND w.pid = {pid}"
        )
    finally:
        store.close()
    assert found is not None
    return int(found[0])


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def again(call: Callable[[], subprocess.CompletedProcess[str]]) -> subprocess.CompletedProcess[str]:
    """The server needs a moment to see that a killed client's connection is closed; until then the store is in use."""
    deadline = time.monotonic() + 60
    while (done := call()).returncode == 2 and "Another process" in done.stderr and time.monotonic() < deadline:
        time.sleep(0.1)
    return done


def reach(url: str, wanted: int, processes: list[subprocess.Popen[Any]]) -> None:
    """Wait until so many are answered, or a process has ended."""
    deadline = time.monotonic() + 200
    while all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline
        try:
            if state(url)[0]["answered"] >= wanted:
                return
        except UserError:
            pass
        time.sleep(0.02)


@pytest.mark.timeout(600)
def test_ray_and_a_worker_that_is_killed(start: Callable[..., Server], tmp_path: Path, url: str) -> None:
    """Three workers of Ray's; one is killed: another takes its place, and the count is right."""
    pytest.importorskip("ray")
    texts = [f"question {i}" for i in range(500)]
    write_questions(tmp_path / "q.jsonl", texts)
    server = start("--latency", "0.05", "--hold-after", "100")
    line = command(server, tmp_path, url, "--workers", "3")
    line[line.index("--concurrency") + 1] = str(3 * AT_ONCE)
    process = subprocess.Popen(
        line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        reach(url, 60, [process])
        server.asked(101)
        store = PgStore(url)
        workers = [
            pid
            for (pid,) in store._all(
                "SELECT DISTINCT w.pid FROM workers w JOIN rows r ON r.worker = w.id WHERE r.state = 1"
            )
        ]
        store.close()
        assert workers and process.pid not in workers and process.poll() is None
        os.kill(workers[0], signal.SIGKILL)
        server.release()
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    report = json.loads(out)
    counts, purse = state(url)
    assert report["answered"] == counts["answered"] == 500 and counts["sent"] == counts["planned"] == 0
    assert 0 < purse.doubts == report["found_in_doubt"] <= AT_ONCE and purse.reserved == purse.in_flight == 0
    assert report["answers_now"] <= 500 and "died" in err
    stats = server.stats()
    assert stats["questions"] == 500 <= stats["billed"] <= 500 + purse.doubts and stats["most_at_once"] <= 3 * AT_ONCE
    assert len(answers(url, tmp_path / "copy")) == 500


@pytest.mark.timeout(600)
def test_answers_that_were_cut_off_are_asked_longer_by_the_workers(server: Server, tmp_path: Path, url: str) -> None:
    pytest.importorskip("ray")
    texts = [*(f"question {i}" for i in range(30)), "!length a", "!length*1 b", "!length*2 c"]
    write_questions(tmp_path / "q.jsonl", texts)
    line = command(server, tmp_path, url, "--workers", "2", "--samples", "2", "--truncated", "longer")
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["answered"] == 66 and report["answers_now"] == 71 == server.stats()["billed"]
    assert (report["asked_longer"], report["whole_longer"]) == (5, 3)
    again = run(job(server, tmp_path, out=url, samples=2, truncated="longer"))  # from one process: the same job
    assert again.told.answers == 0 and server.stats()["billed"] == 71
    store = PgStore(url)
    longer = store._all("SELECT finish FROM answers a JOIN rows r ON r.id = a.row JOIN hows h ON h.id = r.how "
                        "WHERE h.fields::json->'decoding'->>'max_tokens' = '200' ORDER BY finish")  # fmt: skip
    store.close()
    assert longer == [("length",), ("length",), ("stop",), ("stop",), ("stop",)]


def test_a_second_process_is_refused_unless_all_share(server: Server, tmp_path: Path, url: str) -> None:
    with PgWorker(url), pytest.raises(UserError, match="Another process is asking into the store"):
        run(job(server, tmp_path, ["a"], out=url))
    with PgWorker(url, share=True):
        assert run(job(server, tmp_path, ["a"], out=url, share=True)).counts["answered"] == 1
        with pytest.raises(UserError, match="Another process"):
            run(job(server, tmp_path, ["a"], out=url))


def test_a_database_that_goes_away_is_a_crash(start: Callable[..., Server], tmp_path: Path, url: str) -> None:
    """One sentence, nothing written twice, and the same command goes on."""
    server = start("--hold-after", "100")
    ended = False

    def cut(asking: Any) -> None:
        nonlocal ended
        if not ended and asking.told.answers >= 20:
            ended = True
            server.release()
            with psycopg.connect(url.partition("#")[0], autocommit=True) as other:
                other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid() AND backend_type = 'client backend'"
                )

    with pytest.raises(UserError, match=r"PostgreSQL at 127.0.0.1: .*the same command goes on"):
        run(
            job(server, tmp_path, [f"question {i}" for i in range(300)], out=url, most=AT_ONCE, start=AT_ONCE),
            watch=cut,
        )
    kept = answers(url, tmp_path / "copy")
    outcome = run(job(server, tmp_path, out=url, most=AT_ONCE, start=AT_ONCE))
    assert ended and outcome.counts["answered"] == 300 and 0 < outcome.purse.doubts <= AT_ONCE
    assert kept.items() <= answers(url, tmp_path / "copy").items()
    assert server.stats()["billed"] <= 300 + outcome.purse.doubts


def test_mistakes(server: Server, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(tmp_path / "q.jsonl", ["a"])
    for line, told in (
        (command(server, tmp_path, url.replace("#", "#No!")), "cannot be the name of a store"),
        (command(server, tmp_path, "postgresql://tester:secret@127.0.0.1:9/x"), "PostgreSQL at 127.0.0.1"),
        (command(server, tmp_path, str(tmp_path / "t"), "--workers", "2"), "are for a store in PostgreSQL"),
        (command(server, tmp_path, url, "--workers", "-1"), "--workers is -1"),
        (command(server, tmp_path, url, "--workers", "2", "--dry-run"), "leave out --workers"),
        (command(server, tmp_path, url, "--batch", "--workers", "2"), "--batch asks from one process"),
    ):  # fmt: skip
        assert main(line[3:]) == 2
        heard = capsys.readouterr().err
        assert told in heard and "secret" not in heard
    with pytest.raises(UserError, match="There is no traces store"):
        PgStore(f"{url}nowhere")
    assert run(job(server, tmp_path, ["a"])).counts["answered"] == 1
    store = PgStore(url, create=True)
    with pytest.raises(UserError, match="has been asked into"):
        copy_down(url, tmp_path / "traces")
    store.base.execute("UPDATE stores SET schema = 99")
    store.close()
    with pytest.raises(UserError, match="made by a newer version"):
        PgStore(url)


def test_the_pilot_of_a_dry_run_and_unequal_ids(server: Server, tmp_path: Path, url: str) -> None:
    outcome = run(job(server, tmp_path, [f"question {i}" for i in range(200)], out=url, pilot=True))
    assert outcome.counts["answered"] == 20 and outcome.forecast is not None and outcome.forecast["questions"] == 200
    assert run(job(server, tmp_path, out=url)).counts["answered"] == 200
    (tmp_path / "q.jsonl").write_text('{"question": "a", "id": "1"}\n{"question": "b", "id": "1"}\n')
    with pytest.raises(UserError, match='line 2: the id "1" already stands on line 1'):
        run(job(server, tmp_path, out=url))


def test_the_budget_of_answers(server: Server, tmp_path: Path, url: str) -> None:
    outcome = run(job(server, tmp_path, [f"question {i}" for i in range(30)], out=url, budget=Budget(answers=7)))
    assert outcome.counts["answered"] == 7 and "budget" in (outcome.told.stopped or "")
    assert Store(tmp_path / "unused", create=True).read_purse().answers == 0
