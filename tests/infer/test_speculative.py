"""Drafts: the same tokens as without, counted honestly, in every company."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling
from shoestring.infer.engine import Engine
from shoestring.infer.speculative import TRIAL, Choice

from .conftest import V, deepseek, dense, make_certain
from .test_paged import IDS, ids_of, v3
from .test_schedules import audit

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly

PROMPTS = [IDS[:9], IDS[10:30], IDS[30:35], [7]]


def certain() -> Any:
    return make_certain(deepseek())


FAMILIES: dict[str, dict[str, Any]] = {
    "yarn and groups": {}, "half-split": {"rope_interleave": False, "num_experts_per_tok": 1},
    "unfused": {"kv_lora_rank": 64, "qk_nope_head_dim": 4, "v_head_dim": 4, "q_lora_rank": 32},
}  # fmt: skip


def family(name: str, **more: Any) -> Any:
    return v3(num_nextn_predict_layers=1, **FAMILIES[name], **more)


def mostly_certain(make: Any) -> Any:
    """With a little of everything else, so that some drafts are wrong."""
    model, other = make_certain(make()), make()
    with torch.no_grad():
        for parameter, noise in zip(model.parameters(), other.parameters(), strict=True):
            parameter.add_(0.15 * noise)
    return model


@pytest.fixture(scope="module")
def agreeing() -> Any:
    return mostly_certain(lambda: deepseek(1))


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_tokens_are_those_without_drafts_in_every_family(name: str, temperature: float) -> None:
    model = mostly_certain(lambda: family(name))
    sampling = Sampling(n=2, temperature=temperature, seed=3, max_new_tokens=24, routed_experts=True)
    for options in ({}, {"cache_tokens": 72, "block_size": 4}):
        expected = Engine(model, **options).generate(PROMPTS, sampling)
        engine = Engine(model, speculative=True, **options)
        found = engine.generate(PROMPTS, sampling)
        assert ids_of(found) == ids_of(expected)
        assert [[c.routed_experts for c in g] for g in found] == [[c.routed_experts for c in g] for g in expected]
        stats = engine.stats()
        assert stats["spec_decode_num_accepted_tokens"] < stats["spec_decode_num_drafts"]
        assert temperature == 0.0 or stats["spec_decode_num_accepted_tokens"] > 0  # some greedy loops nobody guesses


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=0.0, max_new_tokens=21),
    Sampling(n=3, max_new_tokens=20, seed=4, stop_ids=tuple(range(0, V, 9))),
    Sampling(temperature=0.7, top_p=0.9, presence_penalty=1.0, max_new_tokens=17, seed=1, n=2),
])  # fmt: skip
@pytest.mark.parametrize("options", [
    {}, {"deterministic": True}, {"cache_tokens": 72, "block_size": 4}, {"max_batch_tokens": 7},
], ids=["plain", "deterministic", "tight", "small budget"])  # fmt: skip
def test_the_tokens_are_those_without_drafts(agreeing: Any, sampling: Sampling, options: dict[str, Any]) -> None:
    expected = Engine(agreeing, **options).generate(PROMPTS, sampling)
    engine = Engine(agreeing, speculative=True, **options)
    found = engine.generate(PROMPTS, sampling)
    assert ids_of(found) == ids_of(expected)
    for group, other in zip(found, expected, strict=True):
        for a, b in zip(group, other, strict=True):
            worst = max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
            assert worst == 0.0 if options.get("deterministic") else worst < 1e-4
    audit(engine)
    stats = engine.stats()
    assert 0 <= stats["spec_decode_num_accepted_tokens"] <= stats["spec_decode_num_drafts"]
    assert engine._scheduler.blocks.used == 0


def test_accepted_drafts_save_steps() -> None:
    sampling = Sampling(temperature=0.0, max_new_tokens=30)
    engine = Engine(certain(), speculative=True)
    engine.generate([IDS[:9]], sampling)
    stats = engine.stats()
    # the prompt gives one token, then two a step; the last one has no room for a draft
    assert stats["spec_decode_num_drafts"] == stats["spec_decode_num_accepted_tokens"] == 14
    assert stats["steps"] == 16 and stats["computed_tokens"] == 9 + 29


def test_some_are_right_and_some_are_wrong(agreeing: Any) -> None:
    engine = Engine(agreeing, speculative=True)
    engine.generate(PROMPTS, Sampling(temperature=0.0, max_new_tokens=40))
    stats = engine.stats()
    assert 0 < stats["spec_decode_num_accepted_tokens"] < stats["spec_decode_num_drafts"]


def test_the_drafter_sees_what_training_showed_it() -> None:
    """Its draft is the module's own prediction, computed by the plain forward."""
    model = deepseek()
    engine = Engine(model, speculative=True)
    engine.add(IDS[:20], Sampling(temperature=0.0, max_new_tokens=8))
    drafts = []
    while engine.has_work:
        engine.step()
        drafts += [(list(s.ids), s.draft) for s in engine._scheduler.running if s.draft is not None]
    assert len(drafts) >= 4
    for ids, draft in drafts:
        with torch.no_grad():
            out = model(torch.tensor([ids]), mtp=True)
            assert int(model.unembed(out.mtp_hidden[0][0, -1]).argmax()) == draft


@pytest.mark.parametrize("name", ["deepseek", *FAMILIES])
def test_sampled_frequencies_are_the_distribution(both_ways: Any, name: str) -> None:
    """Chi-square of the second token given the first, drafts on, against the model's own probabilities."""
    model = deepseek() if name == "deepseek" else family(name)
    with torch.no_grad():
        model.head_weight[8:] = 0  # eight likely tokens, the others equal
        model.head_weight[:8] *= 4
    engine = Engine(model, speculative=True, max_sequences=512)
    n = (
        (3000 if name == "deepseek" else 600) if both_ways else (500 if name == "deepseek" else 100)
    )  # plain steps take four times as long
    (group,) = engine.generate([IDS[:5]], Sampling(n=n, max_new_tokens=4, seed=11))
    with torch.no_grad():
        first = torch.tensor([c.token_ids[2] for c in group])
        contexts: dict[tuple[int, ...], int] = {}
        for c in group:
            contexts[tuple(c.token_ids[:2])] = contexts.get(tuple(c.token_ids[:2]), 0) + 1
        expected_V = torch.zeros(V)
        for context, count in contexts.items():
            expected_V += count * model(torch.tensor([[*IDS[:5], *context]])).logits_BTV[0, -1].softmax(-1)
    observed_V = first.bincount(minlength=V).float()
    likely = expected_V >= 5
    cells = [(float(observed_V[i]), float(expected_V[i])) for i in likely.nonzero().flatten()]
    cells.append((float(observed_V[~likely].sum()), float(expected_V[~likely].sum())))
    chi2 = sum((o - e) ** 2 / e for o, e in cells if e > 0)
    freedom = len(cells) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5  # about five standard deviations
    assert engine.stats()["spec_decode_num_drafts"] > 0


def test_routed_experts_with_drafts() -> None:
    model = deepseek()
    sampling = Sampling(n=3, max_new_tokens=12, seed=4, routed_experts=True)
    plain, drafted = (Engine(model, speculative=way).generate(PROMPTS, sampling) for way in (False, True))
    for a, b in zip(plain, drafted, strict=True):
        assert [c.routed_experts for c in a] == [c.routed_experts for c in b]


def test_it_is_chosen_by_measurement() -> None:
    choice = Choice()
    for pace, expected in ((2.0, True), (0.5, False)):
        choice = Choice()
        for _ in range(2 * TRIAL + 4):
            way = choice.drafts(3)
            choice.record(3, way, 1.0 / pace if way else 1.0, 1)
        assert choice.drafts(3) is expected
        assert choice.drafts(200) is True  # another size of batch: its own trial
    engine = Engine(deepseek(), speculative="auto")
    sampling = Sampling(temperature=0.0, max_new_tokens=60)
    assert ids_of(engine.generate(PROMPTS, sampling)) == ids_of(Engine(deepseek()).generate(PROMPTS, sampling))


def test_without_a_module_it_is_refused() -> None:
    with pytest.raises(UserError, match="needs a model with an MTP module"):
        Engine(dense(), speculative=True)
    sampling = dataclasses.replace(Sampling(), max_new_tokens=2)
    assert Engine(dense(), speculative="auto").generate([[1]], sampling)
    with pytest.raises(UserError, match="speculative is 'yes'"):
        Engine(deepseek(), speculative="yes")  # type: ignore[arg-type]
