"""A model of ours, asked in process: traces with exact token ids.

The sampled ids travel in the trace, so a student that shares the tokenizer trains on precisely what was sampled;
nothing is decoded and encoded again. Left out: several engines, cascades of teachers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from shoestring.core.contracts import Generator, Question, Teacher
from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Message, Sampling, Trace
from shoestring.data.traces import trace_id
from shoestring.text.chat import render, split_thinking, whole_answer
from shoestring.text.tokenizer import Tokenizer

SEEDS = 1 << 62
RAW = "raw"  # the role of text that no template is put around


class EngineTeacher:
    """Answers by sampling from `engine`.

    reported: what the answers say they are from (a run's digest); the name when not given.
    licence: of the model's outputs. usd_per_hour: rate of the machine, divided over the answers by their tokens.
    thinking: the model answers `<think>...</think>answer`, and text of another form is no answer; otherwise all of
    the text is the answer. questions_per_batch: how many are generated together.
    """

    def __init__(
        self, engine: Generator, tokenizer: Tokenizer, *, name: str, licence: str, reported: str | None = None,
        usd_per_hour: float = 0.0, thinking: bool = True, questions_per_batch: int = 128,
    ):  # fmt: skip
        if not licence:
            raise UserError(f'teacher "{name}": say the licence of its outputs ("unknown" is allowed).')
        if questions_per_batch < 1:
            raise UserError(f'teacher "{name}": questions_per_batch is {questions_per_batch}; it must be at least 1.')
        self.name = name
        self.licence = licence
        self._engine = engine
        self._tokenizer = tokenizer
        self._reported = reported or name
        self._usd_per_hour = usd_per_hour
        self._thinking = thinking
        self._questions_per_batch = questions_per_batch

    def answer(self, questions: Iterable[Question], sampling: Sampling) -> Iterator[Trace]:
        """`sampling.n` traces for each question. Without a seed one is drawn, and stands in the traces."""
        if sampling.seed is None:
            sampling = replace(sampling, seed=random.SystemRandom().randrange(SEEDS))
        stream = iter(questions)
        seeds = random.Random(sampling.seed)
        while batch := list(islice(stream, self._questions_per_batch)):
            # A seed a batch: with one for all, the same row of every batch would see the same random numbers.
            yield from self._answer_batch(batch, sampling, seeds.randrange(SEEDS))

    def _answer_batch(self, batch: Sequence[Question], sampling: Sampling, seed: int) -> Iterator[Trace]:
        prompts = [self._prompt(question) for question in batch]
        started = time.monotonic()
        groups = self._engine.generate(prompts, replace(sampling, seed=seed))
        cost = (time.monotonic() - started) / 3600 * self._usd_per_hour
        tokens = sum(len(completion.token_ids) for group in groups for completion in group)
        for question, prompt_ids, group in zip(batch, prompts, groups, strict=True):
            for sample, completion in enumerate(group):
                share = len(completion.token_ids) / tokens
                yield self._trace(question, prompt_ids, completion, sample, sampling, cost * share)

    def _prompt(self, question: Question) -> list[int]:
        """The template's ids; a question of one message of role "raw" is gone on with as it is."""
        if question.messages[0].role == RAW:
            return self._tokenizer.encode(question.messages[0].content, specials=True)
        return render(question.messages, self._tokenizer, generation_prompt=True).ids

    def _trace(
        self, question: Question, prompt_ids: list[int], completion: Completion, sample: int, sampling: Sampling,
        cost_usd: float,
    ) -> Trace:  # fmt: skip
        messages = [as_row(message) for message in question.messages]
        decoding = asdict(sampling) | {"stop_ids": list(sampling.stop_ids), "stop": list(sampling.stop)}
        split = self._thinking and question.messages[0].role != RAW
        said = whole_answer(completion.text, prompt_ids, self._tokenizer) if split else completion.text.strip()
        thinking, answer = split_thinking(said) if split else (None, said)
        return Trace(
            id=trace_id(self.name, messages, decoding, sample),
            teacher=self.name,
            teacher_reported=self._reported,
            messages=messages,
            thinking=thinking,
            answer=answer,
            prompt_ids=prompt_ids,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            task=question.problem.task if question.problem else None,
            problem_id=question.problem.id if question.problem else question.id or None,
            correct=None,
            decoding=decoding | {"sample": sample},
            usage={"prompt_tokens": len(prompt_ids), "completion_tokens": len(completion.token_ids)},
            cost_usd=cost_usd,
            licence=self.licence,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def as_row(message: Message) -> dict[str, Any]:
    """A message of the question as a trace keeps it."""
    return {"role": message.role, "content": message.content}


def teacher(*, model: str, licence: str, name: str | None = None, **options: Any) -> Teacher:
    """Load the checkpoint `model` (a folder or hub id) and answer with it; `options` are EngineTeacher's."""
    from shoestring.infer.generator import generator_of
    from shoestring.models.checkpoint import load

    network, tokenizer = load(model)
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer.json; a teacher needs its tokenizer beside its weights.")
    return EngineTeacher(generator_of(network, tokenizer), tokenizer, name=name or model, licence=licence, **options)
