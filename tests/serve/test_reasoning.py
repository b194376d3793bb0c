"""Thinking and answer apart, however the pieces fall."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.infer.detokenise import TextStream
from shoestring.serve.reasoning import Splitter, is_open
from shoestring.text.tokenizer import END_THINK, THINK, Tokenizer

CASES = [  # (opened by the prompt, what is sampled, thinking, answer)
    (False, "<think>3 + 8 1</think>1", "3 + 8 1", "1"),
    (False, " \n<think>3</think>\n\n5", "3", "5"),
    (True, "3 + 8 1</think>1", "3 + 8 1", "1"),
    (False, "just 5", "", "just 5"),
    (True, "cut off in the middle", "cut off in the middle", ""),
    (False, "<think></think>5", "", "5"),
    (True, "</think>5", "", "5"),
    (False, "5 <think>6</think>", "", "5 <think>6</think>"),  # a tag after the answer began is text
    (True, "grüße 你好</think>😀 ok", "grüße 你好", "😀 ok"),
    (False, " ", "", " "),
]


def run(tokenizer: Tokenizer, ids: list[int], cuts: set[int], opened: bool, lag: int = 0) -> tuple[str, str, Splitter]:
    """Feed ids in pieces, the text `lag` events late, as an engine that holds text back does."""
    splitter, stream = Splitter(tokenizer, opened=opened), TextStream(tokenizer)
    thinking, answer, piece, held = "", "", [], [""] * lag
    for place, index in enumerate(ids):
        piece.append(index)
        last = place == len(ids) - 1
        if place not in cuts and not last:
            continue
        held.append(stream.push(piece) + (stream.flush() if last else ""))
        text = "".join(held) if last else held.pop(0)
        more = splitter.feed(piece, text, last=last)
        thinking, answer, piece = thinking + more[0], answer + more[1], []
    return thinking, answer, splitter


@pytest.mark.parametrize(("opened", "said", "thinking", "answer"), CASES)
@settings(max_examples=40)
@given(cuts=st.sets(st.integers(0, 60)), lag=st.integers(0, 3))
def test_split(tokenizer: Tokenizer, opened: bool, said: str, thinking: str, answer: str, cuts: set[int], lag: int):
    ids = tokenizer.encode(said, specials=True)
    assert run(tokenizer, ids, cuts, opened, lag)[:2] == (thinking, answer)


def test_a_tag_that_is_written_as_text_closes_nothing(tokenizer: Tokenizer):
    tags = tokenizer.specials
    ids = [tags[THINK], *tokenizer.encode("he wrote </think> so"), tags[END_THINK], *tokenizer.encode("5")]
    assert run(tokenizer, ids, set(range(99)), False)[:2] == ("he wrote </think> so", "5")


def test_reasoning_tokens_are_those_between_the_tags(tokenizer: Tokenizer):
    thought = tokenizer.encode("3 + 8 1")
    ids = [tokenizer.specials[THINK], *thought, tokenizer.specials[END_THINK], *tokenizer.encode("1")]
    assert run(tokenizer, ids, set(), False)[2].reasoning_tokens == len(thought)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("<|user|>a<|assistant|><think>", True), ("<|assistant|><think>\n", True), ("<|assistant|>", False),
     ("<think></think>", False), ("<think>so", False)],
)  # fmt: skip
def test_the_prompt_says_whether_thinking_is_open(tokenizer: Tokenizer, prompt: str, expected: bool):
    assert is_open(tokenizer.encode(prompt, specials=True), tokenizer) is expected


class NoTags:
    """A tokenizer that spells its tags in characters."""

    specials: dict[str, int] = {}

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(("opened", "said", "thinking", "answer"), [*CASES[:3], *CASES[4:7]])
@settings(max_examples=40)
@given(cuts=st.sets(st.integers(0, 60)))
def test_tags_in_characters(opened: bool, said: str, thinking: str, answer: str, cuts: set[int]):
    assert run(NoTags(), [ord(char) for char in said], cuts, opened)[:2] == (thinking, answer)  # type: ignore[arg-type]
