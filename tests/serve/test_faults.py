"""When things go wrong: each fault has its defined answer, nothing hangs or leaks, nobody else is harmed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from threading import Semaphore
from typing import Any

import httpx
import pytest
from waiting import eventually

LONG = {"max_tokens": 1900, "ignore_eos": True, "stream": True}


def tiny(server: Any) -> dict[str, Any]:
    return server.get("/health").json()["models"]["tiny"]


def idle(server: Any) -> bool:
    found = tiny(server)
    metrics = server.get("/metrics").text
    running = re.search(r'vllm:num_requests_running\{engine="0",model_name="tiny"\} (\S+)', metrics)
    return found["running"] == found["waiting"] == 0 and running is not None and float(running[1]) == 0


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "3 + 8 ?"}], **LONG} | fields


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


@pytest.fixture(scope="module")
def narrow(start: Any, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with little room and little patience, whose audit log is on a full disk."""
    folder = tmp_path_factory.mktemp("narrow")
    more = settings("max_running=2", "max_queue=3", "queue_seconds=3", "reader_seconds=1.0", "keep_alive_seconds=0.2",
                    "max_body_bytes=100000")  # fmt: skip
    with start(f"tiny={checkpoint}", "--audit", "/dev/full", *more, folder=folder) as running:
        yield running


def leave(server: Any, **fields: Any) -> None:
    """Ask for a whole answer and go away without it, once the server knows of the question."""
    before = {name: tiny(server)[name] for name in ("running", "waiting")}
    host, port = server.url.removeprefix("http://").split(":")
    text = json.dumps(body(stream=False, **fields))
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(text)}\r\n\r\n"
        client.sendall((head + text).encode())
        assert eventually(lambda: {name: tiny(server)[name] for name in before} != before)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(narrow: Any, stream: bool):
    """Long before the answer would have ended: the engine is slow, and stands still while the line is looked at."""
    with narrow.slowed():
        if stream:
            with narrow.stream(body()) as answer:
                lines = answer.iter_lines()  # closing this iterator closes the stream: it is kept
                next(lines)
                assert not idle(narrow)
        else:
            leave(narrow)
        assert eventually(lambda: idle(narrow), 8), "the engine still works for a client that is gone"
    assert narrow.chat().status_code == 200


def test_leaving_from_the_queue(narrow: Any):
    with narrow.slowed(), narrow.stream(body(n=2)) as first:
        kept = first.iter_lines()
        next(kept)
        timeouts = refusals(narrow, "503")
        leave(narrow)
        assert eventually(lambda: tiny(narrow)["waiting"] == 0)
        assert refusals(narrow, "503") == timeouts  # it did not wait until it was sent away
    assert eventually(lambda: idle(narrow))


def refusals(server: Any, status: str) -> float:
    found = re.search(rf'admission_rejections_total\{{.*reason="{status}"\}} (\S+)', server.get("/metrics").text)
    return float(found[1]) if found else 0.0


def test_full_waiting_and_told_to_wait(narrow: Any):
    with narrow.slowed(), narrow.stream(body(n=2)) as first, ThreadPoolExecutor(3) as pool:
        kept = first.iter_lines()
        next(kept)
        waiting = [pool.submit(narrow.chat, max_tokens=2) for _ in range(3)]
        assert eventually(lambda: tiny(narrow)["waiting"] == 3)
        refused = [narrow.chat(max_tokens=2) for _ in range(3)]
        sent_away = [job.result() for job in waiting]
    for answers, code in ((refused, "queue_full"), (sent_away, "queue_timeout")):
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(503, code)] * 3
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert eventually(lambda: idle(narrow))


def test_comments_keep_a_queued_stream_alive(narrow: Any):
    with narrow.slowed(), narrow.stream(body(n=2)) as first:
        kept = first.iter_lines()
        next(kept)
        with narrow.stream(body(max_tokens=3)) as second:
            lines = list(second.iter_lines())
    assert lines.count(": keep-alive") >= 3
    error = json.loads(lines[-4].removeprefix("data: "))["error"]
    assert error["code"] == "queue_timeout" and lines[-2] == "data: [DONE]"


def test_a_request_that_takes_too_long(start: Any, checkpoint: Path, tmp_path: Path):
    """Only this server is so impatient: on a busy machine any answer may take a second."""
    more = settings("request_seconds=1", "keep_alive_seconds=0.2")
    with start(f"tiny={checkpoint}", *more, folder=tmp_path) as running:
        with running.held():
            answer = running.chat(**body(stream=False, n=2))
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "request_timeout"
        assert eventually(lambda: idle(running))


def test_a_reader_that_falls_asleep(narrow: Any):
    """Its socket fills up, nothing is acknowledged: after `reader_seconds` it is gone, and its files with it."""
    before = narrow.open_files()
    host, port = narrow.url.removeprefix("http://").split(":")
    sleeper = socket.socket()
    sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sleeper.connect((host, int(port)))
    text = json.dumps(body(n=2, logprobs=True, top_logprobs=20, stream_options={"continuous_usage_stats": True}))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(text)}\r\n\r\n"
    sleeper.sendall((head + text).encode())
    assert eventually(lambda: narrow.open_files() > before)
    assert eventually(lambda: idle(narrow))
    assert eventually(lambda: narrow.open_files() <= before), "the sleeper's socket is still open"
    sleeper.close()
    assert narrow.chat().status_code == 200


def test_half_a_request(narrow: Any):
    """A client that declares more than it sends, and leaves."""
    host, port = narrow.url.removeprefix("http://").split(":")
    before = narrow.open_files()
    for text in (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{",
        b"GET / HT",
        b"\x16\x03\x01",
    ):
        with socket.create_connection((host, int(port))) as half:
            half.sendall(text)
    assert eventually(lambda: narrow.open_files() <= before, 30)  # sooner than a body's time is over
    assert narrow.chat().status_code == 200


def test_a_full_disk_at_the_audit_log_is_said_and_stops_nobody(narrow: Any):
    assert narrow.chat().status_code == 200
    assert eventually(lambda: narrow.get("/health").json().get("audit", {}).get("lost", 0) > 0)
    found = narrow.get("/health")
    assert found.status_code == 200 and "No space left" in found.json()["audit"]["failing"]
    assert "the audit log cannot be written" in narrow.log.read_text()


def test_a_thousand_connections_at_once(server: Any):
    before = server.open_files()

    async def ask(client: httpx.AsyncClient) -> tuple[int, str]:
        answer = await client.post("/v1/completions", json={"model": "dense", "prompt": [5], "max_tokens": 1})
        return answer.status_code, answer.headers.get("retry-after", "")

    async def all_at_once() -> list[tuple[int, str]]:
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=250) as client:
            return await asyncio.gather(*(ask(client) for _ in range(1000)))

    answers = asyncio.run(all_at_once())
    assert {status for status, _ in answers} <= {200, 503}
    assert all(wait for status, wait in answers if status == 503)
    assert sum(status == 200 for status, _ in answers) >= 900  # max_queue is 1,024
    assert eventually(lambda: server.open_files() <= before + 5)
    assert server.get("/health").json()["status"] == "ok"


@pytest.mark.timeout(600)  # three engines are started
def test_the_engine_is_killed_twice(start: Any, checkpoint: Path, dense_checkpoint: Path, tmp_path: Path):
    """Its calls fail at once, it is started again, once; the other model's calls notice nothing."""
    models = (f"tiny={checkpoint}", f"dense={dense_checkpoint}")
    with start(*models, folder=tmp_path) as running, ThreadPoolExecutor(4) as pool:
        begun = Semaphore(0)
        with running.slowed(0), running.slowed(1):
            other = pool.submit(stream_of, running, begun, model="dense")
            streams = [pool.submit(stream_of, running, begun) for _ in range(2)]
            whole = pool.submit(running.chat, **body(stream=False))
            assert all(begun.acquire(timeout=60) for _ in range(3))
            assert eventually(lambda: tiny(running)["running"] == 3)
            os.kill(running.engines()[0], signal.SIGKILL)
            assert eventually(lambda: tiny(running)["restarts"] == 1 and len(running.engines()) == 2)
            with running.held(1):  # the new one, the youngest, is not there before this was looked at
                for job in streams:
                    assert job.result(timeout=60)["code"] == "engine_dead"
                assert whole.result(timeout=60).status_code == 503 and "retry-after" in whole.result().headers
                health = running.get("/health")
                assert health.status_code == 503 and health.json()["models"]["tiny"]["state"] == "restarting"
                assert health.json()["models"]["dense"]["state"] == "ready" and not other.done()
                assert running.chat().json()["error"]["code"] == "engine_dead"
                assert running.chat(model="dense").status_code == 200
        assert other.result(timeout=60)["finish_reason"] == "length"
        assert eventually(lambda: running.get("/health").status_code == 200)
        assert tiny(running)["restarts"] == 1
        assert running.chat().status_code == 200
        os.kill(running.engines()[-1], signal.SIGKILL)  # the youngest
        assert eventually(lambda: tiny(running)["state"] == "dead")
        assert running.chat().status_code == 503 and running.get("/health").status_code == 503
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=60) == 0


def stream_of(server: Any, begun: Semaphore, **fields: Any) -> dict[str, Any]:
    """The error that ended a stream, or the last finish reason; `begun` is raised when its first event is here."""
    found: dict[str, Any] = {}
    with server.stream(body(**fields)) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                if not found:
                    begun.release()
                document = json.loads(line[6:])
                found = document.get("error") or document["choices"][0]
    return found


@pytest.mark.parametrize("patient", [True, False])
def test_sigterm_under_load(start: Any, checkpoint: Path, tmp_path: Path, patient: bool):
    drain = f"drain_seconds={90 if patient else 0.3}"
    with start(f"tiny={checkpoint}", "--set", drain, folder=tmp_path) as running, ThreadPoolExecutor(4) as pool:
        begun = Semaphore(0)
        with running.slowed():
            jobs = [pool.submit(stream_of, running, begun) for _ in range(3)]
            assert all(begun.acquire(timeout=60) for _ in range(3))
            engine = running.engines()[0]
            os.kill(engine, signal.SIGTERM)  # a service manager tells the whole group; engines leave it to the server
            running.process.send_signal(signal.SIGTERM)
            if patient:
                assert eventually(lambda: running.get("/health").json()["status"] == "draining")
                assert running.get("/health").status_code == 503
                assert running.chat().json()["error"]["code"] == "draining"
            else:
                wait(jobs, timeout=60)
        endings = [job.result(timeout=60) for job in jobs]
        assert running.process.wait(timeout=60) == 0
        for ending in endings:
            assert ending.get("finish_reason") == "length" if patient else ending.get("code") == "draining"
        assert not Path(f"/proc/{engine}").exists()
        assert "died" not in running.log.read_text()


def test_the_engine_does_not_outlive_a_killed_server(start: Any, checkpoint: Path, tmp_path: Path):
    with start(f"tiny={checkpoint}", folder=tmp_path) as running:
        (engine,) = running.engines()
        running.process.kill()
        running.process.wait()
        assert eventually(lambda: gone(engine))


def gone(pid: int) -> bool:
    with suppress(OSError):
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    return True
