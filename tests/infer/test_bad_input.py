"""What can never be answered is refused at once, in one sentence, and leaves nothing behind; what fails, cleans up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling
from shoestring.infer.engine import Engine
from shoestring.text.tokenizer import Tokenizer

from .conftest import V, dense
from .test_paged import IDS
from .test_requests import drain, finished
from .test_schedules import audit

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ([], {}, "the prompt is empty"),
        ([V], {}, "outside the model's vocabulary"),
        ([-1], {}, "outside the model's vocabulary"),
        ([3] * 120, {"max_new_tokens": 9}, "the model has 128 positions"),
        ([3] * 60, {"max_new_tokens": 20}, "the cache holds 64"),
        ([3], {"stop_ids": (V,)}, "token id 300 is outside"),
        ([3], {"logit_bias": {-2: 1.0}}, "token id -2 is outside"),
        ([3], {"logit_bias": dict.fromkeys(range(V), float("-inf"))}, "bans every token"),
        ([3], {"stop_ids": tuple(range(V)), "min_new_tokens": 1}, "leaves no token"),
    ],
)
def test_refused_at_once(prompt: list[int], options: dict[str, Any], sentence: str) -> None:
    engine = Engine(dense(), cache_tokens=64, block_size=8)
    sampling = Sampling(**({"max_new_tokens": 4} | options))
    with pytest.raises(UserError, match=sentence):
        engine.add(prompt, sampling)
    with pytest.raises(UserError):
        engine.generate([[1], prompt], sampling)
    assert not engine.has_work and engine.stats()["computed_tokens"] == 0


def test_cancel_at_every_stage(model: Any, tokenizer: Tokenizer) -> None:
    """Waiting, half read, a group before and after its fork, decoding, preempted, finished."""
    for steps in range(12):
        engine = Engine(model, tokenizer, max_batch_tokens=16, cache_tokens=96, block_size=8)
        sampling = Sampling(n=3, max_new_tokens=12, seed=2, ignore_eos=True)
        mine = engine.add(IDS[:40], sampling, request_id="mine")
        engine.add(IDS[:30], sampling, request_id="other")
        events = [event for _ in range(steps) for event in engine.step()]
        engine.cancel(mine)
        audit(engine)
        events += engine.step()
        last = [e.completion for e in events if e.request_id == mine and e.completion is not None]
        assert [c.finish_reason for c in last].count("cancelled") == 3
        for event in events:
            if event.request_id == mine and event.completion is not None:
                said = "".join(e.text for e in events if e.request_id == mine and e.sample == event.sample)
                assert said == event.completion.text
        done = finished(drain(engine))
        assert len(done) == 3 and all(name == "other" for name, _ in done)
        assert engine._scheduler.blocks.used == 0 and not engine._requests


def test_an_error_in_a_step_leaves_the_engine_usable() -> None:
    model = dense()
    engine = Engine(model)
    expected = engine.generate([[1, 2, 3]], Sampling(temperature=0.0, max_new_tokens=5))
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        engine.generate([[1, 2, 3]], Sampling(n=4, max_new_tokens=5))
    assert not engine.has_work and engine._scheduler.blocks.used == 0
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    assert engine.generate([[1, 2, 3]], Sampling(temperature=0.0, max_new_tokens=5)) == expected


def test_weights_of_another_architecture_wait_for_the_requests(model: Any) -> None:
    engine = Engine(model)
    other = type(model)(model.config.model_copy(update={"hidden_size": 64}))
    engine.add([1, 2], Sampling(max_new_tokens=3))
    with pytest.raises(UserError, match="another architecture"):
        engine.update_weights(other)
    drain(engine)
    engine.update_weights(other)
    assert engine.generate([[1, 2]], Sampling(max_new_tokens=3, seed=0))


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_thousand_tokens() -> None:
    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    engine = Engine(dense(), cache_tokens=1 << 14)
    sampling = Sampling(n=100, max_new_tokens=100)
    sizes = []
    for round_ in range(12):
        engine.generate([[round_, *IDS[:20]]], sampling)
        sizes.append(resident())
    assert sizes[-1] - sizes[1] < 10  # MB, after 20,000 and after 120,000 tokens
