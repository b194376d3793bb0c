"""What a key may do now: requests and tokens a minute, at once and a day, and its credit.

Prompt and largest answer are reserved when a call is admitted and settled by what was used when it ends, however it
ends, so that many calls at once cannot overdraw a limit that each of them alone keeps. The minute is a sliding one.
A refusal says which limit, and when to try again; limits that no waiting mends say not to.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from shoestring.serve.errors import ApiError
from shoestring.serve.keys import Key

MINUTE, DAY = 60.0, 86400.0


@dataclass(slots=True, eq=False)
class Reservation:
    """What one call holds. `settle` once with what was used."""

    account: Account
    tokens: int
    usd: float
    at: float
    settled: bool = False

    def settle(self, tokens: int, usd: float) -> None:
        if not self.settled:
            self.settled = True
            self.account._settle(self, tokens, usd)


class Account:
    """One key and what it is using. `clock` and `wall` are for tests."""

    def __init__(self, key: Key, *, today: int = 0) -> None:
        self.key = key
        self.running = 0
        self._requests: deque[float] = deque()
        self._tokens: deque[Reservation] = deque()
        self._minute_tokens = 0
        self._day = int(time.time() // DAY)
        self._today = today
        self._spent = key.spent_usd
        self._held_usd = 0.0
        self._held_tokens = 0

    def renew(self, key: Key) -> None:
        """The key as the store has it now; what was spent here and is not there yet stays counted."""
        self._spent = max(self._spent, key.spent_usd)
        self.key = key

    @property
    def credit_left(self) -> float | None:
        """Dollars; None when there is no limit."""
        return None if self.key.credit_usd is None else self.key.credit_usd - self._spent - self._held_usd

    @property
    def spent_usd(self) -> float:
        return self._spent

    def reserve(self, tokens: int, usd: float) -> Reservation:
        """Admit a call that may take `tokens` and `usd`. Raises ApiError 402 or 429."""
        now = time.monotonic()
        self._slide(now)
        key = self.key
        left = self.credit_left
        if left is not None and (left <= 0 or usd > left):
            message = (
                f"this key's credit is used up: ${max(left, 0):.6f} left, and this request may cost ${usd:.6f}; "
                "top it up, or ask for fewer tokens."
            )
            raise ApiError(402, message, code="insufficient_credit", retry=False)
        if key.concurrency is not None and self.running >= key.concurrency:
            message = f"this key has {self.running} requests running, its limit; wait for one to end."
            raise ApiError(429, message, code="concurrency_exceeded", retry_after=1)
        if key.rpm is not None and len(self._requests) >= key.rpm:
            wait = self._requests[0] + MINUTE - now if self._requests else MINUTE
            message = f"this key's limit is {key.rpm} requests a minute; try again in {wait:.0f} s."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)
        if key.tpm is not None and tokens > key.tpm:
            message = (
                f"this request may take {tokens} tokens and this key's limit is {key.tpm} a minute; ask for fewer."
            )
            raise ApiError(429, message, code="request_too_large", retry=False)
        if key.tpm is not None and self._minute_tokens + tokens > key.tpm:
            wait = self._tokens[0].at + MINUTE - now
            message = f"this key's limit is {key.tpm} tokens a minute; try again in {wait:.0f} s."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)
        if key.daily_tokens is not None and self._today + self._held_tokens + tokens > key.daily_tokens:
            wait = (self._day + 1) * DAY - time.time()
            message = f"this key's limit is {key.daily_tokens} tokens a day (UTC); {self._today} are used."
            raise ApiError(429, message, code="daily_limit_exceeded", retry_after=wait, retry=False)
        held = Reservation(self, tokens, usd, now)
        self.running += 1
        self._requests.append(now)
        self._tokens.append(held)
        self._minute_tokens += tokens
        self._held_usd += usd
        self._held_tokens += tokens
        return held

    def _settle(self, held: Reservation, tokens: int, usd: float) -> None:
        self.running -= 1
        self._held_usd -= held.usd
        self._held_tokens -= held.tokens
        self._spent += usd
        self._slide(time.monotonic())
        self._today += tokens
        if held in self._tokens:
            self._minute_tokens += tokens - held.tokens
        held.tokens = tokens

    def _slide(self, now: float) -> None:
        while self._requests and self._requests[0] <= now - MINUTE:
            self._requests.popleft()
        while self._tokens and self._tokens[0].at <= now - MINUTE:
            self._minute_tokens -= self._tokens.popleft().tokens
        day = int(time.time() // DAY)
        if day != self._day:
            self._day, self._today = day, 0

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit headers, for the limits this key has."""
        now = time.monotonic()
        self._slide(now)
        found = {}
        for name, limit, used, line in (
            ("requests", self.key.rpm, len(self._requests), [*list(self._requests)[:1]]),
            ("tokens", self.key.tpm, self._minute_tokens, [held.at for held in list(self._tokens)[:1]]),
        ):
            if limit is not None:
                found[f"x-ratelimit-limit-{name}"] = str(limit)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                found[f"x-ratelimit-reset-{name}"] = f"{max(0.0, line[0] + MINUTE - now) if line else 0:.1f}s"
        return found
