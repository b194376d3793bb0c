"""Asking a teacher in this process, or recorded answers, into the same store: a checkpoint, a run, an export.

Nothing is paid for and nothing is in flight when this process dies, so rows go from planned to answered in one step.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from shoestring.core.contracts import Question, Teacher
from shoestring.core.errors import UserError
from shoestring.core.nouns import Message, Sampling, Trace
from shoestring.core.progress import Progress
from shoestring.core.registry import load_part
from shoestring.core.run import Run
from shoestring.data.claims import Answer, Claim, Planned, Row, Settled
from shoestring.data.questions import Asked
from shoestring.data.store import Store
from shoestring.data.traces import TraceIds, body_of, canonical, question_hash, texts
from shoestring.data.workers import Worker
from shoestring.teachers._lane import Told
from shoestring.teachers._session import Outcome

TOGETHER = 128  # rows answered in one call
PLANNED_TOGETHER = 1000


def is_local(teacher: str) -> bool:
    """Whether a teacher is named by a path here and not by an address."""
    return "://" not in teacher and Path(teacher).exists()


def load_local(teacher: str, *, name: str | None, licence: str | None, thinking: bool = True) -> Teacher:
    """A checkpoint's or run's engine, or the replay of a store or an export. Raises UserError.

    thinking: what a model says in another form than <think>...</think>answer is no answer.
    """
    path = Path(teacher)
    if path.suffix in (".jsonl", ".db") or (path / "traces.db").is_file():
        found: Teacher = load_part("teachers", "replay").teacher(traces=path / "traces.db" if path.is_dir() else path)
        return found
    if (path / "manifest.json").is_file():
        latest = Run.load(path).latest_checkpoint()
        if latest is None:
            raise UserError(f"{path} is a run without a checkpoint; give one that trained a model.")
        path = latest[1]
    engine: Teacher = load_part("teachers", "engine").teacher(
        model=str(path), licence=licence or "own model", name=name or teacher.rstrip("/"), thinking=thinking
    )
    return engine


def run_local(
    out: Path, teacher: Teacher, source: Callable[[], Iterator[Asked]], identity: str, samples: int, sampling: Sampling,
    *, quiet: bool = True,
) -> Outcome:  # fmt: skip
    """Ask what is missing; as `_session.run` does over HTTP. Raises UserError."""
    decoding = decoding_of(sampling)
    fields = {"teacher": teacher.name, "licence": teacher.licence, "decoding": decoding}
    digest = hashlib.sha256(canonical(fields).encode()).hexdigest()
    with Worker(out) as worker:
        store = Store(out, create=True)
        try:
            doubtful = worker.register(store)
            how = store.how(digest, fields)
            job = store.job(hashlib.sha256(canonical([digest, identity, samples]).encode()).hexdigest())
            if not store.is_planned(job):
                _plan(store, job, how, TraceIds(teacher.name, decoding), source(), samples)
            started, told = time.monotonic(), Told()
            with Progress(sum(store.counts(job).values()), title="ask", unit="answers", quiet=quiet) as bar:
                before, last = store.counts(job)["answered"], 0
                while rows := store.planned(job, how, last, rows=TOGETHER):
                    last = rows[-1].id
                    _answer(store, teacher, rows, sampling, told)
                    bar.update(before + told.answers, tokens=told.tokens_in + told.tokens_out)
            seconds = time.monotonic() - started
            return Outcome(told, store.counts(job), store.read_purse(), doubtful, store.troubles(), seconds)
        finally:
            store.close()


def decoding_of(sampling: Sampling) -> dict[str, Any]:
    """What identifies the answers of a teacher in this process, beside its name."""
    found = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
             "seed": sampling.seed}  # fmt: skip
    return found | ({"stop_ids": list(sampling.stop_ids)} if sampling.stop_ids else {})


def _plan(store: Store, job: int, how: int, ids: TraceIds, asked: Iterator[Asked], samples: int) -> None:
    while chunk := list(islice(asked, PLANNED_TOGETHER)):
        planned = []
        for one in chunk:
            escaped, text = texts(one.messages)
            problem = canonical(one.problem) if one.problem else None
            planned.append(Planned(question_hash(escaped), text, one.ref, problem, ids.of(escaped, samples)))
        store.plan(planned, how, job)
    store.set_planned(job)


def _answer(store: Store, teacher: Teacher, rows: list[Row], sampling: Sampling, told: Told) -> None:
    """Answer `rows` and keep what came. Their seed is a function of the job's and of the first row."""
    questions = [
        Question(tuple(Message(m["role"], m["content"]) for m in json.loads(row.messages)), id=row.trace)
        for row in rows
    ]
    seed = None if sampling.seed is None else (sampling.seed * 1_000_003 + rows[0].id) % (1 << 62)
    traces = list(teacher.answer(questions, replace(sampling, n=1, seed=seed)))
    claims = [Claim((row.id,), 0, 0) for row in rows]
    answers = [_kept(row, trace) for row, trace in zip(rows, traces, strict=True)]
    store.apply(claims)
    store.apply([
        Settled(claim, [answer], (), answer.pico, answer.tokens_in + answer.tokens_out)
        for claim, answer in zip(claims, answers, strict=True)
    ])  # fmt: skip
    told.answers += len(rows)
    told.tokens_in += sum(answer.tokens_in for answer in answers)
    told.tokens_out += sum(answer.tokens_out for answer in answers)
    told.truncated += sum(answer.finish == "length" for answer in answers)


def _kept(row: Row, trace: Trace) -> Answer:
    usage = trace.usage
    decoding = trace.decoding | {"sample": row.sample}
    body = body_of(replace(trace, decoding=decoding), without=("task", "problem_id"))
    return Answer(row.id, trace.finish_reason, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), 0,
                  trace.date, body)  # fmt: skip
