"""Batch APIs: collected by custom_id, at a discount, made once whatever happens in between."""

from __future__ import annotations

from pathlib import Path

import pytest
from asked import Server, job
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


@pytest.mark.parametrize("when", ["before", "after", "waiting"])
def test_a_batch_is_made_once(server: Server, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before it was made, after it was made and not noted, and while it waits."""
    asked = job(server, tmp_path, texts(30))
    name = "wait" if when == "waiting" else "make"
    real = getattr(_batch.Remote, name)

    async def dies(self: object, *arguments: object) -> None:
        if when == "after":
            await real(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_batch.Remote, name, dies)
        with pytest.raises(KeyboardInterrupt):
            run_batch(asked, poll_s=0.01)
    store = Store(tmp_path / "traces")
    assert store.counts()["sent"] == 30
    store.close()
    outcome = run_batch(asked, poll_s=0.01)
    assert outcome.counts["answered"] == 30 and outcome.purse.doubts == 0
    assert server.stats()["batches"] == 1 and server.stats()["billed"] == 30


def test_a_batch_within_the_budget(server: Server, tmp_path: Path) -> None:
    outcome = run_batch(job(server, tmp_path, texts(30), budget=Budget(answers=12)), poll_s=0.01)
    assert outcome.counts["answered"] == 12 and outcome.told.stopped and "budget" in outcome.told.stopped
    with pytest.raises(UserError, match="one teacher"):
        run_batch(job(server, tmp_path, texts(3), n=2))
