"""The books without HTTP: what is written when writing fails, and what is known after a restart."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from shoestring.serve import meter as meters
from shoestring.serve.audit import AuditLog
from shoestring.serve.errors import ApiError
from shoestring.serve.hooks import Call
from shoestring.serve.keys import KeyStore
from shoestring.serve.meter import Meter
from shoestring.serve.settings import ServeConfig, UpstreamSpec

UPSTREAM = UpstreamSpec(url="http://127.0.0.1:9/v1")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(meters, "FLUSH_SECONDS", 0.01)


def with_meter(folder: Path, work: Callable[[Meter], Awaitable[Any]], **settings: Any) -> Any:
    """What `work` finds with a running meter over folder/keys.db."""

    async def run() -> Any:
        meter = Meter(ServeConfig(upstream=UPSTREAM, store=str(folder / "keys.db"), **settings))
        await meter.start()
        try:
            return await work(meter)
        finally:
            await meter.stop()

    return asyncio.run(run())


def call(key: Any = None) -> Call:
    found = Call("r-1", "/v1/chat/completions", "m", key, None, "here", {"messages": "a secret question"})
    found.tally.prompt, found.tally.completion = 7, 5
    return found


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not check():
            await asyncio.sleep(0.01)


def test_what_was_used_today_is_known_after_a_restart(tmp_path: Path):
    store = KeyStore(tmp_path / "keys.db")
    secret, key = store.create("ann", daily_tokens=100)
    row = {
        "key_id": key.id, "request_id": "r", "time": time.time(), "model": "m", "endpoint": "e", "prompt": 60,
        "cached": 0, "completion": 30, "reasoning": 0, "usd": 0.0, "status": 200, "seconds": 1.0,
    }  # fmt: skip
    store.record([row, row | {"time": time.time() - 2 * 86400}])

    async def work(meter: Meter) -> ApiError:
        account = await meter.authenticate(f"Bearer {secret}")
        assert account is not None
        account.reserve(10, 0.0).settle(0, 0.0)
        with pytest.raises(ApiError) as error:
            account.reserve(11, 0.0)
        return error.value

    error = with_meter(tmp_path, work)
    assert error.code == "daily_limit_exceeded" and "90 are used" in str(error)


def test_usage_that_cannot_be_written_is_kept_said_and_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = KeyStore(tmp_path / "keys.db")
    _, key = store.create("ann")
    good, broken = KeyStore.record, [True]

    def record(self: KeyStore, rows: list[dict[str, Any]]) -> None:
        if broken:
            raise OSError(errno.ENOSPC, "no space left")
        good(self, rows)

    monkeypatch.setattr(KeyStore, "record", record)

    async def work(meter: Meter) -> None:
        await meter.finish(call(key), 200, 0.25, None)
        await until(lambda: "no space left" in meter.failing)
        await meter.finish(call(key), 200, 0.5, None)
        assert store.find("ann").spent_usd == 0
        broken.clear()
        await until(lambda: meter.failing == "")

    with_meter(tmp_path, work)
    assert store.find("ann").spent_usd == 0.75
    (row,) = [row for row in store.totals() if row["key"] == "ann"]
    assert row["requests"] == 2


def test_keys_that_are_known_work_on_while_the_store_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = KeyStore(tmp_path / "keys.db")
    secret, _ = store.create("ann")
    asked: list[int] = []

    def version(self: KeyStore) -> int:
        asked.append(1)
        raise OSError(errno.EIO, "the disk is gone")

    async def work(meter: Meter) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(KeyStore, "version", version)
            await until(lambda: len(asked) >= 3)  # it keeps looking
            assert await meter.authenticate(f"Bearer {secret}") is not None
        _, other = store.create("bob")
        await until(lambda: other.id in meter._by_id)

    with_meter(tmp_path, work)


@pytest.mark.parametrize("text", [False, True])
def test_texts_are_in_the_audit_log_only_where_that_is_wanted(tmp_path: Path, text: bool):
    async def work(meter: Meter) -> None:
        await meter.finish(call(), 200, 0.0, None, ("a secret answer",))

    with_meter(tmp_path, work, audit=str(tmp_path / "audit.jsonl"), audit_text=text)
    (line,) = (tmp_path / "audit.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["prompt"], found["completion"], found["status"]) == (7, 5, 200)
    assert ("secret" in line) is text and (found.get("answers") == ["a secret answer"]) is text
    assert oct((tmp_path / "audit.jsonl").stat().st_mode)[-3:] == "600"


def test_a_disk_that_fills_up_and_has_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a line, then none, then room: what is whole can be read line by line, what is lost is counted."""
    log, really = AuditLog(tmp_path / "audit.jsonl"), os.write
    answers = [None, 9, OSError(errno.ENOSPC, "No space left on device"), None]

    def write(fd: int, data: bytes) -> int:
        now = answers.pop(0)
        if isinstance(now, OSError):
            raise now
        return really(fd, data[:now])

    monkeypatch.setattr("shoestring.serve.audit.os.write", write)
    for number in range(4):
        log.write({"number": number})
    log.close()
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert [lines[0], lines[-1]] == ['{"number": 0}', '{"number": 3}'] and len(lines) == 3
    assert log.lost == 2 and log.failing == ""
