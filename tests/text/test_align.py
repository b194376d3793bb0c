"""Two tokenizations of one text: groups cover both, agree in bytes, and are as small as can be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UserError
from shoestring.text.align import align, align_pieces, bytes_of_tokens
from shoestring.text.tokenizer import Tokenizer

BOOK = "the quick brown fox said: 12 + 34 = 46, naïve café — 日本 🦊"
BYTES = Tokenizer.train([BOOK], 252)  # nearly one token a byte
WORDS = Tokenizer.train([BOOK] * 4, 600)


def _spell(tokenizer: Tokenizer, text: str) -> list[bytes]:
    table = bytes_of_tokens(tokenizer)
    return [table[i] for i in tokenizer.encode(text)]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("the quickbrown 1234+=é日🦊\n"), max_size=40))
def test_groups_are_whole_equal_and_smallest(text: str) -> None:
    ours, theirs = _spell(BYTES, text), _spell(WORDS, text)
    assert b"".join(ours) == b"".join(theirs) == text.encode()
    groups = align(ours, theirs)
    assert [i for a, _ in groups for i in a] == list(range(len(ours)))
    assert [j for _, b in groups for j in b] == list(range(len(theirs)))
    for a, b in groups:
        assert b"".join(ours[i] for i in a) == b"".join(theirs[j] for j in b)
        inner = {len(b"".join(ours[a.start : i])) for i in a[1:]} & {len(b"".join(theirs[b.start : j])) for j in b[1:]}
        assert not inner  # no common end within a group


def test_one_to_many() -> None:
    assert align([b"ab", b"c", b"de"], [b"a", b"b", b"cd", b"e"]) == [
        (range(0, 1), range(0, 2)), (range(1, 3), range(2, 4)),
    ]  # fmt: skip


def test_three_sides_share_what_each_two_do() -> None:
    sides = [b"ab", b"c", b"de"], [b"a", b"b", b"cd", b"e"], [b"abc", b"d", b"", b"e"]
    assert align(*sides) == [(range(0, 3), range(0, 4), range(0, 4))]
    assert align(sides[0], sides[0], sides[0]) == [(range(i, i + 1),) * 3 for i in range(3)]
    assert [group[:2] for group in align(sides[0], sides[1], sides[1])] == align(sides[0], sides[1])
    with pytest.raises(UserError, match="different text"):
        align(sides[0], sides[1], [b"abcd"])


def test_different_texts_are_said() -> None:
    with pytest.raises(UserError, match="different text"):
        align([b"ab"], [b"ac"])


def test_sentencepiece_spelling() -> None:
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Matcher

    matcher = Matcher(models.BPE(vocab={"▁a": 0, "<0x0A>": 1, "b": 2}, merges=[]))
    matcher.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    matcher.add_tokens([AddedToken("<s>", special=True)])
    assert bytes_of_tokens(Tokenizer(matcher, config={}, chat_template=None)) == [b" a", b"\n", b"b", b"<s>"]


def test_pieces_are_found_in_what_templates_write_around_them() -> None:
    ours = [b"<think>", b"ab", b"c", b"</think>", b"x y", b"<|end|>", b"\n"]
    theirs = [b" <think>", b"\n", b"a", b"bc", b"\n</", b"think>\n\n", b"x", b" y", b"</s>"]
    groups, covered, behind = align_pieces([b"abc", b"x y"], ours, theirs)
    assert groups == [(range(1, 3), range(2, 4)), (range(4, 5), range(6, 8))]
    assert covered == 6 and behind == [5, 8]


def test_a_token_over_the_edge_of_a_piece_is_in_no_group_but_for_white_space() -> None:
    pair = (range(0, 1), range(0, 1))
    groups, covered, behind = align_pieces([b"ab cd"], [b"ab", b" c", b"d."], [b"_ab", b" ", b"cd\n"])
    assert groups == [] and covered == 0 and behind == [2, 2]
    assert align_pieces([b"7"], [b"7"], [b" 7\n"])[0] == [pair]
    assert align_pieces([b"ab cd"], [b"ab", b" c", b"d."], [b" ab", b" ", b"cd"])[0] == [pair]


def test_words_that_a_side_changed_are_left_out() -> None:
    """An emoji that is unknown to one side, letters that it composed."""
    ours = ["one", " ", "🦊", " two", " cafe\u0301", " three"]
    theirs = ["one", "<unk>", " two", " caf", "é", " thr", "ee"]
    text = "".join(ours).encode()
    sides = [[token.encode() for token in side] for side in (ours, theirs)]
    groups, covered, behind = align_pieces([text], *sides)
    assert groups == [(range(0, 1),) * 2, (range(3, 4), range(2, 3)), (range(5, 6), range(5, 7))]
    assert covered == len("one two three") and behind == [6, 7]
