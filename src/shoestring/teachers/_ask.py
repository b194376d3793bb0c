"""The loop that asks: rows from the store, claims on disk before each send, answers into the journal.

As many workers as requests may be at once, each: take a row, wait for a place (pace), claim it (budget and store),
send, and settle what came. A failed attempt gives its claim back and is claimed again, so that whatever stands in the
store as sent is in flight.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from shoestring.core.garbage import seldom_searched
from shoestring.data.claims import GRANTED, POOR, Answer, Claim, Returned, Row, Settled
from shoestring.data.far import Far
from shoestring.data.journal import Journal, open_journal
from shoestring.data.places import AnyStore
from shoestring.teachers._accept import Acceptance
from shoestring.teachers._lane import Lane, Told
from shoestring.teachers._send import Sender
from shoestring.teachers._wire import Reply, Trouble, answer_body, read_reply, read_stream

TEMPLATE_TOKENS = 64  # a chat template adds at most, beside one token a byte of what is asked
MOST_BACKOFF_S = 60.0


class Asking:
    """One session of asking. `await run()` once; `stop()` ends it after what is in flight."""

    def __init__(
        self, store: AnyStore, job: int, lanes: list[Lane], *, rows: int = 0, far: Far | None = None,
        tick: Callable[[Asking], None] | None = None, tick_s: float = 0.5,
    ) -> None:  # fmt: skip
        self.store, self.job, self.lanes, self.rows, self.far = store, job, lanes, rows, far
        self.told = Told()
        self.in_flight = 0
        self.settlements = 0
        self._tick, self._tick_s = tick, tick_s
        self._freed = asyncio.Event()
        self._random = random.Random()
        self._error: Exception | None = None
        self._second, self._date = -1, ""
        self.journal: Journal

    @property
    def stopping(self) -> bool:
        return self.told.stopped is not None

    def stop(self, why: str, *, mistake: bool = False) -> None:
        """Send nothing more."""
        if self.told.stopped is None:
            self.told.stopped, self.told.mistake = why, mistake
        self._freed.set()
        for lane in self.lanes:
            lane.pace.release_all()

    async def run(self) -> Told:
        """Ask until nothing is left or something stops it. Raises DiskFull and the errors of the program."""
        with seldom_searched():
            await self._run()
        if self._error is not None:
            raise self._error
        if self._tick:
            self._tick(self)
        return self.told

    async def _run(self) -> None:
        self.journal, self.far = await open_journal(self.store, self.rows, self.far), None  # which runs once
        acceptance = self._acceptance = Acceptance(self.store)
        acceptance.start()
        ticking = asyncio.create_task(self._ticks())
        workers = [asyncio.create_task(self._work(lane)) for lane in self.lanes for _ in range(lane.pace.most)]
        ends: list[asyncio.Future[Any]] = [asyncio.gather(*workers), self.journal.lost]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self.journal.lost.done():  # what is in flight could not be kept
                self.stop(self.journal.lost.result())
            else:
                ends[0].result()
        finally:
            for task in (ticking, *workers):
                task.cancel()
            told, *_ = await asyncio.gather(ticking, *workers, return_exceptions=True)
            if isinstance(told, Exception):  # a display that failed stops nothing, and is not passed over
                self._error = self._error or told
            try:
                await self.journal.close()
            finally:  # on a full disk too: acceptance reads the store, which is closed next
                await asyncio.to_thread(acceptance.stop)
                self._grades()

    async def _ticks(self) -> None:
        while self._tick:
            await asyncio.sleep(self._tick_s)
            self._grades()
            self._tick(self)

    def _grades(self) -> None:
        self.told.graded, self.told.right = self._acceptance.graded, self._acceptance.right

    async def _work(self, lane: Lane) -> None:
        async with _closing(lane.sender):
            try:
                while not self.stopping and (rows := self._take(lane)):
                    await self._put(lane, rows)
            except Exception as error:  # a full disk, or a fault of ours: what is in flight still comes in and is kept
                self._error = self._error or error
                self.stop(str(error))

    def _take(self, lane: Lane) -> list[Row]:
        """The next request's rows: open samples of one question, `lane.n` at most."""
        if not lane.fresh and not lane.drained:
            rows = self.store.planned(self.job, lane.how, lane.last)
            lane.drained = not rows
            if rows:
                lane.last = rows[-1].id
            if self.store.share and lane.n == 1:
                self._random.shuffle(rows)  # so that two processes seldom reach for the same row
            lane.fresh.extend(rows)
        if not lane.fresh:
            return []
        rows = [lane.fresh.popleft()]
        while len(rows) < lane.n and lane.fresh and lane.fresh[0].question == rows[0].question:
            rows.append(lane.fresh.popleft())
        return rows

    async def _put(self, lane: Lane, rows: list[Row]) -> None:
        """Put one question until it has its answers or fails for good."""
        attempts, turns = 0, rows[0].turn
        while rows and not self.stopping:
            claim = self._claim_of(lane, rows)
            if not lane.pace.try_enter(claim.tokens):
                await lane.pace.enter(claim.tokens)
            if self.stopping:
                lane.pace.leave()
                return
            granted = await self._granted(lane, claim)
            if granted != GRANTED:
                lane.pace.leave()
                if granted == POOR:
                    continue
                return  # another process has it
            attempts += 1
            body = lane.body.encode(rows[0].messages, rows[0].sample, len(rows))
            started = lane.pace.now()
            try:
                headers, content = await lane.sender.post(body, _key(rows, turns))
                reply = (read_stream if lane.stream else read_reply)(content, len(rows))
            except Trouble as trouble:
                lane.pace.leave()
                turns += trouble.turn
                attempts -= trouble.then in ("pause", "down")
                rows = rows if await self._after(lane, claim, trouble, attempts, started) else []
            except BaseException:
                lane.pace.leave()
                self.in_flight -= 1
                raise
            else:
                lane.pace.leave()
                rows = self._keep(lane, claim, rows, reply, headers, started)

    def _claim_of(self, lane: Lane, rows: list[Row]) -> Claim:
        """What these rows may cost at worst: a token a byte, and every answer as long as it may be."""
        tokens_in = len(rows[0].messages.encode()) + TEMPLATE_TOKENS
        tokens_out = lane.max_tokens * len(rows)
        return Claim(tuple([row.id for row in rows]), lane.rate.cost(tokens_in, tokens_out), tokens_in + tokens_out)

    async def _granted(self, lane: Lane, claim: Claim) -> int:
        """Claim; when the budget is too small, wait for a settlement that may free some, or stop."""
        self.in_flight += 1
        before = self.settlements
        try:
            granted = await self.journal.claim(claim)
        except BaseException:
            self.in_flight -= 1
            raise
        if granted == GRANTED:
            return granted
        self.in_flight -= 1
        if granted == POOR and self.settlements == before:  # nothing was freed since: claim again when something is
            if self.in_flight == 0:
                self.stop("the budget does not allow another question; raise it and run the same command again")
            else:
                self._freed.clear()
                await self._freed.wait()
        return granted

    def _keep(
        self, lane: Lane, claim: Claim, rows: list[Row], reply: Reply, headers: object, started: float
    ) -> list[Row]:
        """Settle a reply; the rows that got no answer (`n` was ignored) are asked again."""
        told, rate, count = self.told, lane.rate, len(reply.choices)
        tokens_in, tokens_out = reply.tokens_in, reply.tokens_out
        if tokens_in is None or tokens_out is None:
            told.estimated += 1
            tokens_in = len(rows[0].messages.encode()) + TEMPLATE_TOKENS if tokens_in is None else tokens_in
            tokens_out = lane.max_tokens * count if tokens_out is None else tokens_out
            reply.extra["estimated"] = True
        pico = rate.cost(tokens_in, tokens_out, reply.cached)
        if pico > claim.pico:
            told.over_estimate += 1
        date = self._now()
        answers, cut = [], []
        share_in, share_out, share = _split(tokens_in, count), _split(tokens_out, count), _split(pico, count)
        for i, choice in enumerate(reply.choices):
            self._acceptance.hear(rows[0].question, choice.answer, choice.finish)
            told.truncated += choice.finish == "length"
            told.filtered += choice.finish == "content_filter"
            if choice.finish == "length" and lane.drop_cut:
                cut.append(rows[i].id)
                continue
            answers.append(Answer(
                rows[i].id, choice.finish, share_in[i], share_out[i], share[i], date, answer_body(choice, reply)
            ))  # fmt: skip
        self.journal.settle(Settled(claim, answers, claim.ids[count:], pico, tokens_in + tokens_out, tuple(cut)))
        self._settled()
        told.answers += len(answers)
        told.failed += len(cut)
        told.tokens_in += tokens_in
        told.tokens_out += tokens_out
        told.cached += reply.cached
        told.pico += pico
        if reply.model != lane.model and reply.model:
            told.other_models[reply.model] += 1
        lane.heard, lane.down_since = True, None
        lane.pace.succeeded(started, tokens_out)
        if "x-ratelimit-remaining-requests" in headers or "x-ratelimit-remaining-tokens" in headers:  # type: ignore[operator]
            lane.pace.heed(headers)  # type: ignore[arg-type]
        return rows[count:]

    async def _after(self, lane: Lane, claim: Claim, trouble: Trouble, attempts: int, started: float) -> bool:
        """Give the claim back, slow down as told, wait; whether to try these rows again."""
        self.told.errors[trouble.kind] += 1
        final = trouble.then == "never" or (trouble.then == "again" and attempts >= lane.tries)
        self.journal.give_back(Returned(claim, trouble.doubt, trouble.turn, final, trouble.kind, trouble.told))
        self._settled()
        if trouble.then == "stop":
            self.stop(f"{lane.name}: {trouble}", mistake=True)
            return False
        if final:
            self.told.failed += len(claim.ids)
            lane.misses += not lane.heard
            if lane.misses >= 5:
                self.stop(f"{lane.name} refuses every question ({trouble}); nothing was answered", mistake=True)
            return False
        if trouble.then == "down":
            return self._down(lane, trouble)
        if trouble.then == "pause" or trouble.kind == "server error":
            lane.pace.pushed_back(started)
        wait = trouble.wait if trouble.wait is not None else self._backoff(attempts)
        if trouble.then == "pause" or trouble.wait is not None:
            lane.pace.pause(wait * (1.0 if trouble.wait is not None else self._random.uniform(0.5, 1.0)))
        elif not self.stopping:
            await asyncio.sleep(wait)
        return True

    def _down(self, lane: Lane, trouble: Trouble) -> bool:
        """Nobody listens: wait longer and longer, until patience ends. Nothing was sent, so nothing was billed."""
        now = lane.pace.now()
        lane.down_since = now if lane.down_since is None else lane.down_since
        gone = now - lane.down_since
        if gone > (lane.patience_s if lane.heard else min(lane.patience_s, 20.0)):
            self.stop(f"{lane.name}: {trouble.told} (is the server running?)", mistake=not lane.heard)
            return False
        lane.pace.pause(min(15.0, 0.25 + gone / 2) * self._random.uniform(0.8, 1.2))
        return True

    def _backoff(self, attempts: int) -> float:
        return self._random.uniform(0.5, 1.0) * min(MOST_BACKOFF_S, float(2 ** min(attempts, 6)) / 2)

    def _settled(self) -> None:
        self.in_flight -= 1
        self.settlements += 1
        self._freed.set()

    def _now(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._date = datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds")
        return self._date


class _closing:
    """Opens a lane's sender with its first worker and closes it with its last."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    async def __aenter__(self) -> None:
        if self._sender.users == 0:
            await self._sender.__aenter__()
        self._sender.users += 1

    async def __aexit__(self, *_: object) -> None:
        self._sender.users -= 1
        if self._sender.users == 0:
            await self._sender.__aexit__()


def _key(rows: list[Row], turn: int) -> str:
    """The Idempotency-Key: the same for the same rows until a reply came that was no answer."""
    if len(rows) == 1:
        return f"{rows[0].trace}-{turn}"
    return hashlib.sha256(f"{','.join(row.trace for row in rows)}-{turn}".encode()).hexdigest()[:32]


def _split(whole: int, parts: int) -> list[int]:
    """`whole` in `parts` whole numbers that add up to it."""
    if parts == 1:
        return [whole]
    base, rest = divmod(whole, parts)
    return [base + (i < rest) for i in range(parts)]
