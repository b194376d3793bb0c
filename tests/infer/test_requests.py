"""One request at a time: events, stop strings, split characters, cancelling."""

from __future__ import annotations

from typing import Any

import pytest

from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Event, Sampling
from shoestring.infer.detokenise import StopStrings, TextStream
from shoestring.infer.engine import Engine
from shoestring.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("both_ways")  # tests/infer/conftest.py: natively and plainly

PROMPT = [5, 9, 12]


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    for _ in range(10_000):
        if not engine.has_work:
            return events
        events += engine.step()
    raise AssertionError("the engine does not come to an end")


def finished(events: list[Event]) -> dict[tuple[str, int], Completion]:
    return {(e.request_id, e.sample): e.completion for e in events if e.completion is not None}


def test_events_add_up_to_the_completion(model: Any, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    name = engine.add(PROMPT, Sampling(n=3, max_new_tokens=40, seed=1, temperature=1.5, top_logprobs=2))
    events = drain(engine)
    done = finished(events)
    assert set(done) == {(name, 0), (name, 1), (name, 2)}
    for sample in range(3):
        mine = [e for e in events if e.sample == sample]
        completion = done[name, sample]
        assert [t for e in mine for t in e.token_ids] == completion.token_ids
        assert [x for e in mine for x in e.logprobs] == completion.logprobs
        assert "".join(e.text for e in mine) == completion.text
        ended = completion.finish_reason == "stop"
        assert completion.text == tokenizer.decode(completion.token_ids[:-1] if ended else completion.token_ids)
        assert completion.top_logprobs is not None
        for (best, second), logprob in zip(completion.top_logprobs, completion.logprobs, strict=True):
            assert best[1] >= second[1] and best[1] >= logprob - 1e-6
    assert engine.step() == [] and not engine.has_work


def test_a_request_does_not_depend_on_its_neighbours(model: Any) -> None:
    sampling = Sampling(n=2, max_new_tokens=9, seed=5)
    alone = Engine(model)
    name = alone.add(PROMPT, sampling)
    expected = [c.token_ids for _, c in sorted(finished(drain(alone)).items())]
    crowd = Engine(model)
    crowd.add([1, 2, 3, 4], Sampling(n=3, max_new_tokens=5, seed=9))
    mine = crowd.add(PROMPT, sampling, request_id="mine")
    done = finished(drain(crowd))
    assert [done[mine, k].token_ids for k in range(2)] == expected and name == "request-0"


def test_cancel_before_and_while_running(model: Any, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    first = engine.add(PROMPT, Sampling(max_new_tokens=20, seed=1, ignore_eos=True))
    second = engine.add(PROMPT, Sampling(max_new_tokens=3, seed=2, ignore_eos=True))
    engine.cancel(first)
    events = engine.step()
    assert [e.finish_reason for e in events if e.request_id == first] == ["cancelled"]
    engine.cancel(second)
    (event,) = engine.step()
    assert event.request_id == second and event.finish_reason == "cancelled" and event.completion is not None
    assert len(event.completion.token_ids) == 1
    engine.cancel(second)
    engine.cancel("nobody")
    assert not engine.has_work and engine.step() == []


def test_a_name_is_used_once(model: Any) -> None:
    engine = Engine(model)
    engine.add(PROMPT, Sampling(max_new_tokens=4), request_id="a")
    with pytest.raises(UserError, match='"a" is in use'):
        engine.add(PROMPT, Sampling(max_new_tokens=4), request_id="a")


def test_what_needs_a_tokenizer_says_so(model: Any) -> None:
    with pytest.raises(UserError, match=r"sampling\.stop needs a tokenizer"):
        Engine(model).add(PROMPT, Sampling(stop=("x",), max_new_tokens=4))


class Bytes:
    """A tokenizer of bytes: every character beyond ASCII is split."""

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "é", "日本語 and 🙂!", "a🙂", "�b"])
def test_split_characters_are_joined(text: str) -> None:
    stream, data = TextStream(Bytes()), text.encode()
    pieces = [stream.push([byte]) for byte in data]
    assert "".join(pieces) + stream.flush() == text
    if "�" not in text:
        assert all("�" not in piece for piece in pieces)


def test_an_incomplete_end_is_not_swallowed() -> None:
    stream = TextStream(Bytes())
    assert stream.push(list(b"ok" + "🙂".encode()[:2])) == ""
    assert stream.flush() == "ok�"


def test_stop_strings_are_held_back_only_as_long_as_they_may_come() -> None:
    stops = StopStrings(("END", "\n\n"))
    assert stops.push("one E") == ("one ", False)
    assert stops.push("N") == ("", False)
    assert stops.push("T\n") == ("ENT", False)
    assert stops.push("\nmore") == ("", True)
    late = StopStrings(("END",))
    assert late.push("EN") == ("", False) and late.flush() == "EN"
    assert StopStrings(("END",)).push("END", stopping=False) == ("END", False)
