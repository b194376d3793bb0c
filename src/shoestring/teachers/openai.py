"""Any OpenAI-compatible API: DeepSeek, vLLM, SGLang, OpenAI, or `shoestring serve`; asked as `shoestring ask` does.

Every answer goes through a traces store, so what was answered is never asked again. Left out: several teachers at
once and budgets by kind, which are the command's.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from shoestring.core.contracts import Question, Teacher
from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling, Trace
from shoestring.data.claims import Budget
from shoestring.data.questions import Asked
from shoestring.data.store import Store
from shoestring.data.traces import TraceIds, stored, texts
from shoestring.data.workers import Worker
from shoestring.teachers._ask import Asking
from shoestring.teachers._job import Api, plan, signature
from shoestring.teachers._price import pico

BATCH = 2000  # questions asked together; their traces are yielded when all are there


class OpenAITeacher:
    """Answers from `api`. store: a folder that keeps every answer, so that a second run costs nothing; None: none.

    budget_usd: over the store's life. Raises UserError when the job is stopped: key, credit, budget, no server.
    """

    def __init__(self, api: Api, *, store: str | Path | None = None, budget_usd: float | None = None) -> None:
        api.check()
        self.name, self.licence = api.title, api.licence or "unknown"
        self._api, self._store = api, store
        self._budget = Budget(None if budget_usd is None else pico(budget_usd))

    def answer(self, questions: Iterable[Question], sampling: Sampling) -> Iterator[Trace]:
        """`sampling.n` traces for each question, in the order of the questions."""
        api = replace(
            self._api, max_tokens=sampling.max_new_tokens, decoding={**_decoding(sampling), **self._api.decoding}
        )
        stream = iter(questions)
        with tempfile.TemporaryDirectory() as folder:
            while batch := list(islice(stream, BATCH)):
                yield from self._answer(api, batch, sampling.n, Path(self._store or folder))

    def _answer(self, api: Api, batch: list[Question], samples: int, folder: Path) -> Iterator[Trace]:
        asked = [_asked(question) for question in batch]
        ids = TraceIds(api.title, api.asked)
        wanted = [trace for one in asked for trace in ids.of(texts(one.messages)[0], samples)]
        with Worker(folder) as worker:
            store = Store(folder, create=True)
            try:
                worker.register(store)
                store.budget = self._budget
                job = store.job(signature([api], str(wanted), samples))
                asyncio.run(_ask(api, store, job, asked, samples))
                traces = _traces(store, set(wanted))
            finally:
                store.close()
        yield from (traces[trace] for trace in wanted)


async def _ask(api: Api, store: Store, job: int, asked: list[Asked], samples: int) -> None:
    lane = api.lane(store)
    plan(store, job, lambda: iter(asked), [api], [lane], samples)
    told = await Asking(store, job, [lane]).run()
    if told.stopped:
        raise UserError(f"{told.stopped}.")
    if told.failed:
        kind, (_, words) = next(iter(store.troubles().items()))
        raise UserError(f"{api.title} did not answer {told.failed} of the questions ({kind}: {words}).")


def _traces(store: Store, wanted: set[str]) -> dict[str, Trace]:
    return {trace.id: trace for _, trace in stored(store.base) if trace.id in wanted}


def _asked(question: Question) -> Asked:
    messages = [{"role": message.role, "content": message.content} for message in question.messages]
    return Asked(messages, question.id or None, asdict(question.problem) if question.problem else None)


def _decoding(sampling: Sampling) -> dict[str, Any]:
    """What differs from an API's own defaults."""
    values: dict[str, Any] = {"temperature": sampling.temperature}
    if sampling.top_p < 1.0:
        values["top_p"] = sampling.top_p
    if sampling.top_k:
        values["top_k"] = sampling.top_k
    if sampling.seed is not None:
        values["seed"] = sampling.seed
    return values


def teacher(
    *, url: str, model: str, licence: str, store: str | None = None, budget_usd: float | None = None, **options: Any
) -> Teacher:
    """Ask `model` at `url`; `options` are those of Api (key: the environment variable that holds the key)."""
    try:
        api = Api(url, model, licence=licence, **options)
    except TypeError as error:
        raise UserError(f"teacher openai: {error}.") from None
    return OpenAITeacher(api, store=store, budget_usd=budget_usd)
