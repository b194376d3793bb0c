"""The engine over the real models: equal to the plain forward, seeded, grouped, dropped rows, bad input."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from shoestring.core.contracts import Generator
from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Sampling
from shoestring.infer import score as score_module
from shoestring.infer.engine import Engine
from shoestring.text.tokenizer import Tokenizer

from .conftest import V, deepseek, dense

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly

PROMPTS = [[5, 9, 12], [7], [250, 3, 3, 8, 99, 41, 17], [5, 9, 12], [100, 200]]


def plain_logprobs(model: Any, ids: list[int], temperature: float = 1.0) -> list[float]:
    """The twin: all logits of one unpadded sequence."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits_BTV[0, :-1]
    return (logits_TV / temperature).log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()


def worst(a: list[float], b: list[float]) -> float:
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)


def ids_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def test_it_is_the_contract(model: Any) -> None:
    assert isinstance(Engine(model), Generator)


def test_greedy_equals_the_forward_without_a_cache(model: Any) -> None:
    groups = Engine(model).generate(PROMPTS, Sampling(temperature=0.0, max_new_tokens=8))
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits_BTV[0, -1].argmax()))
        assert completion.token_ids == ids[len(prompt) :]
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_the_sampler_are_those_of_the_trainer(model: Any, temperature: float) -> None:
    sampling = Sampling(n=4, temperature=temperature, max_new_tokens=20, seed=3, stop_ids=tuple(range(0, V, 12)))
    groups = Engine(model).generate(PROMPTS, sampling)
    finished = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 4
        for completion in group:
            finished.add(completion.finish_reason)
            whole = plain_logprobs(model, prompt + completion.token_ids, temperature)
            assert worst(completion.logprobs, whole[len(prompt) - 1 :]) < 1e-5
            assert all(token not in sampling.stop_ids for token in completion.token_ids[:-1])
            assert (completion.token_ids[-1] in sampling.stop_ids) == (completion.finish_reason == "stop")
            assert completion.finish_reason == "stop" or len(completion.token_ids) == 20
    assert finished == {"stop", "length"}


def test_in_bf16_the_mean_difference_is_below_a_hundredth() -> None:
    model = deepseek()
    model.kernels = dataclasses.replace(model.kernels, dtype="bfloat16")
    with torch.no_grad():
        model.head_weight.mul_(0.2)  # logits of a trained model's size
    groups = Engine(model).generate(PROMPTS, Sampling(n=4, max_new_tokens=20, seed=3))
    gaps: list[float] = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            whole = plain_logprobs(model, prompt + completion.token_ids)[len(prompt) - 1 :]
            gaps += [abs(a - b) for a, b in zip(completion.logprobs, whole, strict=True)]
    assert 0 < sum(gaps) / len(gaps) < 1e-2


def test_the_same_seed_gives_the_same_completions(model: Any) -> None:
    engine = Engine(model)
    sampling = Sampling(n=3, max_new_tokens=12, seed=7)
    first = engine.generate(PROMPTS, sampling)
    assert first == engine.generate(PROMPTS, sampling)
    assert ids_of(first) != ids_of(engine.generate(PROMPTS, Sampling(n=3, max_new_tokens=12, seed=8)))
    fresh = Sampling(n=3, max_new_tokens=12)
    assert ids_of(engine.generate(PROMPTS, fresh)) != ids_of(engine.generate(PROMPTS, fresh))


def test_samples_of_a_group_and_of_a_repeated_prompt_differ(model: Any) -> None:
    groups = ids_of(Engine(model).generate(PROMPTS, Sampling(n=4, max_new_tokens=12, seed=7)))
    same = groups[0] + groups[3]  # prompts 0 and 3 are the same
    assert len({tuple(ids) for ids in same}) == 8


def test_text_and_the_default_stop_id(model: Any, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    groups = engine.generate(PROMPTS, Sampling(n=40, temperature=1.5, max_new_tokens=60, seed=2))
    ended = [completion for group in groups for completion in group if completion.finish_reason == "stop"]
    assert ended
    for completion in ended:
        assert completion.token_ids[-1] == tokenizer.end_id
        assert completion.text == tokenizer.decode(completion.token_ids[:-1])
    stop = tokenizer.id_of("<|pad|>")
    groups = engine.generate(PROMPTS, Sampling(n=40, temperature=1.5, max_new_tokens=60, seed=2, stop_ids=(stop,)))
    reasons = {c.token_ids[-1] for group in groups for c in group if c.finish_reason == "stop"}
    assert reasons == {stop}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_score_equals_the_plain_forward(model: Any, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    sequences = [*PROMPTS, list(range(60)), [4]]
    monkeypatch.setattr(score_module, "SCORE_TOKENS", 64)  # several batches
    scores = Engine(model).score(sequences, temperature=temperature)
    for ids, logprobs in zip(sequences, scores, strict=True):
        assert len(logprobs) == len(ids) - 1
        assert worst(logprobs, plain_logprobs(model, ids, temperature)) < 1e-5


def test_score_of_nothing(model: Any) -> None:
    assert Engine(model).score([]) == []
    assert Engine(model).generate([], Sampling()) == []


def test_update_weights(model: Any) -> None:
    engine, other = Engine(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    greedy = Sampling(temperature=0.0, max_new_tokens=10)
    before = engine.generate(PROMPTS, greedy)
    engine.update_weights(other)
    assert engine.generate(PROMPTS, greedy) == Engine(other).generate(PROMPTS, greedy) != before
    with torch.no_grad():  # the trainer's own module, changed in place, is seen at once
        other.load_state_dict(model.state_dict())
    assert engine.generate(PROMPTS, greedy) == before


def test_what_was_let_go_is_made_again(model: Any) -> None:
    engine, greedy = Engine(model), Sampling(temperature=0.0, max_new_tokens=10)
    before = engine.generate(PROMPTS, greedy)
    engine.let_go()
    engine.let_go()
    assert not hasattr(engine._runner, "head")
    assert engine.generate(PROMPTS, greedy) == before
    engine.add(PROMPTS[0], greedy)
    with pytest.raises(UserError, match="requests are under way"):
        engine.let_go()


def test_the_model_still_trains_after_generating(model: Any) -> None:
    Engine(model).generate(PROMPTS, Sampling(max_new_tokens=4, seed=0))
    model(torch.tensor([PROMPTS[2]])).logits_BTV.log_softmax(-1)[..., 3].sum().backward()
    assert all(p.grad is None or not p.is_inference() for p in model.parameters())
    model.zero_grad()


def test_routed_experts_replay_in_the_trainer() -> None:
    model = deepseek()
    sampling = Sampling(n=5, max_new_tokens=12, seed=4, routed_experts=True, stop_ids=tuple(range(0, V, 9)))
    for prompt, group in zip(PROMPTS, Engine(model).generate(PROMPTS, sampling), strict=True):
        for completion in group:
            fed = torch.tensor([prompt + completion.token_ids[:-1]])
            assert completion.routed_experts is not None
            routed_LBTA = torch.tensor(completion.routed_experts).permute(1, 0, 2)[:, None]
            with torch.no_grad():
                free, replayed = model(fed), model(fed, routing=routed_LBTA)
            assert torch.equal(routed_LBTA.sort(-1).values, free.routed.sort(-1).values)
            assert torch.allclose(free.logits_BTV, replayed.logits_BTV, atol=1e-5)
    assert Engine(model).generate(PROMPTS[:1], Sampling(max_new_tokens=2))[0][0].routed_experts is None


def test_bad_input_gets_one_sentence(model: Any, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        engine.generate([[1], []], Sampling(max_new_tokens=1))
    for bad in ([V], [-1]):
        with pytest.raises(UserError, match="prompt 0 holds a token id outside"):
            engine.generate([bad], Sampling(max_new_tokens=1))
    with pytest.raises(UserError, match="has 100 tokens and asks for 29 new ones, but the model has 128 positions"):
        engine.generate([[3] * 100], Sampling(max_new_tokens=29))
    assert engine.generate([[3] * 100], Sampling(max_new_tokens=28, seed=0))
    with pytest.raises(UserError, match="sequence 0 has 129 tokens, but"):
        engine.score([[3] * 129])
    with pytest.raises(UserError, match="sequence 0 is empty"):
        engine.score([[]])
    with pytest.raises(UserError, match="scoring temperature"):
        engine.score([[1, 2]], temperature=0.0)
    with pytest.raises(UserError, match="max_batch_tokens"):
        Engine(model, max_batch_tokens=0)
    big = Tokenizer.train([" ".join(f"w{a}{b}" for a in "abcdefgh" for b in "abcdefgh")], 400)
    with pytest.raises(UserError, match="do not belong together"):
        Engine(model, big)
    with pytest.raises(UserError, match="do not belong together"):
        small = Engine(type(model)(model.config.model_copy(update={"vocab_size": 400})), big)
        small.update_weights(model)


def test_experts_of_a_model_without_any_are_refused() -> None:
    with pytest.raises(UserError, match="routed_experts"):
        Engine(dense()).generate(PROMPTS, Sampling(max_new_tokens=1, routed_experts=True))


def test_nan_weights_are_named() -> None:
    model = dense()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
        Engine(model).generate(PROMPTS, Sampling(max_new_tokens=2))
