"""Batch APIs: collected by custom_id, at a discount, made once whatever happens in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from asked import Server, batch_dies, job
from stub_api import said
from test_ask import ONE, texts

from shoestring.core.errors import UserError
from shoestring.data.claims import Budget
from shoestring.data.store import Store
from shoestring.data.traces import TraceStore
from shoestring.teachers import _batch
from shoestring.teachers._batch import run_batch


def test_a_batch_is_collected(server: Server, tmp_path: Path) -> None:
    asked = job(server, tmp_path, [*texts(20), "!badrequest a", "!expires b"], discount=50)
    outcome = run_batch(asked, poll_s=0.01)
    assert outcome.counts == {"planned": 0, "sent": 0, "answered": 21, "failed": 1}
    assert outcome.told.errors == {"bad request": 1, "expired": 1}  # the expired row went into a second batch
    assert server.stats()["batches"] == 2 and server.stats()["billed"] == 21
    answers = {trace.messages[-1]["content"]: trace for trace in TraceStore(tmp_path / "traces")}
    assert answers["question 7"].answer == said("question 7", None)
    assert outcome.purse.spent == 21 * ONE // 2 and outcome.purse.reserved == outcome.purse.doubts == 0
    assert run_batch(asked, poll_s=0.01).told.answers == 0 and server.stats()["batches"] == 2


def test_a_batch_is_limited_in_bytes(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in characters: 1,000 of these are 2,000 bytes."""
    monkeypatch.setattr(_batch, "MOST_BYTES", 2_000 + 2**20)
    asked = job(server, tmp_path, [f"{'é' * 500} {i}" for i in range(8)])
    assert run_batch(asked, poll_s=0.01).counts["answered"] == 8
    assert server.stats()["batches"] == 4  # two rows each: the second is the one that may reach beyond


@pytest.mark.parametrize("when", ["before", "after", "waiting"])
def test_a_batch_is_made_once(server: Server, tmp_path: Path, when: str) -> None:
    """Killed before it was made, after it was made and not noted, and while it waits."""
    asked = job(server, tmp_path, texts(30))
    with batch_dies(when):
        run_batch(asked, poll_s=0.01)
    store = Store(tmp_path / "traces")
    assert store.counts()["sent"] == 30
    store.close()
    outcome = run_batch(asked, poll_s=0.01)
    assert outcome.counts["answered"] == 30 and outcome.purse.doubts == 0
    assert server.stats()["batches"] == 1 and server.stats()["billed"] == 30


CUT = ["question", "!length a", "!length*1 b", "!length*2 c"]


@pytest.mark.parametrize(("policy", "answers", "billed"), [("keep", 8, 8), ("drop", 3, 8), ("longer", 8, 13)])
def test_answers_of_a_batch_that_were_cut_off(
    server: Server, tmp_path: Path, policy: str, answers: int, billed: int
) -> None:
    """The policies are those of single requests; nothing is billed again."""
    asked = job(server, tmp_path, CUT, samples=2, truncated=policy, discount=50)
    outcome = run_batch(asked, poll_s=0.01)
    assert server.stats()["billed"] == billed and outcome.purse.spent == billed * ONE // 2
    assert outcome.counts["answered"] == answers and outcome.counts["failed"] == 8 - answers
    assert (outcome.told.asked_longer, outcome.told.whole_longer) == ((5, 3) if policy == "longer" else (0, 0))
    traces = TraceStore(tmp_path / "traces").read()
    assert len(traces) == {"keep": 8, "drop": 3, "longer": 13}[policy]
    assert {t.decoding["max_tokens"] for t in traces} == ({50, 200} if policy == "longer" else {50})
    run_batch(replace(asked, retry_failed=True), poll_s=0.01)
    assert server.stats()["billed"] == billed


@pytest.mark.parametrize("name", ["make", "wait"])
def test_a_batch_of_longer_answers_is_made_once(
    server: Server, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the second batch was made, and while it waits; another job leaves it alone meanwhile."""
    asked = job(server, tmp_path, CUT, truncated="longer")
    real, calls = getattr(_batch.Remote, name), []

    async def dies(self: object, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return await real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_batch.Remote, name, dies)
        with pytest.raises(KeyboardInterrupt):
            run_batch(asked, poll_s=0.01)
    (tmp_path / "other").mkdir()
    other = replace(job(server, tmp_path / "other", ["something else"], name="another"), out=asked.out)
    assert run_batch(other, poll_s=0.01).told.answers == 1
    outcome = run_batch(asked, poll_s=0.01)
    assert (outcome.told.asked_longer, outcome.told.whole_longer) == (3, 1)
    assert server.stats()["batches"] == 3 and server.stats()["billed"] == 4 + 1 + 3
    assert {t.decoding["max_tokens"] for t in TraceStore(tmp_path / "traces") if t.teacher == "t"} == {50, 200}


def test_a_batch_within_the_budget(server: Server, tmp_path: Path) -> None:
    outcome = run_batch(job(server, tmp_path, texts(30), budget=Budget(answers=12)), poll_s=0.01)
    assert outcome.counts["answered"] == 12 and outcome.told.stopped and "budget" in outcome.told.stopped
    with pytest.raises(UserError, match="one teacher"):
        run_batch(job(server, tmp_path, texts(3), n=2))
