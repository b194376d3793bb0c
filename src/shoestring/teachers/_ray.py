"""Many processes asking into one store in PostgreSQL, on this machine or over a cluster, by Ray.

This process plans the job, then Ray runs the workers, each of them a session of `_session.run` that shares the store;
nothing passes between them but through it. A worker that dies is replaced, and what it had sent is in doubt, as after
any crash. Rates and concurrency of the options are the job's, divided among the workers. Keys come from the
environment of the workers' machines. Left out: workers that come and go while the job runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.progress import Progress
from shoestring.data.places import is_url, seat_at
from shoestring.data.postgres import PgStore
from shoestring.data.questions import Asked
from shoestring.teachers._ask import Asking
from shoestring.teachers._job import Api, plan, signature
from shoestring.teachers._lane import Told
from shoestring.teachers._price import usd
from shoestring.teachers._session import DRAIN, Job, Outcome, ask_longer, run

LOOK_S = 0.5  # between looks at the workers
DEATHS = 3  # for each worker there is, before the job is given up


def run_many(job: Job, workers: int, address: str | None) -> Outcome:
    """Ask what is missing with `workers` processes. Raises UserError for mistakes found before anything is sent."""
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1.")
    if not is_url(job.out):
        raise UserError("many workers share a store in PostgreSQL: --out postgresql://HOST/DATABASE.")
    if job.pilot:
        raise UserError("--dry-run asks from this process alone; leave out --workers.")
    ray = _ray()
    job = replace(job, share=True, apis=[_part_of(api, workers) for api in job.apis])
    started = time.monotonic()
    with seat_at(job.out, share=True) as seat:
        store, doubtful = seat.store, 0
        number = _plan(job, store)

        def follow(part: Job, planned: int) -> Told:
            nonlocal doubtful
            told, doubts = _follow(ray, part, workers, store, planned)
            doubtful += doubts
            return told

        with redirect_stdout(sys.stderr), _workers(ray, workers, address):  # Ray's words; the report is on stdout
            told = follow(job, number)
            ask_longer(job, store, number, told, lambda more: follow(more, _plan(more, store)))
        seat.take_over()
        seconds = time.monotonic() - started
        counts = store.counts(number)
        return Outcome(told, counts, store.read_purse(), seat.doubtful + doubtful, store.troubles(), seconds)


@contextmanager
def _workers(ray: Any, workers: int, address: str | None) -> Iterator[None]:
    """Ray with places for the workers."""
    ray.init(
        address=address, num_cpus=None if address else workers, include_dashboard=None if address else False,
        log_to_driver=False, ignore_reinit_error=True, logging_level="ERROR",
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError('many workers need Ray: pip install "shoestring[ray]".') from None
    return ray


def _part_of(api: Api, workers: int) -> Api:
    """A teacher's options for one of the workers; what is asked stays the same."""
    return replace(
        api, most=max(1, api.most // workers), start=max(1, api.start // workers), rpm=api.rpm / workers,
        tpm=api.tpm / workers,
    )  # fmt: skip


def _plan(job: Job, store: Any) -> int:
    """Put every question into the store, before any worker starts; the job's number."""
    number: int = store.job(signature(job.apis, job.identity, job.samples))
    lanes = [api.lane(store) for api in job.apis]
    with store.planning():
        if not store.is_planned(number):
            plan(store, number, job.source, job.apis, lanes, job.samples, skipped=job.skipped)
    if job.retry_failed:
        store.repeat_failed(number)
    store.halt(number, False)
    return number


def _follow(ray: Any, job: Job, workers: int, store: Any, number: int) -> tuple[Told, int]:
    """Run the workers to their end, in the place of each that dies another; what all of them did, rows in doubt."""
    apis = [api.once() for api in job.apis]
    part = replace(job, source=_planned_before, apis=apis, skipped=None, retry_failed=False, quiet=True)
    start = ray.remote(num_cpus=1, max_retries=0)(_work).remote
    running, whole, deaths, doubtful = [start(part, number) for _ in range(workers)], Told(), 0, 0
    total = sum(store.counts(number).values())
    with Progress(total, title="ask", unit="answers", quiet=job.quiet) as bar:
        while running:
            try:
                done, running = ray.wait(running, timeout=LOOK_S)
                for one in done:
                    try:
                        told, doubts = ray.get(one)
                        whole.add(told)
                        doubtful += doubts
                    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
                        deaths += 1
                        if deaths > DEATHS * workers:
                            raise UserError(f"{deaths} workers died, the last: {str(error)[:200]}") from error
                        running.append(start(part, number))
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause if isinstance(error.cause, UserError) else error from None
                _show(bar, store, number, len(running), deaths)
            except KeyboardInterrupt:
                store.halt(number, True)  # the workers keep what is in flight, and end
    return whole, doubtful


def _show(bar: Progress, store: Any, number: int, workers: int, deaths: int) -> None:
    purse = store.read_purse()
    facts: dict[str, Any] = {"$": usd(purse.spent), "in flight": float(purse.in_flight), "workers": float(workers)}
    if deaths:
        facts["died"] = float(deaths)
    bar.update(store.counts(number)["answered"], **facts)


def _planned_before() -> Iterator[Asked]:
    raise RuntimeError("the job was to be planned before its workers start")


def _work(job: Job, number: int) -> tuple[Told, int]:
    """One worker's session, in a process of Ray's; what it did, and how many rows in doubt of dead ones it found."""
    looked = time.monotonic()

    def watch(asking: Asking) -> None:
        nonlocal looked
        if time.monotonic() - looked > LOOK_S:
            looked = time.monotonic()
            if isinstance(asking.store, PgStore) and asking.store.halted(number):
                asking.stop(DRAIN)

    outcome = run(job, watch=watch)
    return outcome.told, outcome.doubtful
