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
from .test_paged import IDS, ids_of
from .test_schedules import audit

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly

PROMPTS = [IDS[:9], IDS[10:30], IDS[30:35], [7]]


def certain() -> Any:
    return make_certain(deepseek())


@pytest.fixture(scope="module")
def agreeing() -> Any:
    """The same with a little of everything else, so that some drafts are wrong."""
    model, other = certain(), deepseek(1)
    with torch.no_grad():
        for parameter, noise in zip(model.parameters(), other.parameters(), strict=True):
            parameter.add_(0.15 * noise)
    return model


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


def test_sampled_frequencies_are_the_distribution(both_ways: Any) -> None:
    """Chi-square of the second token given the first, drafts on, against the model's own probabilities."""
    model = deepseek()
    with torch.no_grad():
        model.head_weight[8:] = 0  # eight likely tokens, the others equal
        model.head_weight[:8] *= 4
    engine = Engine(model, speculative=True, max_sequences=512)
    n = 3000 if both_ways else 500  # plain steps take four times as long
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
