"""The edges of what is asked for: tags that come again, bytes that are no text, full contexts, new weights half-way."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import pytest
import torch

from shoestring.core.errors import UserError
from shoestring.core.nouns import Event, Sampling
from shoestring.infer.detokenise import TextStream
from shoestring.infer.engine import Engine
from shoestring.text.tokenizer import Tokenizer

from .conftest import V, deepseek
from .test_constraints import one
from .test_paged import IDS
from .test_requests import Bytes, drain, finished

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly

INF = float("inf")


# ---- thinking
@pytest.mark.parametrize("budget", [0, 3])
def test_opening_the_tag_again_gives_no_new_budget(tokenizer: Tokenizer, budget: int) -> None:
    """A model that repeats <think>, inside the thinking or after it, would else think for ever."""
    start, end = tokenizer.specials["<think>"], tokenizer.specials["</think>"]
    engine = Engine(deepseek(), tokenizer)
    found = one(
        engine, [5, start], thinking_budget=budget, ignore_eos=True, logit_bias={start: 1000.0, end: -INF}
    ).token_ids
    assert found[: budget + 1] == [start] * budget + [end]  # the repeated tag is a token of the thinking
    assert found[budget + 1 :] == ([start, end] * 12)[: 12 - budget - 1]  # opened once more, closed at once


def test_thinking_begun_in_the_prompt_counts_and_that_of_earlier_turns_does_not(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.specials["<think>"], tokenizer.specials["</think>"]
    engine, ban = Engine(deepseek(), tokenizer), {start: -INF, end: -INF}
    begun = one(engine, [start, 9, 9, 9, end, 7, start, 8, 8], thinking_budget=5, ignore_eos=True, logit_bias=ban)
    assert begun.token_ids.index(end) == 3
    fresh = one(engine, [start, 9, 9, 9, end, 7], thinking_budget=4, ignore_eos=True,
                logit_bias={start: 1000.0, end: -INF})  # fmt: skip
    assert fresh.token_ids[0] == start and fresh.token_ids.index(end) == 4 + 1


@pytest.mark.parametrize("stop", ["budget", "length"])
def test_a_forced_end_of_thinking_that_stops_or_is_the_last_token(tokenizer: Tokenizer, stop: str) -> None:
    start, end = tokenizer.specials["<think>"], tokenizer.specials["</think>"]
    more: dict[str, Any] = {"stop_ids": (end,), "min_new_tokens": 12} if stop == "budget" else {"max_new_tokens": 4}
    found = one(Engine(deepseek(), tokenizer), [5, start], thinking_budget=3, ignore_eos=True,
                logit_bias={start: -INF, end: -INF}, **more)  # fmt: skip
    assert found.token_ids[3] == end and found.logprobs[3] == 0.0
    assert len(found.token_ids) == (12 if stop == "budget" else 4) and found.finish_reason == "length"


# ---- text
def test_any_bytes_at_all_give_their_text_piece_by_piece() -> None:
    """However broken: what is shown is the decoding of the whole, and never takes part of it back."""
    rng = random.Random(0)
    for round_ in range(60):
        good = "é日🙂a".encode() * 20
        data = bytes(rng.choice([0x80, 0xE6, 0xF0, 0x97, 0x61, 0xC3]) for _ in range(rng.randrange(200)))
        data = data + good if round_ % 2 else good[: rng.randrange(40)] + data
        stream, shown = TextStream(Bytes()), ""
        for byte in data:
            shown += stream.push([byte])
            assert data.decode("utf-8", errors="replace").startswith(shown)
        assert shown + stream.flush() == data.decode("utf-8", errors="replace")


def test_endless_bytes_that_are_no_character_cost_no_more_than_others() -> None:
    """One request may write them (a bias is enough); decoding all of them anew each time held everybody up."""

    class Counted(Bytes):
        decoded = 0

        def decode(self, ids: Any) -> str:
            self.decoded += len(ids)
            return super().decode(ids)

    tokenizer = Counted()
    stream = TextStream(tokenizer)
    shown = "".join(stream.push([0x80]) for _ in range(4000))
    assert len(shown) > 3900 and tokenizer.decoded < 4000 * 200
    silent, began = TextStream(Nothing()), time.process_time()
    assert "".join(silent.push([1]) for _ in range(20_000)) == "" and time.process_time() - began < 5


class Nothing:
    """A tokenizer whose tokens have no text, as padding of the table has none."""

    def decode(self, ids: Any) -> str:
        sum(ids)  # as long as there are ids
        return ""


TEXT = "日本語🙂END 語"


@pytest.mark.parametrize("stop", ["🙂", "語🙂E", "本", "ND ", "日", "語", "no such", "🙂EX"])
def test_stop_strings_of_split_characters(stop: str) -> None:
    """Every character of the text is several tokens, written because a grammar demands it; the stop is found all the
    same, nothing of it is ever shown, and the tokens that made it are counted."""
    pytest.importorskip("llguidance")
    words = Tokenizer.train(["last digit of 3 + 8 + 4 ? 1 2 5 6 7 9 0"], V)
    ban = {words.specials["<think>"]: -INF}
    engine = Engine(deepseek(), words)
    engine.add([5, 9], Sampling(max_new_tokens=40, seed=1, regex=TEXT, stop=(stop,), logit_bias=ban))
    events = drain(engine)
    (done,) = finished(events).values()
    assert "".join(event.text for event in events) == done.text == TEXT.split(stop)[0]
    assert not any("�" in event.text for event in events)
    assert done.finish_reason == "stop" and sum(len(e.token_ids) for e in events) == len(done.token_ids)
    if stop in TEXT:
        written = words.decode(done.token_ids).rstrip("�")
        assert written.startswith(done.text + stop) and len(written) <= len(done.text + stop) + 1


# ---- the prompt's logprobs
def test_the_prompt_s_logprobs_where_the_prompt_is_known(model: Any) -> None:
    """A cached prefix has keys and no logits: it is read again, and what follows may still take it over."""
    engine, asked = Engine(model, block_size=8), Sampling(temperature=0.0, max_new_tokens=3, prompt_logprobs=2)
    fresh = Engine(model, block_size=8).generate([IDS[:30]], asked)[0][0]
    engine.generate([IDS[:30]], Sampling(max_new_tokens=1))
    again = engine.generate([IDS[:30]], asked)[0][0]
    assert (again.cached_tokens, again.token_ids) == (0, fresh.token_ids)
    assert again.prompt_logprobs is not None and fresh.prompt_logprobs is not None
    for a, b in zip(again.prompt_logprobs[1:], fresh.prompt_logprobs[1:], strict=True):
        assert [x for _, x in a or []] == pytest.approx([x for _, x in b or []], abs=1e-5)
    assert engine.generate([IDS[:30]], Sampling(max_new_tokens=1))[0][0].cached_tokens == 24


@pytest.mark.parametrize("budget", [2048, 9])
def test_a_prompt_that_fills_the_context_can_be_scored(model: Any, budget: int) -> None:
    """One token is drawn from the last position and needs none of its own; two would."""
    prompt = [(7 * i) % V for i in range(128)]
    engine = Engine(model, cache_tokens=128, block_size=8, max_batch_tokens=budget)
    (found,) = engine.generate([prompt], Sampling(max_new_tokens=1, temperature=0.0, prompt_logprobs=0))[0]
    assert found.prompt_logprobs is not None and len(found.prompt_logprobs) == 128
    expected = engine.score([prompt])[0]
    assert [pairs[0][1] for pairs in found.prompt_logprobs[1:] if pairs] == pytest.approx(expected, abs=1e-4)
    for ids, new in ((prompt, 2), ([*prompt, 1], 1)):
        with pytest.raises(UserError, match="the model has 128 positions"):
            engine.generate([ids], Sampling(max_new_tokens=new))


# ---- weights
def changed(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return other


@pytest.mark.parametrize("steps", range(0, 9))
def test_new_weights_at_every_stage_of_a_group(model: Any, steps: int) -> None:
    """Waiting, half read, decoding, some samples not forked yet: what is sampled after is the new weights', and so are
    the logprobs and experts of a prompt that nobody had gone on from."""
    other, routed = changed(model), hasattr(model.config, "n_routed_experts")
    sampling = Sampling(n=3, max_new_tokens=6, seed=2, prompt_logprobs=1, routed_experts=routed)
    engine = Engine(model, block_size=4, cache_tokens=48, max_batch_tokens=8)
    engine.add(IDS[:20], sampling, request_id="mine")
    events: list[Event] = [event for _ in range(steps) for event in engine.step()]
    engine.update_weights(other)
    before = {sample: sum(len(e.token_ids) for e in events if e.sample == sample) for sample in range(3)}
    done = finished(events + drain(engine))
    for sample in range(3):
        found, old = done["mine", sample], before[sample]
        ids = [*IDS[:20], *found.token_ids]
        (new_logp,) = engine.score([ids])
        assert found.logprobs[old:] == pytest.approx(new_logp[19 + old :], abs=1e-4)
        if not any(before.values()):
            assert found.prompt_logprobs is not None
            assert [pairs[0][1] for pairs in found.prompt_logprobs[1:] if pairs] == pytest.approx(
                new_logp[:19], abs=1e-4
            )
            if routed:
                with torch.no_grad():
                    fed = other(torch.tensor([ids[:-1]])).routed[:, 0]
                assert found.routed_experts is not None
                mine_LTA = torch.tensor(found.routed_experts).permute(1, 0, 2)
                assert torch.equal(mine_LTA.sort(-1).values, fed.sort(-1).values)
    assert engine._scheduler.blocks.used == 0


# ---- what is no number
@pytest.mark.parametrize("ids", [[1.5, 2], [True], ["a"], [None], "abc", torch.tensor([0.5])])
def test_ids_that_are_no_whole_numbers_are_refused_before_anything_runs(model: Any, ids: Any) -> None:
    engine = Engine(model)
    with pytest.raises(UserError, match="the prompt holds"):
        engine.add(ids, Sampling(max_new_tokens=2))
    with pytest.raises(UserError, match="sequence 0 holds"):
        engine.score([ids])
    assert not engine.has_work


def test_ids_may_come_as_arrays(model: Any) -> None:
    engine, greedy = Engine(model), Sampling(temperature=0.0, max_new_tokens=3)
    expected = engine.generate([[1, 2, 3]], greedy)[0][0].token_ids
    for ids in (torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]).numpy(), (1, 2, 3)):
        assert engine.generate([ids], greedy)[0][0].token_ids == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1.5), ("n", True), ("top_k", 2.5), ("max_new_tokens", "3"), ("max_new_tokens", None), ("seed", 1.5),
        ("top_logprobs", 2.0), ("min_p", None), ("temperature", "1"), ("temperature", None), ("stop_ids", (1.0,)),
        ("logit_bias", {1: "a"}), ("logit_bias", {True: 1.0}), ("stop", (3,)),
    ],
)  # fmt: skip
def test_options_that_are_no_numbers_are_one_sentence(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^sampling\.{name} [^\n]*\.$"):
        Sampling(**{name: value})
