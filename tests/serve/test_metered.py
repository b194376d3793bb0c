"""Keys, limits, money: what each key may do, and what the bill says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from waiting import eventually

from shoestring.serve.keys import KeyStore

NewKey = Callable[..., str]


def error(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_no_key_and_a_wrong_key(metered: Any):
    assert error(metered.chat()) == (401, "missing_key")
    assert error(metered.chat(key="sk-wrong")) == (401, "invalid_api_key")
    assert metered.chat(key="sk-wrong").headers["x-should-retry"] == "false"
    assert metered.chat(headers={"authorization": "Basic abc"}).status_code == 401
    assert metered.chat(headers={"authorization": b"Bearer \xe9"}).status_code == 401
    assert metered.get("/v1/models").status_code == 401 and metered.get("/health").status_code == 200


def test_a_key_works_at_once_and_is_gone_when_revoked(metered: Any, new_key: NewKey):
    key = new_key()
    assert metered.chat(key=key).status_code == 200
    store = KeyStore(metered.store)
    name = store.all()[-1].name
    store.change(name, blocked="unpaid")
    assert eventually(lambda: metered.chat(key=key).status_code == 403)
    assert "unpaid" in metered.chat(key=key).json()["error"]["message"]
    store.revoke(name)
    assert eventually(lambda: metered.chat(key=key).status_code == 401)


def test_requests_and_tokens_a_minute(metered: Any, new_key: NewKey):
    key, began = new_key(rpm=2), time.monotonic()
    answers = [metered.chat(key=key) for _ in range(3)]
    passed = time.monotonic() - began
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[1].headers["x-ratelimit-remaining-requests"] == "0"
    assert 59 - passed <= int(answers[2].headers["retry-after"]) <= 60
    assert answers[2].headers["x-ratelimit-limit-requests"] == "2"  # a refusal tells how the key stands, too
    small = new_key(tpm=60)
    first = metered.chat(key=small, max_tokens=30, ignore_eos=True)
    assert first.status_code == 200 and error(metered.chat(key=small, max_tokens=40))[0] == 429
    assert error(metered.chat(key=small, max_tokens=400)) == (429, "request_too_large")


def test_concurrency(metered: Any, new_key: NewKey):
    """While the engine stands still in the middle of one answer, every other call of the key is refused at once."""
    key = new_key(concurrency=1)
    with ThreadPoolExecutor(4) as pool:
        with metered.held():
            first = pool.submit(metered.chat, key=key)
            assert eventually(lambda: metered.get("/health").json()["models"]["tiny"]["running"] == 1)
            found = [f.result() for f in [pool.submit(metered.chat, key=key) for _ in range(3)]]
        assert [error(answer) for answer in found] == [(429, "concurrency_exceeded")] * 3
        assert first.result().status_code == 200
    assert metered.chat(key=key).status_code == 200


def test_credit_runs_out(metered: Any, new_key: NewKey):
    key = new_key(credit_usd=0.0004)  # prices: 1 and 10 dollars a million
    first = metered.chat(key=key, max_tokens=20, ignore_eos=True)
    usage = first.json()["usage"]
    assert usage["cost_usd"] == pytest.approx(usage["prompt_tokens"] * 1e-6 + 20 * 1e-5)
    second = metered.chat(key=key, max_tokens=20, ignore_eos=True)
    assert error(second) == (402, "insufficient_credit") and second.headers["x-should-retry"] == "false"
    headers = {"authorization": f"Bearer {key}"}
    balance = metered.get("/user/balance", headers=headers).json()
    assert float(balance["balance_infos"][0]["total_balance"]) == pytest.approx(0.0004 - usage["cost_usd"], abs=1e-6)
    store = KeyStore(metered.store)
    spent = next(k for k in store.all() if key.startswith(k.shown))
    assert eventually(lambda: store.find(spent.id).spent_usd == pytest.approx(usage["cost_usd"]))
    store.add_credit(spent.id, 1.0)
    assert eventually(lambda: metered.chat(key=key, max_tokens=20).status_code == 200)


def test_flags_and_models(metered: Any, new_key: NewKey):
    key = new_key(flags={"logprobs": False, "max_n": 2}, models=["other"])
    assert error(metered.chat(key=key)) == (403, "model_forbidden")
    assert metered.get("/v1/models", headers={"authorization": f"Bearer {key}"}).json()["data"] == []
    assert metered.get("/v1/models/tiny", headers={"authorization": f"Bearer {key}"}).status_code == 404
    key = new_key(flags={"logprobs": False, "max_n": 2})
    assert metered.chat(key=key, logprobs=True).status_code == 403
    headers = {"authorization": f"Bearer {key}"}
    for more in ({"logprobs": 0}, {"prompt_logprobs": 0}, {"prompt_logprobs": 3}, {"echo": True, "logprobs": 1}):
        body = {"model": "tiny", "prompt": "3 + 8", "max_tokens": 2} | more
        assert metered.post("/v1/completions", body, headers=headers).status_code == 403, more
    assert metered.chat(key=key, prompt_logprobs=1).status_code == 403
    for more in ({"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}):
        body = {"model": "tiny", "input": "3 + 8", "max_output_tokens": 2} | more
        assert metered.post("/v1/responses", body, headers=headers).status_code == 403, more
    assert metered.chat(key=key, n=3).status_code == 403 and metered.chat(key=key, n=2).status_code == 200


def test_the_same_request_twice_is_billed_once(metered: Any, new_key: NewKey):
    key = new_key()
    headers = {"idempotency-key": f"again-{time.monotonic_ns()}"}
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(metered.chat, key=key, headers=headers, temperature=1.5) for _ in range(3)]
        answers = [job.result() for job in jobs]
    assert len({answer.content for answer in answers}) == 1
    assert sum(answer.headers.get("idempotency-replayed") == "true" for answer in answers) == 2
    store = KeyStore(metered.store)
    owner = next(k for k in store.all() if key.startswith(k.shown))
    cost = answers[0].json()["usage"]["cost_usd"]
    assert eventually(lambda: store.find(owner.id).spent_usd == pytest.approx(cost))
    other = metered.chat("another question", key=key, headers=headers)
    assert error(other) == (409, "idempotency_conflict")
    assert metered.chat(key=new_key(), headers=headers, temperature=1.5).headers.get("idempotency-replayed") is None


def test_keys_of_requests_are_compared_whole(metered: Any, new_key: NewKey):
    """Of the largest length there may be, and not one that is empty: that would make all requests the same."""
    key = new_key()
    long = "k" * 254
    first, second = (metered.chat(key=key, headers={"idempotency-key": long + end}) for end in "ab")
    assert first.status_code == second.status_code == 200 and "idempotency-replayed" not in second.headers
    for wrong in ("", long + "ab"):
        assert error(metered.chat(key=key, headers={"idempotency-key": wrong})) == (400, "invalid_idempotency_key")


def test_a_client_that_left_finds_its_answer(metered: Any, new_key: NewKey):
    key = new_key()
    headers = {"idempotency-key": f"left-{time.monotonic_ns()}", "authorization": f"Bearer {key}"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "3"}], "max_tokens": 200, "stream": True}
    with metered.stream(body, headers=headers) as answer:
        first = next(answer.iter_lines())
    again = metered.post("/v1/chat/completions", body, headers=headers)
    assert again.text.startswith(first) and again.text.endswith("data: [DONE]\n\n")
    assert again.headers["content-type"].startswith("text/event-stream")


def test_usage_rows_and_the_audit_log(metered: Any, new_key: NewKey):
    key = new_key(owner="ann")
    metered.chat("a secret question", key=key, user="u-7", ignore_eos=True)
    metered.chat("a secret question", key=key, max_tokens=100_000)
    audit = metered.store.parent / "audit.jsonl"
    store = KeyStore(metered.store)
    owner = next(k for k in store.all() if key.startswith(k.shown))
    assert eventually(lambda: any(row["key"] == owner.name for row in store.totals()))
    assert eventually(lambda: owner.id in audit.read_text())
    row = next(row for line in audit.read_text().splitlines() if (row := json.loads(line))["key"] == owner.id)
    assert row["user"] == "u-7" and row["status"] == 200 and row["prompt"] > 5 and row["completion"] == 8
    assert "secret" not in audit.read_text() and key not in audit.read_text() and key not in metered.log.read_text()


def test_metrics(metered: Any, new_key: NewKey):
    metered.chat(key=new_key(), ignore_eos=True, stream=True)

    def said() -> dict[str, str]:
        text = metered.get("/metrics").text
        return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    labels = '{engine="0",model_name="tiny"}'
    # the engine tells that it is idle after the answer's last token
    assert eventually(lambda: float(said()[f"vllm:num_requests_running{labels}"]) == 0)
    lines = said()
    assert float(lines[f"vllm:generation_tokens_total{labels}"]) >= 8
    assert float(lines[f"vllm:time_to_first_token_seconds_count{labels}"]) >= 1
    assert float(lines[f"vllm:inter_token_latency_seconds_count{labels}"]) >= 5
    assert float(lines['vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}']) >= 1
    drafted = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="0"}'
    assert lines[drafted] == lines[f"vllm:spec_decode_num_accepted_tokens_total{labels}"]
    assert f"vllm:kv_cache_usage_perc{labels}" in lines and f"vllm:prefix_cache_queries_total{labels}" in lines
