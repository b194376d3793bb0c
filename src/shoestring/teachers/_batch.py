"""Batch APIs: upload a file of requests, wait up to a day, collect the answers at a discount (OpenAI's wire).

Rows of a batch are claimed, and the batch numbered, before anything is uploaded. The number goes with it as metadata:
after a crash a batch that was made and not noted is found by it, and never made twice. Results come in any order and
are matched by `custom_id`, the trace's id, and settled while they are read; failed ones stand in a file of their own;
expired ones are asked again.
At most 50,000 rows and 190 MB a batch, one batch at a time. Left out: cancelling a batch, several samples a request.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import aiohttp

from shoestring.core.errors import UserError
from shoestring.data.batches import claim_batch, settle_batch
from shoestring.data.claims import GRANTED, Answer, Claim, Returned, Row, Settled
from shoestring.data.places import AnyStore, seat_at
from shoestring.teachers._ask import TEMPLATE_TOKENS
from shoestring.teachers._job import plan, signature
from shoestring.teachers._lane import Lane, Told
from shoestring.teachers._remote import TOGETHER, Remote, batched
from shoestring.teachers._send import check_url, key_from
from shoestring.teachers._session import Job, Outcome, ask_longer
from shoestring.teachers._wire import Reply, Trouble, answer_body, read_reply, refusal

MOST_ROWS, MOST_BYTES = 50_000, 190_000_000
PATIENCE_S = 3600.0  # without any answer: a batch itself may take a day


def run_batch(job: Job, *, poll_s: float = 30.0) -> Outcome:
    """Ask what is missing through the provider's batch API. Raises UserError for mistakes and for its refusals."""
    if len(job.apis) != 1 or job.apis[0].n != 1 or job.share:
        raise UserError("--batch asks one teacher, one sample a request, from one process.")
    with seat_at(job.out) as seat:
        store = seat.store
        store.budget = job.budget
        started = time.monotonic()
        told, number = asyncio.run(_session(job, store, poll_s))
        ask_longer(job, store, number, told, lambda more: asyncio.run(_session(more, store, poll_s))[0])
        seconds = time.monotonic() - started
        return Outcome(told, store.counts(number), store.read_purse(), seat.doubtful, store.troubles(), seconds)


async def _session(job: Job, store: AnyStore, poll_s: float) -> tuple[Told, int]:
    api = job.apis[0]
    number = store.job(signature(job.apis, job.identity, job.samples))
    lane = api.lane(store)
    with store.planning():
        if not store.is_planned(number):
            plan(store, number, job.source, job.apis, [lane], job.samples, skipped=job.skipped)
    if job.retry_failed:
        store.repeat_failed(number)
    key = key_from(api.key)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base = check_url(api.url).removesuffix("/chat/completions")
    patience = PATIENCE_S if api.patience_s is None else api.patience_s
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=600)) as session:
        batches = Batches(store, lane, Remote(session, base, poll_s, patience))
        for open_ in batches.open():
            await batches.finish(open_)
        while batches.told.stopped is None and (rows := batches.claim(number)):
            await batches.finish(rows)
    return batches.told, number


class Batches:
    """Batches of one lane: claimed in the store, made at the provider, collected."""

    def __init__(self, store: AnyStore, lane: Lane, remote: Remote) -> None:
        self._store, self._lane, self._remote, self._sql = store, lane, remote, store.sql
        self.told = Told()

    def claim(self, job: int) -> int | None:
        """Claim as many planned rows as a batch and the budget hold; the batch's number, None when there are none."""
        number, granted = claim_batch(
            self._store, job, self._lane.how, self._claim_of, rows=MOST_ROWS, size=MOST_BYTES - 2**20
        )
        if GRANTED in granted:
            return number
        if granted:
            self._sql.execute("UPDATE batches SET done = 1 WHERE id = ?", (number,))
            self.told.stopped = "the budget does not allow another question; raise it and run the same command again"
        return None

    def open(self) -> list[int]:
        """Batches that are not done, but for those of other teachers, parameters or answers asked longer."""
        found = self._sql.execute(
            "SELECT id FROM batches b WHERE done = 0 AND NOT EXISTS "
            "(SELECT 1 FROM rows WHERE state = 1 AND worker = -b.id AND how != ?) ORDER BY id", (self._lane.how,),
        )  # fmt: skip
        return [number for (number,) in found.fetchall()]

    async def finish(self, number: int) -> None:
        """Make batch `number` if it is not made, wait for it, and settle what came."""
        (remote,) = self._sql.execute("SELECT remote FROM batches WHERE id = ?", (number,)).fetchone()
        rows = self._rows(number)
        if rows:
            try:
                if remote is None:
                    mark = f"{rows[0][0].trace}-{number}"
                    remote = await self._remote.make(self._file(rows), mark)
                    self._sql.execute("UPDATE batches SET remote = ? WHERE id = ?", (remote, number))
                batch = await self._remote.wait(remote)
                await self._collect(number, rows, batch)
            except Trouble as trouble:
                raise UserError(f"{self._lane.name}: {trouble}.") from trouble
            if batch["status"] == "failed":
                raise UserError(f"{self._lane.name} refused the batch: {_why(batch)}.")
        self._sql.execute("UPDATE batches SET done = 1 WHERE id = ?", (number,))

    async def _collect(self, number: int, rows: list[tuple[Row, Claim]], batch: dict[str, Any]) -> None:
        """Settle answers as they are read; then, of rows without one, what the files say or do not say.

        A row may stand in both files, or twice in one: an answer goes before any failure, the first before others.
        """
        left = {row.trace: (row, claim) for row, claim in rows}
        failures: dict[str, Trouble] = {}
        broken = 0
        for name in ("output_file_id", "error_file_id"):
            async for results in self._remote.results(batch.get(name)):
                ops: list[Settled | Returned] = []
                for result in results:
                    if result is None:
                        broken += 1
                    elif (trace := str(result.get("custom_id"))) in left:
                        try:
                            reply = _reply_in(result)
                        except Trouble as trouble:
                            failures[trace] = trouble
                        else:
                            ops.append(self._settled(*left.pop(trace), reply))
                settle_batch(self._store, number, ops)
        missing = Trouble("expired", "the batch ended without this row")
        if broken:  # perhaps this one's, and then it was paid for
            missing = Trouble("not JSON", f"{broken} lines of the batch's results are broken", doubt=True)
        for some in batched(left.values(), TOGETHER):
            ops = []
            for row, claim in some:
                why = failures.get(row.trace, missing)
                final = row.attempts >= self._lane.tries or why.then == "never"
                ops.append(self._returned(claim, why, final))
            settle_batch(self._store, number, ops)

    def _returned(self, claim: Claim, trouble: Trouble, final: bool) -> Returned:
        self.told.errors[trouble.kind] += 1
        self.told.failed += final
        return Returned(claim, trouble.doubt, trouble.turn, final, trouble.kind, trouble.told)

    def _settled(self, row: Row, claim: Claim, reply: Reply) -> Settled:
        told, choice = self.told, reply.choices[0]
        tokens_in = reply.tokens_in if reply.tokens_in is not None else len(row.messages.encode()) + TEMPLATE_TOKENS
        tokens_out = reply.tokens_out if reply.tokens_out is not None else self._lane.max_tokens
        told.estimated += reply.tokens_in is None or reply.tokens_out is None
        pico = self._lane.rate.cost(tokens_in, tokens_out, reply.cached)
        told.tokens_in, told.tokens_out, told.pico = (
            told.tokens_in + tokens_in,
            told.tokens_out + tokens_out,
            told.pico + pico,
        )
        if reply.model != self._lane.model and reply.model:
            told.other_models[reply.model] += 1
        told.truncated += choice.finish == "length"
        if choice.finish == "length" and self._lane.drop_cut:
            told.failed += 1
            return Settled(claim, [], (), pico, tokens_in + tokens_out, (row.id,))
        told.answers += 1
        date = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        answer = Answer(row.id, choice.finish, tokens_in, tokens_out, pico, date, answer_body(choice, reply))
        return Settled(claim, [answer], (), pico, tokens_in + tokens_out)

    def _claim_of(self, row: Row) -> Claim:
        tokens_in, tokens_out = len(row.messages.encode()) + TEMPLATE_TOKENS, self._lane.max_tokens
        return Claim((row.id,), self._lane.rate.cost(tokens_in, tokens_out), tokens_in + tokens_out)

    def _rows(self, number: int) -> list[tuple[Row, Claim]]:
        """The rows of a batch that are not settled, with what was claimed for them."""
        cursor = self._sql.execute(
            "SELECT r.id, r.trace, r.sample, r.attempts, r.turn, r.question, q.messages, r.reserved, r.reserved_tokens "
            "FROM rows r JOIN questions q ON q.id = r.question WHERE r.state = 1 AND r.worker = ? ORDER BY r.id",
            (-number,),
        )
        return [(Row._make(found[:7]), Claim((found[0],), found[7], found[8])) for found in cursor]

    def _file(self, rows: list[tuple[Row, Claim]]) -> bytes:
        return b"".join(self._lines(rows))

    def _lines(self, rows: list[tuple[Row, Claim]]) -> Iterator[bytes]:
        for row, _ in rows:
            body = self._lane.body.encode(row.messages, row.sample).decode()
            yield (
                f'{{"custom_id": "{row.trace}", "method": "POST", "url": "/v1/chat/completions", "body": {body}}}\n'
            ).encode()


def _reply_in(result: dict[str, Any]) -> Reply:
    """What a line of the results answers. Raises Trouble."""
    response, error = result.get("response"), result.get("error")
    response = response if isinstance(response, dict) else {}
    if not response and isinstance(error, dict) and "expired" in str(error.get("code")):
        raise Trouble("expired", str(error.get("message") or "the batch ended before this row's turn")[:300])
    body = json.dumps(response.get("body") or error or {}).encode()
    status = str(response.get("status_code") or 500)
    if status == "200":
        return read_reply(body)
    raise refusal(int(status) if status.isdecimal() and len(status) == 3 else 500, {}, body, None)


def _why(batch: dict[str, Any]) -> str:
    """What the provider says of a batch it refused."""
    errors = batch.get("errors")
    rows = errors.get("data") if isinstance(errors, dict) else None
    words = [str(row.get("message")) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return "; ".join(words) or "no reason given"
