"""What sequences share: a group its prompt, requests their prefixes, all of them little memory; new weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from shoestring.core.nouns import Sampling
from shoestring.infer.engine import Engine

from .test_paged import IDS, ids_of, qwen3, v3

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly


def test_a_group_reads_its_prompt_once(model: Any) -> None:
    engine = Engine(model, block_size=8)
    (group,) = engine.generate([IDS[:21]], Sampling(n=16, max_new_tokens=5, seed=1))
    stats = engine.stats()
    assert stats["computed_tokens"] == 21 + 16 * 4  # the last token of each is never fed
    assert stats["prefix_cache_queries"] == 16 * 21 and stats["prefix_cache_hits"] == 15 * 21
    assert [c.cached_tokens for c in group] == [0] + [21] * 15
    assert len({tuple(c.token_ids) for c in group}) == 16
    singles = Engine(model, prefix_cache=False).generate([IDS[:21]], Sampling(n=1, max_new_tokens=5, seed=1))
    assert ids_of(singles)[0][0] == group[0].token_ids


def test_a_known_prefix_is_not_computed_again(model: Any) -> None:
    engine = Engine(model, block_size=8)
    greedy = Sampling(temperature=0.0, max_new_tokens=4)
    first = engine.generate([IDS[:30]], greedy)
    before = engine.stats()["computed_tokens"]
    again = engine.generate([IDS[:30]], greedy)
    assert engine.stats()["computed_tokens"] - before == 30 - 24 + 3
    assert again[0][0].cached_tokens == 24 and ids_of(again) == ids_of(first)
    longer = engine.generate([IDS[:50]], greedy)
    assert longer[0][0].cached_tokens == 24
    assert ids_of(longer) == ids_of(Engine(model).generate([IDS[:50]], greedy))
    whole = engine.generate([IDS[:24]], greedy)  # its last position must be computed: it has the logits
    assert whole[0][0].cached_tokens == 16


def test_tenants_share_nothing(model: Any) -> None:
    engine = Engine(model, block_size=8)
    sampling, cached = Sampling(max_new_tokens=1), []
    for salt in ("a", "a", "b"):
        engine.add(IDS[:30], sampling, salt=salt)
        while engine.has_work:
            cached += [event.cached_tokens for event in engine.step()]
    assert cached == [0, 24, 0]


def test_little_memory_means_preemption_and_the_same_answers(model: Any) -> None:
    sampling = Sampling(n=2, max_new_tokens=20, seed=4)
    prompts = [IDS[:9], IDS[10:30], IDS[30:35]]
    expected = Engine(model).generate(prompts, sampling)
    engine = Engine(model, block_size=4, cache_tokens=64)
    assert ids_of(engine.generate(prompts, sampling)) == ids_of(expected)
    assert engine.stats()["num_preemptions"] > 0 and engine.stats()["kv_used"] == 0


def test_more_requests_than_memory_are_queued(model: Any) -> None:
    engine = Engine(model, block_size=4, cache_tokens=32, prefix_cache=False)
    names = [engine.add(IDS[i : i + 10], Sampling(max_new_tokens=6, seed=1)) for i in range(12)]
    most, done = 0, []
    while engine.has_work:
        done += [event.request_id for event in engine.step() if event.completion is not None]
        most = max(most, int(engine.stats()["running"]))
    assert sorted(done) == sorted(names) and most < 4


def test_a_long_prompt_does_not_stall_those_that_decode(model: Any) -> None:
    engine = Engine(model, max_batch_tokens=8)
    short = engine.add([5], Sampling(max_new_tokens=12, seed=1))
    engine.step()
    long = engine.add(IDS, Sampling(max_new_tokens=2, seed=1))
    seen = []
    while engine.has_work:
        seen.append([event.request_id for event in engine.step()])
    assert all(short in names for names in seen[:11])
    assert seen[8].count(long) == 1 and not any(long in names for names in seen[:8])  # 60 tokens, 7 a step


# ---- weights
def test_weights_updated_under_way(model: Any) -> None:
    """What was sampled stays; the next tokens are the new model's, given everything before."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine = Engine(model, block_size=8)
    engine.add(IDS[:20], Sampling(temperature=0.0, max_new_tokens=12))
    before = [token for _ in range(5) for event in engine.step() for token in event.token_ids]
    engine.update_weights(other)
    after = []
    while engine.has_work:
        after += [token for event in engine.step() for token in event.token_ids]
    assert len(before) == 5 and len(after) == 7
    assert before == Engine(model).generate([IDS[:20]], Sampling(temperature=0.0, max_new_tokens=5))[0][0].token_ids
    fresh = Engine(other).generate([IDS[:20] + before], Sampling(temperature=0.0, max_new_tokens=7))
    assert after == fresh[0][0].token_ids
    again = engine.generate([IDS[:20]], Sampling(max_new_tokens=1))
    assert again[0][0].cached_tokens in (0, 16)  # 16 only if the new weights computed it
    engine.update_weights(model)
    assert engine.generate([IDS[:20]], Sampling(max_new_tokens=1))[0][0].cached_tokens == 0


# ---- memory
def test_cache_bytes_are_the_theory() -> None:
    model = v3()
    assert Engine(model).stats()["cache_bytes_per_token"] == 3 * (16 + 8) * 4
    model.kernels = dataclasses.replace(model.kernels, dtype="bfloat16")
    assert Engine(model).stats()["cache_bytes_per_token"] == 3 * (16 + 8) * 2
    assert Engine(qwen3()).stats()["cache_bytes_per_token"] == 2 * 2 * 2 * 12 * 4


def test_memory_is_touched_when_it_is_used(model: Any) -> None:
    engine = Engine(model, block_size=8, cache_tokens=1 << 16)
    engine.generate([IDS], Sampling(n=4, max_new_tokens=8, seed=1))
    assert engine._runner.store.ready < 64
