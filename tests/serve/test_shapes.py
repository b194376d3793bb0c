"""What streams are made of."""

from __future__ import annotations

import json

from shoestring.serve.shapes import frame, prompt_logprobs
from shoestring.serve.tokens import TokenTexts
from shoestring.text.tokenizer import Tokenizer


def test_an_event_is_one_line_to_every_reader():
    """httpx and others end lines where Unicode does; what was said stays what it was."""
    document = {"content": "a\x85b\u2028c\u2029d\ne\x1c你好"}
    event = frame(document).decode()
    assert len(event.splitlines()) == 2 and event.endswith("\n\n") and "你好" in event
    assert json.loads(event.removeprefix("data: ")) == document


def test_the_rank_of_a_prompt_token_is_told_where_it_is_known(tokenizer: Tokenizer) -> None:
    """Among the best ones that were asked for; nobody counted the rest."""
    pairs = [None, [(5, -3.0), (7, -0.5), (5, -3.0)], [(6, -9.0), (7, -0.5), (8, -1.0)], [(6, -9.0)]]
    none, known, below, alone = prompt_logprobs(pairs, TokenTexts(tokenizer)) or []
    assert none is None and {i: row["rank"] for i, row in known.items()} == {"5": 2, "7": 1}
    assert {i: row["rank"] for i, row in below.items()} == {"6": None, "7": 1, "8": 2}
    assert alone["6"]["rank"] is None
