"""A whole session of asking: the store's lock, planning, the pilot, the loop, Ctrl-C, and what came of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.garbage import seldom_searched
from shoestring.core.progress import Progress
from shoestring.data.claims import Budget, Purse
from shoestring.data.far import Far
from shoestring.data.journal import apart
from shoestring.data.places import AnyStore, Seat, seat_at
from shoestring.data.questions import Asked, Skipped
from shoestring.teachers._ask import Asking
from shoestring.teachers._job import Api, plan, signature
from shoestring.teachers._lane import Lane, Told
from shoestring.teachers._price import usd

PILOT = 20
DRAIN = "interrupted; what was in flight is kept, and the same command goes on"


@dataclass(frozen=True, slots=True)
class Job:
    """What to ask: questions, teachers, samples, limits; where the answers go."""

    out: Path | str  # a folder, or the address of a PostgreSQL database
    source: Callable[[], Iterator[Asked]]
    identity: str
    apis: Sequence[Api]
    samples: int = 1
    budget: Budget = field(default_factory=Budget)
    share: bool = False
    retry_failed: bool = False
    pilot: bool = False  # ask PILOT questions spread over the job, to price the rest
    skipped: Skipped | None = None
    quiet: bool = True


@dataclass(slots=True)
class Outcome:
    """What a session did (`told`), and what stands in the store (`counts` of this job, `purse` of all jobs)."""

    told: Told
    counts: dict[str, int]
    purse: Purse
    doubtful: int  # rows that a dead session left as sent, found at the start of this one
    troubles: dict[str, tuple[int, str]]
    seconds: float
    forecast: dict[str, Any] | None = None

    def report(self) -> dict[str, Any]:
        """For --json and the page."""
        told, purse = self.told, self.purse
        return {
            "schema": 1, "asked": sum(self.counts.values()), **self.counts, "answers_now": told.answers,
            "seconds": round(self.seconds, 3), "answers_per_s": told.answers / self.seconds if self.seconds else 0.0,
            "tokens_in": told.tokens_in, "tokens_out": told.tokens_out, "cached_tokens": told.cached,
            "truncated": told.truncated, "content_filter": told.filtered, "estimated_usage": told.estimated,
            "over_estimate": told.over_estimate, "errors": dict(told.errors), "other_models": dict(told.other_models),
            "spent_usd": usd(purse.spent), "spent_now_usd": usd(told.pico), "in_doubt_usd": usd(purse.doubt),
            "in_doubt_rows": purse.doubts, "found_in_doubt": self.doubtful, "sends": purse.sends,
            "accepted": told.accepted, "graded_sample": told.graded,
            "asked_longer": told.asked_longer, "whole_longer": told.whole_longer, "stopped": told.stopped,
            "forecast": self.forecast,
        }  # fmt: skip


def run(job: Job, *, watch: Callable[[Asking], None] | None = None) -> Outcome:
    """Ask what is missing. Raises UserError for mistakes found before anything is sent, DiskFull."""
    for api in job.apis:
        api.check()
    if job.budget == Budget() and any(api.rate().output or api.rate().input for api in job.apis):
        raise UserError(
            "asking a paid teacher needs a limit over the life of --out: --budget USD (or of tokens or answers)."
        )
    with seat_at(job.out, share=job.share) as seat:
        store = seat.store
        store.budget = job.budget
        started = time.monotonic()
        told, number = asyncio.run(_session(job, seat, watch))
        if not job.pilot:
            ask_longer(job, store, number, told, lambda more: asyncio.run(_session(more, seat, watch))[0])
        seconds = time.monotonic() - started
        forecast = _forecast(store, number) if job.pilot else None
        return Outcome(
            told, store.counts(number), store.read_purse(), seat.doubtful, store.troubles(), seconds, forecast
        )


def ask_longer(job: Job, store: AnyStore, number: int, told: Told, ask: Callable[[Job], Told]) -> None:
    """Have `ask` ask once more, with more tokens, where answers of job `number` were cut off and `truncated` says so;
    added to `told`."""
    if not any(api.truncated == "longer" for api in job.apis):
        return
    groups: dict[int, list[Asked]] = {}
    for messages, problem, count in store.cut(number) if told.stopped is None else ():
        groups.setdefault(count, []).append(Asked(json.loads(messages), None, json.loads(problem) if problem else None))
    for count, questions in sorted(groups.items()):
        if told.stopped is None:
            these = hashlib.sha256(repr([one.messages for one in questions]).encode()).hexdigest()
            more = ask(replace(
                job, source=partial(iter, questions), identity=f"{job.identity}|longer|{count}|{these}", samples=count,
                apis=[api.longer() for api in job.apis], skipped=None,
            ))  # fmt: skip
            told.add(more)
            told.asked_longer += more.answers
            told.whole_longer += more.answers - more.truncated


async def _session(job: Job, seat: Seat, watch: Callable[[Asking], None] | None) -> tuple[Told, int]:
    store = seat.store
    number = store.job(signature(job.apis, job.identity, job.samples))
    lanes = [api.lane(store) for api in job.apis]
    far = _planned(job, store, number, lanes)
    counts = store.counts(number)
    total = sum(counts.values())
    with Progress(total, title="ask", unit="answers", quiet=job.quiet) as bar:
        show = _shown(bar, counts["answered"])

        def tick(asking: Asking) -> None:
            show(asking)
            if watch is not None:
                watch(asking)

        asking = Asking(store, number, lanes, rows=counts["planned"], far=far, tick=tick)
        with _interruptible(asking):
            told = await asking.run()
            while job.share and told.stopped is None and seat.take_over():  # of workers that died meanwhile
                for lane in lanes:
                    lane.drained, lane.last = False, 0
                told = await asking.run()
    return told, number


def _planned(job: Job, store: AnyStore, number: int, lanes: Sequence[Lane]) -> Far | None:
    """Plan what is not planned yet; the process that wrote it, if it took one."""
    far: Far | None = None

    def writer(rows: int) -> Far | None:
        nonlocal far
        far = apart(store, rows)
        return far

    try:
        with seldom_searched(), store.planning():
            if not store.is_planned(number):
                plan(store, number, job.source, job.apis, lanes, job.samples, skipped=job.skipped, apart=writer)
        if job.retry_failed:
            store.repeat_failed(number)
        if job.pilot:
            _spread(store, number, lanes)
    except BaseException:
        if far is not None:
            far.quit()
        raise
    return far


def _shown(bar: Progress, before: int, clock: Callable[[], float] = time.monotonic) -> Callable[[Asking], None]:
    """What the bar says: answers, tokens, spend and its forecast, errors, requests in flight."""
    started = clock()

    def show(asking: Asking) -> None:
        told, purse = asking.told, asking.journal.purse
        facts: dict[str, float] = {"$": usd(purse.spent)}
        if told.answers and clock() > started:
            facts = {"answers/s": told.answers / (clock() - started)} | facts
        if told.answers and told.pico:
            facts["$ at the end"] = usd(
                purse.spent + told.pico * (int(bar.total) - before - told.answers) // told.answers
            )
        if purse.doubt:
            facts["$ in doubt"] = usd(purse.doubt)
        if (share := told.accepted) is not None:
            facts["accepted"] = share
        facts |= {"in flight": asking.in_flight} | {kind: float(n) for kind, n in told.errors.most_common(3)}
        bar.update(before + told.answers, tokens=told.tokens_in + told.tokens_out, **facts)

    return show


@contextmanager
def _interruptible(asking: Asking) -> Iterator[None]:
    """Ctrl-C and SIGTERM: send no more, keep what is in flight; a second one leaves at once."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def stop() -> None:
        if asking.stopping and task is not None:
            task.cancel()
        asking.stop(DRAIN)

    with suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread: the owner's business
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        with suppress(NotImplementedError, RuntimeError, ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _spread(store: AnyStore, number: int, lanes: Sequence[Lane]) -> None:
    """Give the lanes PILOT rows in all, evenly over the job, unless as many have been answered."""
    answered = store.counts(number)["answered"]
    for lane in lanes:
        lane.drained = True
        lane.fresh.extend(store.spread(number, lane.how, max(0, PILOT - answered) // len(lanes)))


def _forecast(store: AnyStore, number: int) -> dict[str, Any]:
    """What the whole job costs, from the answers there are: mean x questions, with a 95 % interval; and at worst."""
    rows = store.costs(number)
    counts = store.counts(number)
    total = sum(counts.values())
    costs = [float(pico) for pico, _, _ in rows]
    if not costs:
        return {"answers": 0, "questions": total, "usd": None, "usd_95": None}
    mean = fmean(costs)
    error = 1.96 * stdev(costs) / sqrt(len(costs)) if len(costs) > 1 else mean
    spread = [max(0.0, mean - error) * total / 1e12, (mean + error) * total / 1e12]
    return {
        "answers": len(costs), "questions": total, "usd": mean * total / 1e12, "usd_95": spread,
        "tokens_in": fmean(r[2] for r in rows), "tokens_out": fmean(r[1] for r in rows),
        "left_usd": mean * (total - counts["answered"]) / 1e12,
    }  # fmt: skip
