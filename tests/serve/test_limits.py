"""Limits of a key, kept by reservations, with a clock of the test's."""

from __future__ import annotations

from typing import Any

import pytest

from shoestring.serve import limits
from shoestring.serve.errors import ApiError
from shoestring.serve.keys import Key
from shoestring.serve.limits import Account


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits, "time", clock)
    return clock


def account(**values: Any) -> Account:
    return Account(Key("k-1", "hash", "sk-…", "ann", **values))


def refused(found: Account, tokens: int = 10, usd: float = 0.0) -> ApiError:
    with pytest.raises(ApiError) as error:
        found.reserve(tokens, usd)
    return error.value


def test_requests_a_minute(clock: Clock):
    found = account(rpm=2)
    found.reserve(10, 0).settle(10, 0)
    clock.now += 30
    found.reserve(10, 0).settle(10, 0)
    error = refused(found)
    assert error.status == 429 and error.retry_after == 30
    clock.now += 31
    found.reserve(10, 0)
    assert refused(found).retry_after == 29


def test_tokens_a_minute_are_reserved_and_given_back(clock: Clock):
    found = account(tpm=100)
    held = found.reserve(90, 0)
    assert refused(found, 20).status == 429
    held.settle(15, 0)
    found.reserve(80, 0)
    assert refused(found, 20).status == 429
    error = refused(found, 101)
    assert error.code == "request_too_large" and error.retry is False


def test_settling_twice_counts_once(clock: Clock):
    found = account(tpm=100, credit_usd=1.0)
    held = found.reserve(50, 0.5)
    held.settle(20, 0.2)
    held.settle(20, 0.2)
    assert found.credit_left == pytest.approx(0.8) and found.running == 0


def test_concurrency(clock: Clock):
    found = account(concurrency=1)
    held = found.reserve(1, 0)
    assert refused(found).code == "concurrency_exceeded"
    held.settle(1, 0)
    found.reserve(1, 0)


def test_tokens_a_day(clock: Clock):
    found = account(daily_tokens=100)
    found.reserve(50, 0).settle(50, 0)
    running = found.reserve(40, 0)
    clock.now += 120  # a long call is not forgotten when its minute is over
    assert refused(found, 20).code == "daily_limit_exceeded"
    running.settle(40, 0)
    clock.now += 86400
    found.reserve(100, 0)


def test_credit_cannot_be_overdrawn_by_many_at_once(clock: Clock):
    found = account(credit_usd=1.0, spent_usd=0.4)
    held = [found.reserve(1, 0.25), found.reserve(1, 0.25)]
    assert refused(found, 1, 0.25).status == 402
    for each in held:
        each.settle(1, 0.1)
    found.reserve(1, 0.25)
    assert account(credit_usd=1.0, spent_usd=1.0).credit_left == 0
    assert refused(account(credit_usd=1.0, spent_usd=1.0)).status == 402


def test_a_key_that_was_topped_up_may_go_on(clock: Clock):
    found = account(credit_usd=1.0, spent_usd=1.0)
    assert refused(found, 1, 0.1).status == 402
    found.renew(Key("k-1", "hash", "sk-…", "ann", credit_usd=2.0, spent_usd=1.0))
    found.reserve(1, 0.1)


def test_headers(clock: Clock):
    found = account(rpm=5, tpm=100)
    found.reserve(30, 0)
    clock.now += 10
    headers = found.headers()
    assert headers["x-ratelimit-remaining-requests"] == "4" and headers["x-ratelimit-remaining-tokens"] == "70"
    assert headers["x-ratelimit-reset-requests"] == "50.0s"
    assert account().headers() == {}
