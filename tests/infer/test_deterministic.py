"""Batch invariance: the same tokens and, to the bit, the same logprobs, whatever else is answered."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shoestring.core.nouns import Completion, Sampling
from shoestring.infer.engine import Engine

from .conftest import V
from .test_paged import IDS, dense, v3

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly

PROMPT = IDS[:27]
SAMPLING = Sampling(max_new_tokens=8, seed=3, top_logprobs=2, top_p=0.95)


def big_v3() -> Any:
    """Wide enough that matrix libraries choose kernels by the number of rows."""
    return v3(hidden_size=96, intermediate_size=200, kv_lora_rank=48, moe_intermediate_size=40)


def answer(engine: Engine, others: list[list[int]], *, after: int = 0, n: int = 1) -> list[Completion]:
    """The completion of PROMPT when `others` are answered beside it, `after` steps later."""
    for index, ids in enumerate(others):
        engine.add(ids, Sampling(max_new_tokens=9 + index, seed=index), request_id=f"other{index}")
    for _ in range(after):
        engine.step()
    engine.add(PROMPT, dataclasses.replace(SAMPLING, n=n), request_id="mine")
    found: dict[int, Completion] = {}
    while engine.has_work:
        for event in engine.step():
            if event.request_id == "mine" and event.completion is not None:
                found[event.sample] = event.completion
    return [found[sample] for sample in range(n)]


CROWD = [IDS[i : i + 3 + 2 * i] for i in range(7)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [big_v3, dense])
def test_to_the_bit_the_same(family: Any, dtype: str) -> None:
    model = family()
    model.kernels = dataclasses.replace(model.kernels, dtype=dtype)

    def engine(**options: Any) -> Engine:
        return Engine(model, deterministic=True, block_size=8, **options)

    (expected,) = answer(engine(), [])
    found = {
        "crowd": answer(engine(), CROWD),
        "later": answer(engine(), CROWD, after=4),
        "chunked": answer(engine(max_batch_tokens=5), CROWD[:3]),
        "group": answer(engine(), CROWD, n=3)[:1],
        "preempted": answer(tight := engine(cache_tokens=64), CROWD),
        "prefix": answer(engine(), [[*PROMPT, 1, 2]], after=3),
    }
    assert tight.stats()["num_preemptions"] > 0
    assert found["prefix"][0].cached_tokens == 24
    for name, (completion,) in found.items():
        assert completion.token_ids == expected.token_ids, name
        assert completion.logprobs == expected.logprobs, name
        assert completion.top_logprobs == expected.top_logprobs, name


def test_it_is_the_same_distribution_as_the_default() -> None:
    model = big_v3()
    a = Engine(model, deterministic=True).generate([PROMPT], SAMPLING)[0][0]
    b = Engine(model).generate([PROMPT], SAMPLING)[0][0]
    assert a.token_ids == b.token_ids and max(token for token in a.token_ids) < V
    assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 1e-5
