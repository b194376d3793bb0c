"""Bias, penalties, least length, thinking budget, schemas and regular expressions, prompt logprobs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Sampling
from shoestring.infer.engine import Engine
from shoestring.text.tokenizer import Tokenizer

from .conftest import V, deepseek
from .test_requests import drain, finished

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly

PROMPT = [5, 9, 12]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    text = 'last digit of 3 + 8 + 4 ? 1 2 5 6 7 9 0 {"name": "ann", "age": 41, "ok": true} [ , ] false null'
    return Tokenizer.train([text], V)


def one(engine: Engine, prompt: list[int] = PROMPT, **options: Any) -> Completion:
    return engine.generate([prompt], Sampling(**{"temperature": 0.0, "max_new_tokens": 12} | options))[0][0]


def plain_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits_BTV[0, -1]


def greedy_by_hand(model: Any, steps: int, change: Any) -> list[int]:
    """The twin: token by token, the logits changed by `change(logits, sampled ids)`."""
    new: list[int] = []
    for _ in range(steps):
        logits_V = plain_logits(model, [*PROMPT, *new])
        change(logits_V, new)
        new.append(int(logits_V.argmax()))
    return new


def test_bias_bans_and_forces(model: Any) -> None:
    engine = Engine(model)
    free = one(engine).token_ids
    assert free[0] not in one(engine, logit_bias={free[0]: float("-inf")}).token_ids
    assert one(engine, logit_bias={7: 1000.0}).token_ids == [7] * 12


def test_penalties(model: Any) -> None:
    engine = Engine(model)

    def presence_and_frequency(logits_V: torch.Tensor, new: list[int]) -> None:
        for token in new:
            logits_V[token] -= 0.4
        for token in set(new):
            logits_V[token] -= 0.7

    def repetition(logits_V: torch.Tensor, new: list[int]) -> None:
        for token in {*PROMPT, *new}:
            logits_V[token] = logits_V[token] / 1.7 if logits_V[token] > 0 else logits_V[token] * 1.7

    found = one(engine, presence_penalty=0.7, frequency_penalty=0.4).token_ids
    assert found == greedy_by_hand(model, 12, presence_and_frequency)
    assert one(engine, repetition_penalty=1.7).token_ids == greedy_by_hand(model, 12, repetition)


@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"top_logprobs": 3}, {"logit_bias": {9: float("-inf"), 8: -1e9}}])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-7, 1e38, 1e300])
def test_temperatures_at_the_ends_of_the_numbers(model: Any, temperature: float, more: dict[str, Any]) -> None:
    """As cold as that is greedy, as hot is one draw as good as another; and both have a logprob that is a number."""
    engine = Engine(model)
    found = one(engine, temperature=temperature, seed=4, prompt_logprobs=1, **more)
    values = [*found.logprobs, *(value for pairs in found.prompt_logprobs[1:] for _, value in pairs)]
    assert not torch.tensor(values).isnan().any()
    assert "logit_bias" not in more or 9 not in found.token_ids
    if temperature < 1:
        greedy = one(engine, **{name: value for name, value in more.items() if name == "logit_bias"})
        assert found.token_ids == greedy.token_ids and found.logprobs == [0.0] * 12
    assert not torch.tensor(engine.score([PROMPT], temperature=temperature)).isnan().any()


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1e-9}, {"repetition_penalty": 1e9},
        {"presence_penalty": -1e9, "frequency_penalty": -1e9},
        {"presence_penalty": 1e9, "logit_bias": {3: 1e9}, "repetition_penalty": 1e-9},
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0])
def test_penalties_at_their_ends(model: Any, options: dict[str, Any], temperature: float) -> None:
    found = one(Engine(model), temperature=temperature, seed=1, **options)
    assert len(found.token_ids) == 12 and all(logprob <= 1e-6 for logprob in found.logprobs)


@pytest.mark.parametrize(
    ("name", "value"), [("repetition_penalty", 1e-300), ("presence_penalty", 1e39), ("logit_bias", {1: 1e39})]
)
def test_numbers_that_leave_no_distribution_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        Sampling(**{name: value})


def test_no_stop_before_the_least_length(model: Any) -> None:
    engine = Engine(model)
    stops = tuple(range(0, V, 3))
    assert len(one(engine, stop_ids=stops).token_ids) < 9
    late = one(engine, stop_ids=stops, min_new_tokens=9)
    assert len(late.token_ids) >= 9 and not set(late.token_ids[:8]) & set(stops)


def test_a_stop_string_ends_the_text_before_it(model: Any, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    whole = one(engine, ignore_eos=True, temperature=1.0, seed=3, max_new_tokens=40)
    stop = whole.text[10:13]
    cut = one(engine, ignore_eos=True, temperature=1.0, seed=3, max_new_tokens=40, stop=(stop,))
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 40
    name = engine.add(PROMPT, Sampling(ignore_eos=True, seed=3, max_new_tokens=40, stop=(stop,)))
    events = drain(engine)
    assert "".join(event.text for event in events) == cut.text == finished(events)[name, 0].text


def test_min_p_and_top_logprobs(model: Any) -> None:
    found = one(Engine(model), temperature=1.0, seed=1, min_p=0.5, top_logprobs=V)
    assert found.top_logprobs is not None
    for token, logprob, top in zip(found.token_ids, found.logprobs, found.top_logprobs, strict=True):
        best = top[0][1]
        assert all(logp >= best - 0.6932 for _, logp in top) and token in [t for t, _ in top] and logprob <= 0.0
        assert abs(torch.tensor([logp for _, logp in top]).exp().sum() - 1) < 1e-5


def test_prompt_logprobs_in_chunks(model: Any) -> None:
    prompt = list(range(40, 75))
    for budget in (2048, 7):
        found = one(Engine(model, max_batch_tokens=budget), prompt, prompt_logprobs=3)
        assert found.prompt_logprobs is not None and len(found.prompt_logprobs) == len(prompt)
        with torch.no_grad():
            logp_TV = model(torch.tensor([prompt])).logits_BTV[0].log_softmax(-1)
        assert found.prompt_logprobs[0] is None
        for at, pairs in enumerate(found.prompt_logprobs[1:]):
            assert pairs is not None
            best = logp_TV[at].topk(3)
            assert [token for token, _ in pairs] == [prompt[at + 1], *best.indices.tolist()]
            expected = [logp_TV[at, prompt[at + 1]], *best.values]
            assert torch.allclose(torch.tensor([x for _, x in pairs]), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("budget", [2048, 7])
def test_the_prompt_s_logprobs_come_with_the_first_event(model: Any, budget: int) -> None:
    engine = Engine(model, max_batch_tokens=budget)
    engine.add(list(range(40, 75)), Sampling(n=2, max_new_tokens=5, ignore_eos=True, prompt_logprobs=2))
    engine.add(PROMPT, Sampling(max_new_tokens=5, ignore_eos=True), request_id="other")
    events = drain(engine)
    for sample in range(2):
        first, *later = (e for e in events if e.sample == sample and e.request_id != "other")
        assert later[-1].completion is not None and len(first.prompt_logprobs or []) == 35
        assert first.prompt_logprobs == later[-1].completion.prompt_logprobs
        assert all(event.prompt_logprobs is None for event in later)
    assert all(event.prompt_logprobs is None for event in events if event.request_id == "other")


@pytest.mark.parametrize("budget", [0, 4])
def test_the_thinking_budget_closes_the_thinking(model: Any, tokenizer: Tokenizer, budget: int) -> None:
    start, end = tokenizer.specials["<think>"], tokenizer.specials["</think>"]
    bias = {end: float("-inf"), start: float("-inf")}
    engine = Engine(model, tokenizer)
    found = one(engine, [*PROMPT, start], thinking_budget=budget, ignore_eos=True, logit_bias=bias)
    assert found.token_ids.index(end) == budget and found.token_ids.count(end) == 1
    assert found.logprobs[budget] == 0.0
    assert end not in one(engine, thinking_budget=budget, ignore_eos=True, logit_bias=bias).token_ids  # never opened


SCHEMA = {
    "type": "object", "properties": {"ok": {"type": "boolean"}, "age": {"type": "integer", "maximum": 99}},
    "required": ["ok", "age"], "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_a_schema_is_followed(model: Any, words: Tokenizer, schema: Any) -> None:
    pytest.importorskip("llguidance")
    engine = Engine(model, words)
    think = words.specials["<think>"]
    sampling = Sampling(n=6, seed=2, max_new_tokens=90, json_schema=schema, logit_bias={think: float("-inf")})
    done = [c for c in engine.generate([PROMPT], sampling)[0] if c.finish_reason == "stop"]
    assert done
    for completion in done:
        found = json.loads(completion.text)
        assert set(found) == {"ok", "age"} and isinstance(found["ok"], bool) and found["age"] <= 99


def test_a_regex_begins_after_the_thinking(words: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    engine = Engine(deepseek(), words)
    start = words.specials["<think>"]
    sampling = Sampling(seed=1, n=4, max_new_tokens=30, regex="[0-9]{3}", thinking_budget=5)
    for completion in engine.generate([[*PROMPT, start]], sampling)[0]:
        thinking, answer = completion.text.split("</think>")
        assert re.fullmatch("[0-9]{3}", answer) and completion.finish_reason == "stop"
        assert len(thinking) > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"json_schema": {"type": "nonsense"}}, "json_schema cannot be"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "json_schema cannot be"),
        ({"json_schema": "{not json"}, "json_schema is not JSON"),
        ({"regex": "(["}, "regex cannot be"),
    ],
)
def test_what_cannot_be_satisfied_is_one_sentence(words: Tokenizer, options: dict[str, Any], sentence: str) -> None:
    pytest.importorskip("llguidance")
    engine = Engine(deepseek(), words)
    with pytest.raises(UserError, match=sentence) as caught:
        engine.add(PROMPT, Sampling(max_new_tokens=8, **options))
    assert "\n" not in str(caught.value) and not engine.has_work


def test_a_grammar_refused_leaves_the_other_prompts_unqueued(model: Any, words: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    engine = Engine(model, words)
    with pytest.raises(UserError, match="regex cannot be"):
        engine.generate([PROMPT, PROMPT], [Sampling(max_new_tokens=4), Sampling(max_new_tokens=4, regex="([")])
    assert not engine.has_work and engine.stats()["waiting"] == 0


@pytest.mark.parametrize("text", ["[" * 200_000, '{"minimum": NaN, "type": "integer"}'])
def test_a_schema_in_text_that_is_no_json(words: Tokenizer, text: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(UserError, match="json_schema"):
        Engine(deepseek(), words).add(PROMPT, Sampling(max_new_tokens=8, json_schema=text))


def test_a_grammar_that_grows_too_large_ends_its_own_request_alone(model: Any, words: Tokenizer) -> None:
    """It compiles, and fails while it is followed: never an answer that looks whole, and no other request is harmed."""
    pytest.importorskip("llguidance")
    engine = Engine(model, words)
    ban = {words.specials["<think>"]: float("-inf")}
    bomb = Sampling(max_new_tokens=8, regex="(a?){5000}a{5000}", temperature=0.0, n=2, logit_bias=ban)
    alone = one(engine, max_new_tokens=6)
    engine.add(PROMPT, bomb, request_id="bomb")
    engine.add(PROMPT, Sampling(max_new_tokens=6, temperature=0.0), request_id="other")
    events = drain(engine)
    ends = [event for event in events if event.request_id == "bomb" and event.finish_reason is not None]
    assert len(ends) == 2 and all(e.finish_reason == "cancelled" and "too many" in str(e.error) for e in ends)
    assert finished(events)["other", 0].token_ids == alone.token_ids and not engine.has_work
    with pytest.raises(UserError, match="regex cannot be followed to its end"):
        engine.generate([PROMPT], bomb)
    assert not engine.has_work and engine.stats()["kv_used"] == 0


def test_a_grammar_may_end_at_no_token_of_the_padding(model: Any, tokenizer: Tokenizer) -> None:
    """Rows of the table beyond the tokenizer's tokens are ids that a client may name."""
    pytest.importorskip("llguidance")
    engine, padding = Engine(model, tokenizer), V - 1
    assert padding >= tokenizer.vocab_size
    found = one(engine, regex="[0-9]{3}", stop_ids=(padding, tokenizer.end_id), thinking_budget=0)
    assert found.finish_reason == "stop" and found.token_ids[-1] == tokenizer.end_id
    with pytest.raises(UserError, match="a token that ends the answer"):
        engine.add(PROMPT, Sampling(max_new_tokens=8, regex="[0-9]{3}", stop_ids=(padding,)))
    assert not engine.has_work


def test_a_grammar_goes_before_bans_that_leave_it_nothing(model: Any, words: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    engine = Engine(model, words)
    banned = {index: float("-inf") for index in range(words.vocab_size) if index != words.specials["<think>"]}
    banned |= {words.specials["<think>"]: -50.0}
    found = one(engine, regex="[0-9]{3}", logit_bias=banned, thinking_budget=0)
    assert re.fullmatch("(<think></think>)?[0-9]{3}", found.text) and found.finish_reason == "stop"
    assert all(logprob <= 0.0 for logprob in found.logprobs)
