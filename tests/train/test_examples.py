"""Traces as examples: loss on the last answer alone, and no end where the teacher was cut off."""

from __future__ import annotations

from itertools import islice

import pytest
from distilling import trace_of

from shoestring.data.textbook import problems
from shoestring.recipes import quickstart
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.examples import trace_example

LINE_BEHIND = (  # as ChatML does
    "{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else '<|assistant|>') + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _told(tokenizer: Tokenizer, **changes: object) -> str:
    """The text with loss of a trace whose question holds an earlier answer."""
    problem = next(islice(problems(quickstart.LEARN, 3), 1))
    turns = [("user", "3"), ("assistant", "old"), ("user", "4")]
    messages = [{"role": role, "content": content} for role, content in turns]
    trace = trace_of(0, problem, messages=messages, thinking="why", answer="7", **changes)
    example = trace_example(trace, tokenizer, exact=False)
    return tokenizer.decode([i for i, w in zip(example.ids, example.weight, strict=True) if w])


@pytest.mark.parametrize(
    ("template", "whole", "cut"),
    [
        (None, "<think>why</think>7<|end|>", "<think>why</think>7"),
        (LINE_BEHIND, "<think>\nwhy\n</think>\n\n7<|end|>\n", "<think>\nwhy\n</think>\n\n7"),
    ],
)
def test_the_last_answer_and_its_end_if_it_ended(
    tokenizer: Tokenizer, template: str | None, whole: str, cut: str
) -> None:
    given = Tokenizer(tokenizer._full, config=tokenizer.config, chat_template=template or tokenizer.chat_template)
    assert _told(given) == whole
    assert _told(given, finish_reason="length") == cut
    assert _told(given, finish_reason="content_filter") == cut
