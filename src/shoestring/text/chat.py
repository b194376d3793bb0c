"""Chat templates: messages to token ids with a loss mask, and completions back to thinking and answer.

Templates are run as `transformers` runs them (template.py), so any published one renders here and ours renders there,
to the same ids. One difference is deliberate: what a message *contains* can never become a special token. Special
strings inside a content are broken up by a private-use character before rendering; the rendered text is cut at the
specials that remain, which only the template can have written; the private character is taken out; and the pieces are
encoded blind to specials. For contents without special strings the ids equal those of `apply_chat_template`.

Thinking of earlier turns is dropped, as R1's template does: everything the assistant thought before the last user
turn is not part of the history. `render_turns` is for what clients send: tools, a template's own variables and today's
date, no loss mask. Left out: images, named templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Message
from shoestring.text.template import fill

if TYPE_CHECKING:
    from shoestring.text.tokenizer import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"
DEFAULT_TEMPLATE = """\
{#- <|begin|><|system|>...<|user|>...<|assistant|><think>...</think>...<|end|> -#}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {{- '<|system|>' + message.content -}}
  {%- elif message.role == 'user' -%}
    {{- '<|user|>' + message.content -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<|assistant|>' -}}
    {%- if loop.index0 < last.user -%}
      {{- message.content.split('</think>')[-1] -}}
    {%- else -%}
      {%- if message.reasoning_content is string -%}
        {{- '<think>' + message.reasoning_content + '</think>' -}}
      {%- endif -%}
      {{- message.content -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- else -%}
    {{- raise_exception('unknown role: ' + message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


@dataclass(slots=True, frozen=True)
class Rendered:
    """Token ids and, for each, 1 where the assistant speaks (its end token included), else 0."""

    ids: list[int]
    mask: list[int]


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, generation_prompt: bool = False, unfinished: bool = False
) -> Rendered:
    """Ids and loss mask of a conversation; `generation_prompt` ends it where the assistant is to speak.

    Thinking of the last turn is always part of it: where the template does not write it (most know no thinking), or
    opens it in its generation prompt (R1's), it stands in R1's form, <think>, the thinking and </think> on lines of
    their own, before the answer. `unfinished`: the last turn was cut off, so nothing stands behind its text. Earlier
    turns that the template writes differently from how it asks for them are context, without loss.

    Raises UserError for an empty conversation, a tokenizer without a template, or a template that fails, or that
    writes the last turn differently from how it asks for one (its loss mask would be wrong).
    """
    if not messages:
        raise UserError("no messages to render; pass at least one.")
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template; add chat_template.jinja beside its tokenizer.json.")
    mark = _unused_character(messages)
    turns = [_as_turn(message, tokenizer, mark) for message in _without_old_thinking(messages)]

    @cache
    def text(count: int, prompt: bool) -> str:
        return fill(tokenizer.chat_template or "", turns[:count], tokenizer.special_tokens, prompt)

    whole, last = text(len(turns), generation_prompt), len(turns) - 1
    if turns[last]["role"] == "assistant" and not generation_prompt:
        asked = text(last, True)
        whole = _spoken(turns, whole, asked, tokenizer, mark)
        if unfinished and whole.startswith(asked):
            whole = max(asked, _cut_off(turns, whole, tokenizer, mark), key=len)
    ids: list[int] = []
    mask: list[int] = []
    done = 0
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            start, end = text(index, True), whole if index == last else text(index + 1, False)
            if not (whole.startswith(start) and whole.startswith(end) and done <= len(start) <= len(end)):
                if index < last:
                    continue
                raise UserError(
                    "the chat template writes an assistant turn differently from its generation prompt, so there is "
                    "no loss mask for it; train with another template."
                )
            _extend(ids, mask, _encode(whole[done : len(start)], tokenizer, mark), 0)
            _extend(ids, mask, _encode(whole[len(start) : len(end)], tokenizer, mark), 1)
            done = len(end)
    _extend(ids, mask, _encode(whole[done:], tokenizer, mark), 0)
    return Rendered(ids, mask)


def _spoken(turns: list[dict[str, Any]], whole: str, start: str, tokenizer: Tokenizer, mark: str) -> str:
    """The conversation with what its last turn thinks; `start` is what asks for that turn."""
    turn = turns[-1]
    thinking, opened = turn.get("reasoning_content"), start.rstrip().endswith(_OPEN)
    known = not (thinking or "").strip() or _writes_thinking(
        tokenizer.chat_template or "", tuple(tokenizer.special_tokens.items())
    )
    if (whole.startswith(start) and known) or (thinking is None and not opened):
        return whole

    thought = f"{(thinking or '').strip()}\n{_CLOSE}\n\n"
    tagged = _ended(turns, f"{_OPEN}\n{thought}{turn['content']}", tokenizer)
    if not opened and tagged.startswith(start) and thought.strip() in tagged[len(start) :]:
        return tagged
    # The template takes thinking out of answers: it writes what is behind one, and the rest is written here.
    return f"{start}{'' if opened else _OPEN + chr(10)}{thought}{turn['content']}{_behind(turns, tokenizer, mark)}"


def _ended(turns: list[dict[str, Any]], content: str, tokenizer: Tokenizer) -> str:
    """The conversation as the template writes it with another last turn."""
    ending = [*turns[:-1], {"role": "assistant", "content": content}]
    return fill(tokenizer.chat_template or "", ending, tokenizer.special_tokens, False)


def _behind(turns: list[dict[str, Any]], tokenizer: Tokenizer, mark: str) -> str:
    """What the template writes behind the last turn."""
    probe = chr(ord(mark) + 1)
    return _ended(turns, probe, tokenizer).rpartition(probe)[2]


@lru_cache(maxsize=32)
def _writes_thinking(source: str, specials: tuple[tuple[str, str], ...]) -> bool:
    """Whether the template writes the thinking of a last turn where published ones expect it."""
    thought = "\ue000"
    turn = {"role": "assistant", "content": "a", "reasoning_content": thought}
    return thought in fill(source, [{"role": "user", "content": "q"}, turn], dict(specials), False)


def _cut_off(turns: list[dict[str, Any]], whole: str, tokenizer: Tokenizer, mark: str) -> str:
    """The conversation up to the last word of its last turn, be it an answer or a thought."""
    whole = whole.removesuffix(_behind(turns, tokenizer, mark)).rstrip()
    return whole if turns[-1]["content"].strip() else whole.removesuffix(_CLOSE).rstrip()


def render_turns(
    turns: Sequence[dict[str, Any]], tokenizer: Tokenizer, variables: dict[str, Any] | None = None, *,
    continue_final: bool = False, ask: bool = True,
) -> list[int]:  # fmt: skip
    """Ids of turns as templates see them (role, content, reasoning_content, tool_calls, ...), for the next to speak.

    `continue_final` leaves the last turn open, to be gone on with, instead of asking for a new one; without `ask`
    no new one is asked for. `variables` are the template's own (tools, enable_thinking, ...). No string in turns or
    variables can become a special token. Raises UserError as `render` does; nothing is dropped from the history but
    what the template drops.
    """
    if not turns:
        raise UserError("no messages to render; pass at least one.")
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template; add chat_template.jinja beside its tokenizer.json.")
    variables = variables or {}
    mark = _free_character({char for text in _strings([list(turns), variables]) for char in text})
    broken = _broken(list(turns), tokenizer, mark)
    given = {**_broken(variables, tokenizer, mark), "strftime_now": datetime.now().strftime}
    text = fill(tokenizer.chat_template, broken, tokenizer.special_tokens, ask and not continue_final, given)
    if continue_final:
        last = str(broken[-1].get("content") or "").rstrip()
        place = text.rfind(last)
        if not last or place < 0:
            raise UserError("the last message cannot be continued: the chat template does not write its text as it is.")
        text = text[: place + len(last)]
    return _encode(text, tokenizer, mark)


def user_opening(tokenizer: Tokenizer, system: str | None = None) -> tuple[str, str]:
    """(what the template writes before a user's words, the first thing it writes after them).

    The second is a special token where one comes first, and may be "". Raises UserError as `render` does.
    """
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template; add chat_template.jinja beside its tokenizer.json.")
    turns = [{"role": "system", "content": system}] if system else []
    mark = _free_character(set(system or ""))
    turns.append({"role": "user", "content": mark})
    text = fill(tokenizer.chat_template, turns, tokenizer.special_tokens, True)
    before, found, after = text.partition(mark)
    if not found:
        raise UserError("the chat template does not write what the user says; give the opening itself.")
    special = _pattern(tuple(tokenizer.specials)).match(after.lstrip())
    return before, special[0] if special else after.strip()


def whole_answer(text: str, prompt_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """A completion as the assistant's whole turn: behind the opening tag where the prompt ends in it, as R1's does."""
    opened = tokenizer.decode(prompt_ids[-8:]).rstrip().endswith(_OPEN)
    return f"{_OPEN}{text}" if opened and not text.startswith(_OPEN) else text


def split_thinking(text: str) -> tuple[str | None, str]:
    """(thinking, answer) of a completion `<think>thinking</think>answer`, each without surrounding white space.

    Malformed text (no tags, text before them, a tag twice, a tag left open) has thinking None and answer "": it
    earns no credit, whatever it contains.
    """
    text = text.strip()
    well_formed = text.startswith("<think>") and text.count("<think>") == 1 and text.count("</think>") == 1
    if not well_formed:
        return None, ""
    thinking, answer = text.removeprefix("<think>").split("</think>")
    return thinking.strip(), answer.strip()


def _without_old_thinking(messages: Sequence[Message]) -> list[Message]:
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    return [
        Message(message.role, message.content) if index < last_user else message
        for index, message in enumerate(messages)
    ]


def _as_turn(message: Message, tokenizer: Tokenizer, mark: str) -> dict[str, Any]:
    """The dict a template reads, special strings broken; thinking under the key that published templates use."""
    turn = {"role": message.role, "content": _break(message.content, tokenizer, mark)}
    if message.thinking is not None:
        turn["reasoning_content"] = _break(message.thinking, tokenizer, mark)
    return turn


def _unused_character(messages: Sequence[Message]) -> str:
    return _free_character({char for message in messages for char in message.content + (message.thinking or "")})


def _free_character(used: set[str]) -> str:
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON-like value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _broken(value: Any, tokenizer: Tokenizer, mark: str) -> Any:
    """A JSON-like value with the special strings in it broken up, in keys too."""
    if isinstance(value, str):
        return _break(value, tokenizer, mark)
    if isinstance(value, dict):
        return {_break(key, tokenizer, mark): _broken(item, tokenizer, mark) for key, item in value.items()}
    return [_broken(item, tokenizer, mark) for item in value] if isinstance(value, list | tuple) else value


def _break(text: str, tokenizer: Tokenizer, mark: str) -> str:
    pattern = _pattern(tuple(tokenizer.specials))
    # A mark after every character: a special that overlaps the end of a match is broken too.
    return pattern.sub(lambda match: mark.join(match[0]) + mark, text)


def _encode(text: str, tokenizer: Tokenizer, mark: str) -> list[int]:
    """Ids of rendered text: specials in it are the template's; everything else is encoded blind to specials."""
    ids: list[int] = []
    for index, piece in enumerate(_pattern(tuple(tokenizer.specials)).split(text)):  # plain, special, ..., plain
        if index % 2:
            ids.append(tokenizer.specials[piece])
        elif piece:
            ids += tokenizer.encode(piece.replace(mark, ""))
    return ids


def _extend(ids: list[int], mask: list[int], more: list[int], flag: int) -> None:
    ids.extend(more)
    mask.extend([flag] * len(more))


@lru_cache(maxsize=32)
def _pattern(specials: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any special, the longest first, as one captured group."""
    choices = "|".join(re.escape(special) for special in sorted(specials, key=len, reverse=True))
    return re.compile(f"({choices or '(?!)'})")
