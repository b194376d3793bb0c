"""Every sampling option, in any mixture: the logprobs that others compute, and nothing of it hangs on the schedule.

The oracle is a plain forward for each token, with the warpers of `transformers`. Then the same requests all at once in
little memory, so that they are cut into chunks, forked, preempted and (with a drafter) drafted: what each one gets is
what it gets alone, its penalties, stop strings, grammar, thinking budget, experts and prompt logprobs included.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.nouns import Completion, Sampling
from shoestring.infer.engine import Engine
from shoestring.text.tokenizer import Tokenizer

from .conftest import V, deepseek, dense
from .test_paged import v3
from .test_requests import drain, finished
from .test_schedules import audit

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly

MODELS: dict[str, Any] = {}
MAKERS = {"deepseek": deepseek, "dense": dense, "v3": lambda: v3(num_nextn_predict_layers=1)}


def model_of(name: str) -> Any:
    """Built once: hypothesis runs the tests many times."""
    if name not in MODELS:
        MODELS[name] = MAKERS[name]()
    return MODELS[name]


def either(**choices: list[Any]) -> Any:
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})


OPTIONS = either(
    temperature=[0.0, 0.7, 1.0, 1.6], top_k=[0, 0, 1, 7, 40], top_p=[1.0, 1.0, 0.9, 0.3], min_p=[0.0, 0.0, 0.03, 0.4],
    presence_penalty=[0.0, 0.8, -0.5], frequency_penalty=[0.0, 0.3], repetition_penalty=[1.0, 1.4, 0.8],
    logit_bias=[None, {3: 2.5, 11: float("-inf")}], min_new_tokens=[0, 0, 5], top_logprobs=[0, 0, 3],
    prompt_logprobs=[None, None, 0, 2], stop_ids=[(), (), tuple(range(0, V, 11))], n=[1, 1, 3], seed=[0, 1, 2],
    max_new_tokens=[6, 14], routed_experts=[False, True],
)  # fmt: skip
OWN = st.lists(st.integers(0, V - 1), min_size=1, max_size=12)
PROMPTS = st.tuples(st.sampled_from([[], [7] * 9, list(range(20, 38))]), OWN).map(lambda both: both[0] + both[1])


def warped(logits_V: torch.Tensor, ids: list[int], prompt: int, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of the next token, as others say them."""
    new, logits_1V = ids[prompt:], logits_V[None].clone()
    for token, bias in (sampling.logit_bias or {}).items():
        logits_1V[0, token] += bias
    if sampling.repetition_penalty != 1.0:
        penalty = transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        logits_1V = penalty(torch.tensor([ids]), logits_1V)
    counts_V = torch.tensor(new, dtype=torch.int64).bincount(minlength=V)
    logits_1V[0] -= sampling.frequency_penalty * counts_V + sampling.presence_penalty * (counts_V > 0)
    if len(new) < sampling.min_new_tokens:
        logits_1V[0, list(sampling.stop_ids)] = float("-inf")
    if sampling.temperature:
        warpers = [transformers.TemperatureLogitsWarper(sampling.temperature)]
        warpers += [transformers.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        warpers += [transformers.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1.0 else []
        warpers += [transformers.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
        for warper in warpers:
            logits_1V = warper(torch.tensor([ids]), logits_1V)
    return logits_1V[0].log_softmax(-1)


def check_against_the_oracle(model: Any, prompt: list[int], sampling: Sampling, completion: Completion) -> None:
    ids = [*prompt, *completion.token_ids]
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits_BTV[0]
    for at, (token, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        end = len(prompt) + at
        expected_V = warped(logits_TV[end - 1], ids[:end], len(prompt), sampling)
        assert math.isclose(logprob, float(expected_V[token]), abs_tol=2e-4)
        assert sampling.temperature or float(expected_V.max()) <= logprob + 2e-4
        if sampling.top_logprobs:
            assert completion.top_logprobs is not None
            best = [value for value in expected_V.topk(sampling.top_logprobs).values.tolist() if value > -1e30]
            assert [value for _, value in completion.top_logprobs[at]] == pytest.approx(best, abs=2e-4)
    if sampling.prompt_logprobs is not None:
        assert completion.prompt_logprobs is not None and completion.prompt_logprobs[0] is None
        logp_TV = (logits_TV / (sampling.temperature or 1.0)).log_softmax(-1)
        for at, pairs in enumerate(completion.prompt_logprobs[1:], 1):
            own, *best = pairs or []
            assert own[0] == prompt[at] and math.isclose(own[1], float(logp_TV[at - 1, prompt[at]]), abs_tol=2e-4)
            assert [x for _, x in best] == pytest.approx(
                logp_TV[at - 1].topk(sampling.prompt_logprobs).values.tolist(), abs=2e-4
            )


def close(a: Completion, b: Completion, *, exact: bool) -> None:
    """The same in everything but how much of the prompt was there already."""
    assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
    assert a.routed_experts == b.routed_experts
    slack = 0.0 if exact else 2e-4
    assert a.logprobs == pytest.approx(b.logprobs, abs=slack, rel=0)
    for one, other in ((a.top_logprobs, b.top_logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
        assert (one is None) == (other is None)
        for pairs, pairs_ in zip(one or [], other or [], strict=True):
            values, values_ = ([x for _, x in each or []] for each in (pairs, pairs_))
            assert values == pytest.approx(values_, abs=slack, rel=0)
            assert not exact or pairs == pairs_


def answers(engine: Engine, asked: list[tuple[list[int], Sampling]]) -> list[Completion]:
    """All at once; the next one comes after every second step."""
    events = []
    for index, (prompt, sampling) in enumerate(asked):
        engine.add(prompt, sampling, request_id=str(index))
        if index % 2:
            events += engine.step()
            audit(engine)
    done = finished(events + drain(engine))
    audit(engine)
    assert engine._scheduler.blocks.used == 0
    return [done[str(index), sample] for index, (_, sampling) in enumerate(asked) for sample in range(sampling.n)]


@pytest.mark.parametrize("family", list(MAKERS))
@given(
    asked=st.lists(st.tuples(PROMPTS, OPTIONS), min_size=1, max_size=5), exact=st.booleans(),
    budget=st.sampled_from([1, 6, 64]), size=st.sampled_from([2, 8]),
)  # fmt: skip
@settings(max_examples=4, deadline=None)
def test_any_mixture(family: str, asked: list[Any], exact: bool, budget: int, size: int) -> None:
    model = model_of(family)
    for _, options in asked:
        options["routed_experts"] &= family != "dense"
    pairs = [(prompt, Sampling(**options)) for prompt, options in asked]
    alone = [one for pair in pairs for one in answers(Engine(model, deterministic=exact, block_size=size), [pair])]
    whose = [pair for pair in pairs for _ in range(pair[1].n)]
    for (prompt, sampling), completion in zip(whose, alone, strict=True):
        check_against_the_oracle(model, prompt, sampling, completion)
    need = max(len(prompt) + sampling.max_new_tokens for prompt, sampling in pairs)
    drafts = family != "dense"
    tight = Engine(
        model, deterministic=exact, block_size=size, cache_tokens=size * (-(-need // size) + 2),
        max_batch_tokens=budget, speculative=drafts,
    )  # fmt: skip
    for found, expected in zip(answers(tight, pairs), alone, strict=True):
        close(found, expected, exact=exact)


WORDS = Tokenizer.train(['last digit of 3 + 8 + 4 ? 1 2 5 6 7 9 0 é 日本語 🙂 {"ok": true}'], V)
SPOKEN = either(
    temperature=[0.0, 1.0], n=[1, 2], seed=[0, 1, 2, 3], max_new_tokens=[10, 16], top_logprobs=[0, 2],
    frequency_penalty=[0.0, 0.4], stop=[(), ("a", "日本"), ("1 2", "🙂", "st")], thinking_budget=[None, 0, 3],
    regex=[None, "[0-9 ]{2,7}"], thinks=[False, True], ignore_eos=[False],
)  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@given(
    asked=st.lists(st.tuples(PROMPTS, SPOKEN), min_size=2, max_size=5), budget=st.sampled_from([1, 6, 64]),
)  # fmt: skip
@settings(max_examples=4, deadline=None)
def test_what_follows_the_text_survives_any_schedule(exact: bool, asked: list[Any], budget: int) -> None:
    pytest.importorskip("llguidance")
    model, pairs = model_of("deepseek"), []
    for prompt, options in asked:
        thinks = options.pop("thinks")
        pairs.append(([*prompt, WORDS.specials["<think>"]] if thinks else prompt, Sampling(**options)))
    alone = [one for pair in pairs for one in answers(Engine(model, WORDS, deterministic=exact, block_size=4), [pair])]
    need = max(len(prompt) + sampling.max_new_tokens for prompt, sampling in pairs)
    tight = Engine(
        model, WORDS, deterministic=exact, block_size=4, cache_tokens=4 * (-(-need // 4) + 2), max_batch_tokens=budget,
        speculative=True,
    )  # fmt: skip
    for found, expected in zip(answers(tight, pairs), alone, strict=True):
        close(found, expected, exact=exact)
    for (_, sampling), completion in zip([p for p in pairs for _ in range(p[1].n)], alone, strict=True):
        assert not any(stop in completion.text for stop in sampling.stop)
        if sampling.regex and completion.finish_reason == "stop" and not sampling.stop:
            assert re.fullmatch(sampling.regex, completion.text.split("</think>")[-1])
