"""When things go wrong: each fault has its defined answer, nothing hangs or leaks, nobody else is harmed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

LONG = {"max_tokens": 1900, "ignore_eos": True, "stream": True}


def eventually(check: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if check():
            return True
        time.sleep(0.05)
    return check()


def idle(server: Any) -> bool:
    found = server.get("/health").json()["models"]["tiny"]
    metrics = server.get("/metrics").text
    running = re.search(r'vllm:num_requests_running\{engine="0",model_name="tiny"\} (\S+)', metrics)
    return found["running"] == found["waiting"] == 0 and running is not None and float(running[1]) == 0


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "3 + 8 ?"}], **LONG} | fields


@pytest.fixture(scope="module", autouse=True)
def plain_steps() -> Iterator[None]:
    """Natively even a deep model is done before anything can happen to its requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOESTRING_NATIVE", "0")
        yield


@pytest.fixture(scope="module")
def narrow(start: Any, slow_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with little room and little patience, whose audit log is on a full disk."""
    folder = tmp_path_factory.mktemp("narrow")
    sets = ("max_running=2", "max_queue=3", "queue_seconds=1.5", "request_seconds=2.5", "reader_seconds=1.0",
            "keep_alive_seconds=0.2", "max_body_bytes=100000")  # fmt: skip
    more = [part for setting in sets for part in ("--set", setting)]
    with start(f"tiny={slow_checkpoint}", "--audit", "/dev/full", *more, folder=folder) as running:
        yield running


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(narrow: Any, stream: bool):
    if stream:
        with narrow.stream(body()) as answer:
            lines = answer.iter_lines()  # closing this iterator closes the stream: it is kept
            next(lines)
            assert not idle(narrow)
    else:
        with pytest.raises(httpx.ReadTimeout):
            narrow.post("/v1/chat/completions", body(stream=False), timeout=0.5)
    assert eventually(lambda: idle(narrow), 3), "the engine still works for a client that is gone"
    assert narrow.chat().status_code == 200


def test_leaving_from_the_queue(narrow: Any):
    with narrow.stream(body(n=2)) as first:
        kept = first.iter_lines()
        next(kept)
        with pytest.raises(httpx.ReadTimeout):
            narrow.post("/v1/chat/completions", body(stream=False), timeout=0.5)
        assert eventually(lambda: narrow.get("/health").json()["models"]["tiny"]["waiting"] == 0, 2)
    assert eventually(lambda: idle(narrow), 3)


def test_full_waiting_and_told_to_wait(narrow: Any):
    with narrow.stream(body(n=2)) as first:
        kept = first.iter_lines()
        next(kept)
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(narrow.chat, max_tokens=2) for _ in range(6)]
            answers = [job.result() for job in jobs]
    codes = [answer.json()["error"]["code"] for answer in answers]
    assert {answer.status_code for answer in answers} == {503}
    assert codes.count("queue_full") == 3 and codes.count("queue_timeout") == 3
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert eventually(lambda: idle(narrow), 3)


def test_comments_keep_a_queued_stream_alive(narrow: Any):
    with narrow.stream(body(n=2)) as first:
        kept = first.iter_lines()
        next(kept)
        with narrow.stream(body(max_tokens=3)) as second:
            lines = list(second.iter_lines())
    assert lines.count(": keep-alive") >= 3
    error = json.loads(lines[-4].removeprefix("data: "))["error"]
    assert error["code"] == "queue_timeout" and lines[-2] == "data: [DONE]"


def test_a_request_that_takes_too_long(narrow: Any):
    answer = narrow.chat(**body(stream=False, n=2))
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "request_timeout"
    assert eventually(lambda: idle(narrow), 3)


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
    time.sleep(0.5)
    assert eventually(lambda: idle(narrow), 8)
    assert eventually(lambda: narrow.open_files() <= before, 8), "the sleeper's socket is still open"
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
    assert eventually(lambda: narrow.open_files() <= before, 5)
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
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=100) as client:
            return await asyncio.gather(*(ask(client) for _ in range(1000)))

    answers = asyncio.run(all_at_once())
    assert {status for status, _ in answers} <= {200, 503}
    assert all(wait for status, wait in answers if status == 503)
    assert sum(status == 200 for status, _ in answers) >= 900  # max_queue is 1,024
    assert eventually(lambda: server.open_files() <= before + 5)
    assert server.get("/health").json()["status"] == "ok"


@pytest.mark.timeout(240)  # three engines are started
def test_the_engine_is_killed_twice(start: Any, slow_checkpoint: Path, dense_checkpoint: Path, tmp_path: Path):
    """Its calls fail at once, it is started again, once; the other model's calls notice nothing."""
    models = (f"tiny={slow_checkpoint}", f"dense={dense_checkpoint}")
    with start(*models, folder=tmp_path) as running, ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream_of, running) for _ in range(2)]
        whole = pool.submit(running.chat, **body(stream=False))
        other = pool.submit(stream_of, running, model="dense", max_tokens=1000)
        assert eventually(lambda: running.get("/health").json()["models"]["tiny"]["running"] == 3)
        time.sleep(0.3)
        engine = running.engines()[0]
        os.kill(engine, signal.SIGKILL)
        for job in streams:
            assert job.result(timeout=5)["code"] == "engine_dead"
        assert whole.result(timeout=5).status_code == 503 and "retry-after" in whole.result().headers
        health = running.get("/health")
        assert health.status_code == 503 and health.json()["models"]["tiny"]["state"] == "restarting"
        assert health.json()["models"]["dense"]["state"] == "ready"
        assert running.chat(model="dense").status_code == 200
        assert other.result(timeout=60)["finish_reason"] == "length"
        assert running.chat().json()["error"]["code"] == "engine_dead"
        assert eventually(lambda: running.get("/health").status_code == 200, 60)
        assert running.get("/health").json()["models"]["tiny"]["restarts"] == 1
        assert running.chat().status_code == 200
        os.kill(running.engines()[-1], signal.SIGKILL)  # the youngest
        assert eventually(lambda: running.get("/health").json()["models"]["tiny"]["state"] == "dead")
        assert running.chat().status_code == 503 and running.get("/health").status_code == 503
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=10) == 0


def stream_of(server: Any, **fields: Any) -> dict[str, Any]:
    """The error that ended a stream, or the last finish reason."""
    found: dict[str, Any] = {}
    with server.stream(body(**fields)) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                document = json.loads(line[6:])
                found = document.get("error") or document["choices"][0]
    return found


@pytest.mark.parametrize("patient", [True, False])
def test_sigterm_under_load(start: Any, slow_checkpoint: Path, tmp_path: Path, patient: bool):
    drain = f"drain_seconds={60 if patient else 0.3}"
    with start(f"tiny={slow_checkpoint}", "--set", drain, folder=tmp_path) as running, ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(stream_of, running, max_tokens=400 if patient else 1900) for _ in range(3)]
        assert eventually(lambda: running.get("/health").json()["models"]["tiny"]["running"] == 3)
        engine = running.engines()[0]
        os.kill(engine, signal.SIGTERM)  # a service manager tells the whole group; the engine leaves it to the server
        running.process.send_signal(signal.SIGTERM)
        if patient:
            assert eventually(lambda: running.get("/health").json()["status"] == "draining", 5)
            assert running.get("/health").status_code == 503
            assert running.chat().json()["error"]["code"] == "draining"
        endings = [job.result(timeout=60) for job in jobs]
        assert running.process.wait(timeout=30) == 0
        for ending in endings:
            assert ending.get("finish_reason") == "length" if patient else ending.get("code") == "draining"
        assert not Path(f"/proc/{engine}").exists()
        assert "died" not in running.log.read_text()


def test_the_engine_does_not_outlive_a_killed_server(start: Any, slow_checkpoint: Path, tmp_path: Path):
    with start(f"tiny={slow_checkpoint}", folder=tmp_path) as running:
        (engine,) = running.engines()
        running.process.kill()
        running.process.wait()
        assert eventually(lambda: not Path(f"/proc/{engine}").exists() or "Z" in state(engine), 30)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
