"""Thinking and answer apart, while they stream.

The tags are tokens, so the border is found by token *id*: a model that writes the characters `</think>` in its
thinking, as text, has not closed it. The engine's text arrives later than its ids (it holds back what may become a
stop string or half a character), so the border is kept as a position in the text: the length of what the ids before
it decode to. Start: open when the prompt ends in the opening tag (DeepSeek-R1's templates), else closed until the
first thing said is the tag. A tokenizer whose tags are no tokens is split by text. Nothing opened: all is answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoestring.text.tokenizer import END_THINK, THINK, Tokenizer


def think_ids(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Ids of the opening and the closing tag; None when they are not single tokens."""
    found = tokenizer.specials.get(THINK), tokenizer.specials.get(END_THINK)
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def is_open(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt leaves thinking open: an opening tag with nothing but white space behind it."""
    tags = think_ids(tokenizer)
    tail = list(prompt_ids[-8:])
    if tags is None:
        return tokenizer.decode(tail).rstrip().endswith(THINK)
    if tags[0] not in tail:
        return False
    after = tail[len(tail) - tail[::-1].index(tags[0]) :]
    return tags[1] not in after and not tokenizer.decode(after).strip()


class Splitter:
    """One sample's stream: `feed` takes an event's ids and text, and gives (thinking, answer) that may be shown."""

    def __init__(self, tokenizer: Tokenizer, *, opened: bool, enabled: bool = True) -> None:
        self._tokenizer = tokenizer
        self._tags = think_ids(tokenizer)
        self._enabled = enabled
        self._state = "thinking" if opened and enabled else ("unknown" if enabled else "answer")
        self._ids: list[int] = []
        self._text = ""  # what has been heard and not given
        self._given = 0  # characters of the whole text that have left `_text`
        self._borders: list[tuple[int, str]] = []  # (position in the whole text, tag)
        self.opened = self._state == "thinking"  # whether there is any thinking to speak of
        self.reasoning_tokens = 0
        self._counting = self.opened
        self._begun = False  # whether anything but white space was shown since the last border

    def feed(self, token_ids: Sequence[int], text: str, *, last: bool = False) -> tuple[str, str]:
        """(thinking, answer) that this event adds."""
        self._text += text
        if not self._enabled:
            return "", self._take(len(self._text))
        for index in token_ids:
            self._count(index)
        if self._tags is None:
            self._borders = self._borders or self._find_in_text()
        thinking, answer = "", ""
        while True:
            border = self._borders[0] if self._borders else None
            here = len(self._text) if border is None else min(border[0] - self._given, len(self._text))
            more_thinking, more_answer = self._show(here, last)
            thinking, answer = thinking + more_thinking, answer + more_answer
            if border is None or border[0] > self._given or (len(self._text) < len(border[1]) and not last):
                return thinking, answer
            self._take(len(border[1]))
            self._borders.pop(0)
            self._cross(border[1])
            if self._tags is None:
                self._borders = self._find_in_text()

    def _cross(self, tag: str) -> None:
        self._state = "thinking" if tag == THINK else "answer"
        self.opened = self.opened or tag == THINK
        self._begun = False

    def _show(self, count: int, last: bool) -> tuple[str, str]:
        """Let go of `count` characters, on the side where the stream stands."""
        if self._tags is None and not self._borders and not last:
            count = self._without_half_a_tag(count)
        if self._state == "unknown":
            if self._text[:count].strip():
                self._state = "answer"
            elif self._borders:
                self._take(count)  # white space before the opening tag belongs to nobody
                return "", ""
            elif not last:
                return "", ""
        shown = self._take(count)
        if not self._begun and self.opened:
            shown = shown.lstrip("\n")
        self._begun = self._begun or bool(shown)
        return (shown, "") if self._state == "thinking" else ("", shown)

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        self._given += len(taken)
        return taken

    def _count(self, index: int) -> None:
        """Note a tag's place in the text, and count what is thought."""
        if self._tags is None:
            self.reasoning_tokens += self._state == "thinking"
            return
        opening, closing = self._tags
        tag = THINK if index == opening else END_THINK if index == closing else None
        inside = self._counting
        allowed = (tag == THINK and not inside and not self._said()) or (tag == END_THINK and inside)
        if tag is not None and allowed:
            self._borders.append((len(self._tokenizer.decode(self._ids)), tag))
            self._counting = tag == THINK
        elif inside:
            self.reasoning_tokens += 1
        self._ids.append(index)

    def _said(self) -> bool:
        """Whether an answer has begun: a tag after that is text."""
        return bool(self._ids) and bool(self._tokenizer.decode(self._ids).strip())

    def _find_in_text(self) -> list[tuple[int, str]]:
        tag = END_THINK if self._state == "thinking" else THINK
        place = self._text.find(tag)
        if place < 0 or self._state == "answer" or (self._state == "unknown" and self._text[:place].strip()):
            return []
        return [(self._given + place, tag)]

    def _without_half_a_tag(self, count: int) -> int:
        tag = END_THINK if self._state == "thinking" else THINK
        if self._state == "answer":
            return count
        lead = self._text[:count]
        for length in range(min(len(tag) - 1, len(lead)), 0, -1):
            if lead.endswith(tag[:length]):
                return count - length
        return count
