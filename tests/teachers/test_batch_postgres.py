"""Batch APIs into a store in PostgreSQL: what `test_ask_batch.py` says of a folder, and who has the rows then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from asked import Server, batch_dies, job
from test_ask import ONE, texts
from test_ask_batch import CUT
from test_ask_postgres import server_url, state, url  # noqa: F401 (fixtures)

from shoestring.data import batches
from shoestring.data.claims import Budget
from shoestring.data.pg_worker import copy_down
from shoestring.data.postgres import PgStore
from shoestring.data.traces import TraceStore
from shoestring.teachers import _batch
from shoestring.teachers._batch import run_batch
from shoestring.teachers._session import run

pytest.importorskip("psycopg")


def rows(url: str, what: str) -> list[tuple[object, ...]]:  # noqa: F811
    store = PgStore(url)
    try:
        return store.sql.execute(what).fetchall()  # type: ignore[no-any-return]
    finally:
        store.close()


def test_the_same_as_a_folder(start: Callable[..., Server], tmp_path: Path, url: str) -> None:  # noqa: F811
    """Answers, errors, expired rows and answers that were cut off: the same traces and the same bill."""
    asked = [*texts(40), "世界 é", "!badrequest a", "!expires b", "!length*1 c"]
    near, far = start(), start()
    one = run_batch(job(near, tmp_path, asked, samples=2, discount=50, truncated="longer"), poll_s=0.01)
    other = run_batch(job(far, tmp_path, samples=2, discount=50, truncated="longer", out=url), poll_s=0.01)
    assert one.counts == other.counts and one.purse == other.purse and one.told.errors == other.told.errors
    assert one.counts["answered"] == 86 and other.purse.reserved == other.purse.in_flight == 0
    stats = [{key: server.stats()[key] for key in ("batches", "billed")} for server in (near, far)]
    assert stats[0] == stats[1]
    copy_down(url, tmp_path / "copy")
    found = [
        {t.id: (t.answer, t.usage, t.cost_usd) for t in TraceStore(tmp_path / name)} for name in ("traces", "copy")
    ]
    assert found[0] == found[1]
    assert run_batch(job(far, tmp_path, samples=2, discount=50, out=url), poll_s=0.01).told.answers == 0
    assert far.stats()["batches"] == stats[1]["batches"]
    assert rows(url, "SELECT count(*) FROM rows WHERE worker != 0 AND state = 0") == [(0,)]


@pytest.mark.parametrize("when", ["before", "after", "waiting"])
def test_a_batch_is_made_once(
    server: Server, tmp_path: Path, url: str, when: str  # noqa: F811
) -> None:  # fmt: skip
    """Killed before it was made, after it was made and not noted, and while it waits; nobody takes its rows then."""
    asked = job(server, tmp_path, texts(30), out=url)
    with batch_dies(when):
        run_batch(asked, poll_s=0.01)
    assert state(url)[0]["sent"] == 30
    other = run(replace(job(server, tmp_path, [*texts(30), "one more"], out=url)))  # by single requests
    assert other.told.answers == 1 and other.doubtful == 0 and other.counts["sent"] == 30
    outcome = run_batch(asked, poll_s=0.01)
    assert outcome.counts == {"planned": 0, "sent": 0, "answered": 31, "failed": 0}
    assert outcome.purse.doubts == outcome.purse.in_flight == 0
    assert server.stats()["batches"] == 1 and server.stats()["billed"] == 31


def test_rows_are_claimed_whole_or_not_at_all(
    server: Server, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """A death in the middle of claiming leaves them to whoever comes next, and no batch."""
    asked = job(server, tmp_path, texts(20), out=url)
    with monkeypatch.context() as patch:
        patch.setattr(batches, "settle_batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_batch(asked, poll_s=0.01)
    assert rows(url, "SELECT count(*), max(worker) FROM rows WHERE state = 0") == [(20, 0)]
    assert rows(url, "SELECT count(*) FROM batches") == [(0,)]
    assert run(asked).counts["answered"] == 20


def test_within_the_budget(server: Server, tmp_path: Path, url: str) -> None:  # noqa: F811
    """What it does not allow stays open for a larger one."""
    asked = job(server, tmp_path, texts(30), budget=Budget(answers=12), out=url)
    outcome = run_batch(asked, poll_s=0.01)
    assert outcome.counts["answered"] == 12 and outcome.told.stopped and "budget" in outcome.told.stopped
    assert rows(url, "SELECT count(*) FROM rows WHERE state = 0 AND worker = 0") == [(18,)]
    outcome = run_batch(replace(asked, budget=Budget(10**14)), poll_s=0.01)
    assert outcome.counts["answered"] == 30 and outcome.purse.spent == 30 * ONE


@pytest.mark.parametrize("size", [1, 200, 10**6])
def test_no_larger_than_the_provider_takes(
    server: Server, tmp_path: Path, url: str, size: int, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """At least one row a batch, however long; the others up to the limit of bytes."""
    monkeypatch.setattr(_batch, "MOST_BYTES", size + 2**20)
    assert run_batch(job(server, tmp_path, texts(8), out=url), poll_s=0.01).counts["answered"] == 8
    assert server.stats()["batches"] == {1: 8, 200: 2, 10**6: 1}[size]


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_answers_that_were_cut_off(server: Server, tmp_path: Path, url: str, policy: str) -> None:  # noqa: F811
    outcome = run_batch(job(server, tmp_path, CUT, samples=2, truncated=policy, out=url), poll_s=0.01)
    assert outcome.counts["answered"] == {"keep": 8, "drop": 3}[policy] and server.stats()["billed"] == 8
    assert outcome.counts["failed"] == 8 - outcome.counts["answered"]
