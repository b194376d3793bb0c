"""The engine end to end on the pretended device: no tensor on the wrong side, the tokens of the CPU, few waits."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shoestring.core.nouns import Completion, Sampling
from shoestring.infer.engine import Engine
from shoestring.nn.kernels import Kernels
from shoestring.text.tokenizer import Tokenizer

from ..infer.conftest import make_certain
from .check_training import V, deepseek, dense
from .pretend import NAME, pretending

IDS = torch.randint(0, V, (40,), generator=torch.Generator().manual_seed(5)).tolist()
PROMPTS = [IDS[:9], IDS[10:30], IDS[30:35], [7]]
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0, max_new_tokens=6),
    "free": Sampling(n=2, max_new_tokens=6, seed=1),
    "cut": Sampling(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, max_new_tokens=6, seed=1, top_logprobs=3),
    "adjusted": Sampling(
        logit_bias={3: 2.0, 4: float("-inf")}, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2,
        min_new_tokens=4, stop_ids=(1, 2, 5, 8), max_new_tokens=8, seed=2, prompt_logprobs=2, top_logprobs=2,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def counts() -> Iterator[Counter[str]]:
    with pretending() as counted:
        yield counted


def same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    for group, other in zip(found, expected, strict=True):
        assert [c.token_ids for c in group] == [c.token_ids for c in other]
        for one, two in zip(group, other, strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
            assert one.routed_experts == two.routed_experts


@pytest.fixture(scope="module", params=[deepseek, dense])
def pair(request: Any) -> tuple[Any, Any]:
    with pretending():
        return request.param(), request.param(NAME)


@pytest.mark.parametrize("options", [
    {},
    pytest.param({"deterministic": True}, marks=pytest.mark.slow),
    pytest.param({"max_batch_tokens": 7, "cache_tokens": 64}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_generate(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    """Every kind of row in one batch; all prompts at once, or in chunks that meet a history and are preempted."""
    here, there = (Engine(m, native=False, block_size=8, **options) for m in pair)
    assert there.device.type == NAME and Engine(pair[1]).stats()["native"] is False
    found = there.generate(PROMPTS, list(SAMPLINGS.values()))
    same(found, here.generate(PROMPTS, list(SAMPLINGS.values())))
    ((again,),) = there.generate(PROMPTS[1:2], SAMPLINGS["greedy"])
    assert again.cached_tokens > 0 or options


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLINGS)
def test_rows_of_one_kind(pair: tuple[Any, Any], name: str) -> None:
    same(*(Engine(m, native=False).generate(PROMPTS[:2], SAMPLINGS[name]) for m in reversed(pair)))


def test_in_bf16(pair: tuple[Any, Any]) -> None:
    model = pair[1]
    model.kernels = Kernels(dtype="bfloat16", attention="sdpa")
    try:
        found = Engine(model).generate(PROMPTS, dataclasses.replace(SAMPLINGS["cut"], max_new_tokens=2))
    finally:
        model.kernels = Kernels()
    assert all(completion.token_ids for group in found for completion in group)


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "hidden": True}])
def test_score(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    here, there = (Engine(m, native=False).score([IDS, IDS[:5], IDS[7:20], [3]], **options) for m in pair)
    for one, other in zip(here, there, strict=True):
        if not options:
            assert other == pytest.approx(one, abs=1e-4)
            continue
        for name in ("logprobs_T", "top_ids_TK", "top_logprobs_TK", "tail_T", "hidden_TD"):
            a, b = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=1e-4)


def test_new_weights_under_way(pair: tuple[Any, Any]) -> None:
    engine = Engine(pair[1], block_size=8)
    engine.add(IDS[:20], SAMPLINGS["greedy"])
    engine.step()
    other = type(pair[0])(pair[0].config, generator=torch.Generator().manual_seed(9))
    engine.update_weights(copy.deepcopy(other).to(NAME))
    while engine.has_work:
        engine.step()
    same(engine.generate(PROMPTS, SAMPLINGS["free"]), Engine(other, native=False).generate(PROMPTS, SAMPLINGS["free"]))
    with torch.no_grad():  # a trainer's own change is seen
        for model in (engine.model, other):
            model.head_weight.mul_(2.0)
    same(engine.generate(PROMPTS, SAMPLINGS["free"]), Engine(other, native=False).generate(PROMPTS, SAMPLINGS["free"]))


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_drafts_and_routed_experts(deterministic: bool) -> None:
    sampling = Sampling(n=2, temperature=0.0, seed=3, max_new_tokens=5, routed_experts=True)
    models = [make_certain(deepseek()).to(device) for device in ("cpu", NAME)]
    here, there = (
        Engine(model, native=False, speculative=True, deterministic=deterministic, block_size=8) for model in models
    )
    found = there.generate(PROMPTS, sampling)
    same(found, here.generate(PROMPTS, sampling))
    assert there.stats()["spec_decode_num_accepted_tokens"] > 0
    routed = torch.tensor(found[0][0].routed_experts, device=NAME).permute(1, 0, 2)[:, None]
    fed = torch.tensor([PROMPTS[0] + found[0][0].token_ids[:-1]], device=NAME)
    deepseek(NAME)(fed, routing=routed).logits.sum().backward()


def test_grammar_and_thinking() -> None:
    pytest.importorskip("llguidance")
    tokenizer = Tokenizer.train(["last digit of 3 + 8 ? 1 2 4 5 6 7 9 0 { } [ ] , true false"], 300)
    engine = Engine(deepseek(NAME, vocab_size=300), tokenizer)
    prompt = tokenizer.encode("3 + 8 ?")
    ((found,),) = engine.generate([prompt], Sampling(regex="[0-9]{2}", max_new_tokens=12, seed=1))
    assert len(found.text) == 2 and found.text.isdigit()
    opened = [*prompt, tokenizer.specials["<think>"]]
    ((found,),) = engine.generate([opened], Sampling(thinking_budget=3, stop=("zz",), max_new_tokens=8, seed=1))
    assert found.token_ids[3] == tokenizer.specials["</think>"]


@pytest.mark.parametrize("family", [deepseek, dense])
@pytest.mark.parametrize("name", ["greedy", "free", "cut"])
def test_a_decoding_step_waits_seldom(family: Any, name: str, counts: Counter[str]) -> None:
    """The tokens and their probabilities come back, and whether they are finite; lists of likeliest tokens besides.
    What goes there: ids, positions, blocks, draws, and how a distribution is cut."""
    engine = Engine(family(NAME))
    for index, prompt in enumerate(PROMPTS):
        engine.add(prompt, SAMPLINGS[name], request_id=str(index))
    engine.step()
    engine.step()
    counts.clear()
    engine.step()
    assert counts["waits"] <= 1 and counts["to the CPU"] <= (4 if name == "cut" else 2)
    assert counts["from the CPU"] <= (18 if name == "cut" else 6)
