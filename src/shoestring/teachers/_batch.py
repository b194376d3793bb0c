"""Batch APIs: upload a file of requests, wait up to a day, collect the answers at a discount (OpenAI's wire).

Rows of a batch are claimed, and the batch numbered, before anything is uploaded. The number goes with it as metadata:
after a crash a batch that was made and not noted is found by it, and never made twice. Results come in any order and
are matched by `custom_id`, the trace's id; failed ones stand in a file of their own; expired ones are asked again.
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
from shoestring.teachers._send import check_url, key_from
from shoestring.teachers._session import Job, Outcome, ask_longer
from shoestring.teachers._wire import Reply, Trouble, answer_body, read_reply, refusal

MOST_ROWS, MOST_BYTES = 50_000, 190_000_000
ENDED = ("completed", "failed", "expired", "cancelled")
TOGETHER = 1000  # rows settled in one transaction


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
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=600)) as session:
        batches = Batches(store, lane, Remote(session, base, poll_s))
        for open_ in batches.open():
            await batches.finish(open_)
        while batches.told.stopped is None and (rows := batches.claim(number)):
            await batches.finish(rows)
    return batches.told, number


class Remote:
    """The provider's files and batches."""

    def __init__(self, session: aiohttp.ClientSession, base: str, poll_s: float) -> None:
        self._session, self._base, self._poll_s = session, base, poll_s

    async def make(self, lines: bytes, mark: str) -> str:
        """Upload `lines` and make a batch of them, unless one with this mark is there; its id."""
        for batch in (await self._call("GET", "/batches?limit=100")).get("data") or ():
            if (batch.get("metadata") or {}).get("shoestring") == mark:
                return str(batch["id"])
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", lines, filename=f"{mark}.jsonl", content_type="application/jsonl")
        file = await self._call("POST", "/files", data=form)
        batch = await self._call("POST", "/batches", json={
            "input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h",
            "metadata": {"shoestring": mark},
        })  # fmt: skip
        return str(batch["id"])

    async def wait(self, remote: str) -> dict[str, Any]:
        """The batch, once it has ended. A server that is away for a while is asked again."""
        while True:
            try:
                batch = await self._call("GET", f"/batches/{remote}")
                if batch.get("status") in ENDED:
                    return batch
            except Trouble as trouble:
                if trouble.then in ("stop", "never"):
                    raise
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(self._poll_s)

    async def lines(self, file: str | None) -> list[dict[str, Any]]:
        """The rows of a file; none when there is no file."""
        if not file:
            return []
        async with self._session.get(f"{self._base}/files/{file}/content") as response:
            body = await response.read()
            if response.status != 200:
                raise refusal(response.status, response.headers, body, None)
        return [json.loads(line) for line in body.splitlines() if line.strip()]

    async def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        async with self._session.request(method, f"{self._base}{path}", allow_redirects=False, **options) as response:
            body = await response.read()
            if response.status not in (200, 201):
                raise refusal(response.status, response.headers, body, None)
        found: dict[str, Any] = json.loads(body)
        return found


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
                results = await self._remote.lines(batch.get("output_file_id"))
                results += await self._remote.lines(batch.get("error_file_id"))
            except Trouble as trouble:
                raise UserError(f"{self._lane.name}: {trouble}.") from trouble
            self._settle(number, rows, results, batch)
        self._sql.execute("UPDATE batches SET done = 1 WHERE id = ?", (number,))

    def _settle(
        self, number: int, rows: list[tuple[Row, Claim]], results: list[dict[str, Any]], batch: dict[str, Any]
    ) -> None:
        found = {str(result.get("custom_id")): result for result in results}
        for start in range(0, len(rows), TOGETHER):
            ops = [self._op(row, claim, found.get(row.trace)) for row, claim in rows[start : start + TOGETHER]]
            settle_batch(self._store, number, ops)
        if batch["status"] == "failed":
            words = (
                "; ".join(str(e.get("message")) for e in (batch.get("errors") or {}).get("data") or ()) or "no reason"
            )
            raise UserError(f"{self._lane.name} refused the batch: {words}.")

    def _op(self, row: Row, claim: Claim, result: dict[str, Any] | None) -> Settled | Returned:
        final = row.attempts >= self._lane.tries
        if result is None:
            return self._returned(claim, Trouble("expired", "the batch ended without this row"), final)
        response = result.get("response") or {}
        body = json.dumps(response.get("body") or result.get("error") or {}).encode()
        try:
            if response.get("status_code") != 200:
                raise refusal(int(response.get("status_code") or 500), {}, body, None)
            return self._settled(row, claim, read_reply(body))
        except Trouble as trouble:
            return self._returned(claim, trouble, final or trouble.then == "never")

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
