"""Worked answers as training examples: rendered once, loss on the completion only.

An epoch's order is a function of (seed, epoch), so the examples of update `step` need no reader state.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from shoestring.core.errors import UserError
from shoestring.core.nouns import CUT_OFF, Message, Trace
from shoestring.data.batch import Example
from shoestring.data.textbook import MixEntry, conversation, solved
from shoestring.data.traces import TraceStore
from shoestring.text.chat import render
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.context import Context


def chat_example(messages: Sequence[Message], tokenizer: Tokenizer) -> Example:
    """A conversation with loss on what the assistant says, <|end|> included."""
    rendered = render(list(messages), tokenizer)
    return Example(rendered.ids, [float(m) for m in rendered.mask])


def textbook_examples(
    mix: Sequence[MixEntry], long_share: float, seed: int, count: int, tokenizer: Tokenizer
) -> list[Example]:
    """The first `count` problems of the textbook of `seed`, each told in its voice, as chats."""
    return [
        chat_example(conversation(problem, voice), tokenizer)
        for problem, voice in islice(solved(mix, seed, long_share), count)
    ]


def trace_example(trace: Trace, tokenizer: Tokenizer, *, exact: bool) -> Example:
    """A teacher's kept answer, the only turn with loss; one that was cut off teaches no end.

    exact: the teacher's tokenizer is this one, so the ids it sampled are taken as they are; else its text is rendered.
    """
    if exact and trace.prompt_ids is not None and trace.token_ids is not None:
        ids = [*trace.prompt_ids, *trace.token_ids]
        return Example(ids, [0.0] * len(trace.prompt_ids) + [1.0] * len(trace.token_ids))
    question = [Message(m["role"], m["content"]) for m in trace.messages]
    answer = Message("assistant", trace.answer, thinking=trace.thinking)
    rendered = render([*question, answer], tokenizer, unfinished=trace.finish_reason in CUT_OFF)
    told = max((place for place, on in enumerate(rendered.mask) if not on), default=-1)  # what earlier turns said too
    return Example(rendered.ids, [float(place > told) for place in range(len(rendered.ids))])


def trace_examples(ctx: Context, tokenizer: Tokenizer) -> tuple[list[Trace], list[Example]]:
    """The traces of input "traces" and their examples. Raises UserError when nothing was kept."""
    source = ctx.inputs.get("traces")
    if source is None:
        raise UserError(f'{ctx.run.name}: input "traces" is missing; name a run of `shoestring ask`, or a store.')
    traces = TraceStore(source if isinstance(source, Path) else source.path).read()
    if not traces and isinstance(source, Path):
        raise UserError(f"{ctx.run.name}: {source} holds no traces; give a run of `shoestring ask`, or what was kept.")
    if not traces:
        raise UserError(f"{ctx.run.name}: {source.name} kept no traces; ask more, or see why nothing was verified.")
    facts = {} if isinstance(source, Path) else source.manifest["facts"]
    exact = facts.get("tokenizer") == tokenizer.digest()
    return traces, [trace_example(trace, tokenizer, exact=exact) for trace in traces]


def examples_of_step(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """Indices of the examples of update `step`: a seeded permutation an epoch, epochs joined without a gap."""
    out: list[int] = []
    epoch, place = divmod(step * per_step, count)
    while len(out) < per_step:
        order = np.random.default_rng((seed, epoch)).permutation(count)
        out.extend(int(i) for i in order[place : place + per_step - len(out)])
        epoch, place = epoch + 1, 0
    return out
