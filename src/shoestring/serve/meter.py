"""Who may ask, and what it came to: accounts, usage rows, metrics, audit, hooks.

Accounts are kept in memory and their keys read again whenever the store's version changes (looked at once a second);
usage is written behind, by the store's own thread, a batch at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from shoestring.serve.audit import AuditLog
from shoestring.serve.errors import ApiError
from shoestring.serve.exchange import GONE
from shoestring.serve.hooks import Call, Hooks, Outcome
from shoestring.serve.keys import KeyStore, hashed
from shoestring.serve.limits import DAY, Account, Reservation
from shoestring.serve.metrics import Metrics
from shoestring.serve.settings import ServeConfig

LOOK_SECONDS = 1.0
FLUSH_SECONDS = 0.05
P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger("shoestring.serve")


class Meter:
    """Everything that is counted."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.metrics = Metrics()
        self.hooks = Hooks(config.hooks)
        self.audit = AuditLog(config.audit) if config.audit else None
        self.store = KeyStore(config.store) if config.store else None
        self._thread = ThreadPoolExecutor(1, "store")
        self._accounts: dict[str, Account] = {}  # by hash of the key
        self._by_id: dict[str, Account] = {}
        self._version = -1
        self._rows: list[dict[str, Any]] = []
        self._jobs: list[asyncio.Task[None]] = []
        self._after: set[asyncio.Task[None]] = set()
        self.failing = ""  # why usage could not be written

    # ---- life
    async def start(self) -> None:
        if self.store is None:
            return
        today = await self.in_store(self.store.tokens_since, time.time() // DAY * DAY)
        await self._refresh(today)
        self._jobs = [asyncio.create_task(self._look()), asyncio.create_task(self._flush_often())]

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._after.add(task)
        task.add_done_callback(self._after.discard)

    async def stop(self) -> None:
        """Write what is left."""
        if self._after:
            await asyncio.wait(self._after, timeout=LOOK_SECONDS)
        for task in self._jobs:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self.store is not None:
            await self._flush()
            self._thread.shutdown(wait=True)
            self.store.close()
        if self.audit is not None:
            self.audit.close()

    async def in_store(self, function: Callable[P, T], *arguments: P.args, **names: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*arguments, **names))

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._refresh()
            except Exception:
                _log.exception("the store of keys cannot be read; going on with the keys known")

    async def _refresh(self, today: dict[str, int] | None = None) -> None:
        assert self.store is not None
        version = await self.in_store(self.store.version)
        if version == self._version:
            return
        keys = await self.in_store(self.store.all)
        self._version = version
        for key in keys:
            account = self._by_id.get(key.id)
            if account is None:
                account = self._by_id[key.id] = Account(key, today=(today or {}).get(key.id, 0))
                self._accounts[key.hash] = account
            else:
                account.renew(key)

    # ---- who
    @property
    def open(self) -> bool:
        """Whether anybody may ask: there are no keys and none are required."""
        return not self._accounts and not self._config.require_keys

    async def authenticate(self, authorization: str | None) -> Account | None:
        """The account behind an Authorization header; None on an open server. Raises ApiError 401 or 403."""
        scheme, _, secret = (authorization or "").partition(" ")
        if self.open and self.store is None:
            return None
        if scheme.lower() != "bearer" or not secret.strip():
            if self.open:
                return None
            raise ApiError(401, "no key was given; send `Authorization: Bearer KEY`.", code="missing_key", retry=False)
        digest = hashed(secret.strip())
        account = self._accounts.get(digest)
        if account is None and self.store is not None:
            await self._refresh()  # a key made a moment ago
            account = self._accounts.get(digest)
        if account is None and self.open:
            return None
        if account is None or not secrets.compare_digest(account.key.hash, digest) or account.key.revoked:
            raise ApiError(401, "this key is not known here, or was revoked.", code="invalid_api_key", retry=False)
        if account.key.blocked is not None:
            raise ApiError(403, f"this key is blocked: {account.key.blocked}.", code="key_blocked", retry=False)
        return account

    @staticmethod
    def permit(account: Account | None, model: str, *, n: int, logprobs: bool) -> None:
        """What a key's flags and list of models allow. Raises ApiError 403."""
        if account is None:
            return
        key, flags = account.key, account.key.flags or {}
        if key.models is not None and model not in key.models:
            raise ApiError(403, f'this key may not use "{model}".', param="model", code="model_forbidden", retry=False)
        if logprobs and flags.get("logprobs") is False:
            raise ApiError(403, "this key may not ask for logprobs.", param="logprobs", retry=False)
        if n > flags.get("max_n", n):
            raise ApiError(403, f"this key may ask for n up to {flags['max_n']}.", param="n", retry=False)

    # ---- what it came to
    async def finish(
        self, call: Call, status: int, usd: float, held: Reservation | None, texts: tuple[str, ...] = ()
    ) -> None:
        """Settle, count, write down, and tell the hooks. Never raises for what cannot be written."""
        tally = call.tally
        tokens = tally.prompt + tally.completion
        if held is not None:
            held.settle(tokens, usd)
        seconds = time.monotonic() - tally.began
        self.metrics.finished(call.model, tally, max_tokens=call.max_tokens, n=call.n)
        if status == GONE:
            self.metrics.left(call.model)
        elif status >= 400:
            self.metrics.refused(call.model, str(status))
        row = {
            "key_id": call.key.id if call.key else "", "request_id": call.request_id, "time": time.time(),
            "model": call.model, "endpoint": call.endpoint, "prompt": tally.prompt, "cached": tally.cached,
            "completion": tally.completion, "reasoning": tally.reasoning, "usd": usd, "status": status,
            "seconds": seconds,
        }  # fmt: skip
        if self.store is not None:
            self._rows.append(row)
        if self.audit is not None:
            self.audit.write(self._line(call, row, texts))
        finish = tuple(tally.finish[index] for index in sorted(tally.finish))
        if self.hooks:  # the client does not wait for what is thought about its answer afterwards
            self._keep(asyncio.create_task(self.hooks.after(call, Outcome(status, texts, finish, usd, seconds))))

    def _line(self, call: Call, row: dict[str, Any], texts: tuple[str, ...]) -> dict[str, Any]:
        line = {name: value for name, value in row.items() if name != "key_id"} | {
            "key": call.key.id if call.key else None, "name": call.key.name if call.key else None,
            "user": call.user, "client": call.client, "n": call.n, "max_tokens": call.max_tokens,
            "stream": call.stream, "finish": [call.tally.finish[i] for i in sorted(call.tally.finish)],
        }  # fmt: skip
        if self._config.audit_text:
            line |= {"request": dict(call.raw), "answers": list(texts)}
        return line

    async def _flush_often(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self._flush()

    async def _flush(self) -> None:
        if not self._rows or self.store is None:
            return
        rows, self._rows = self._rows, []
        try:
            await self.in_store(self.store.record, rows)
        except Exception as error:
            self._rows = rows + self._rows  # tried again: usage is money
            if not self.failing:
                _log.exception("usage cannot be written; it is kept and tried again")
            self.failing = str(getattr(error, "orig", None) or error)
            await asyncio.sleep(LOOK_SECONDS)
        else:
            self.failing = ""
