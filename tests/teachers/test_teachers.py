"""Teachers: one suite for all, exact ids, repeated seeds, recorded answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.contracts import Question, Teacher
from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Message, Sampling
from shoestring.core.registry import list_parts, load_part
from shoestring.data.traces import TraceStore
from shoestring.infer.engine import Engine
from shoestring.models.checkpoint import save
from shoestring.models.dense import Dense, DenseConfig
from shoestring.tasks import questions
from shoestring.teachers._contract import check_answers
from shoestring.teachers.engine import EngineTeacher
from shoestring.teachers.replay import ReplayTeacher
from shoestring.text.chat import render
from shoestring.text.tokenizer import Tokenizer

SAMPLING = Sampling(n=3, max_new_tokens=6, seed=11)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["last digit of 3 + 8 + 4 ? 1 2 5 6 7 9 0"], 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Dense:
    config = DenseConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return Dense(config, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    problems = [questions.make(seed, 2) for seed in range(5)]
    return [
        *(Question((Message("user", p.prompt),), p, p.id) for p in problems),
        Question((Message("system", "be brief"), Message("user", "3 + 8 ?")), id="free"),
    ]


@pytest.fixture(params=["engine", "replay"])
def teacher(request: pytest.FixtureRequest, model: Dense, tokenizer: Tokenizer, asked: list[Question]) -> Teacher:
    live = EngineTeacher(Engine(model, tokenizer), tokenizer, name="tiny", licence="MIT", questions_per_batch=4)
    return live if request.param == "engine" else ReplayTeacher(list(live.answer(asked, SAMPLING)))


def test_every_part_is_tested_here() -> None:
    assert set(list_parts("teachers")) >= {"engine", "replay"}


def test_answers_keep_the_contract(teacher: Teacher, asked: list[Question]) -> None:
    assert isinstance(teacher, Teacher)
    assert check_answers(teacher, asked, SAMPLING) == []


def test_traces_carry_the_question_and_exact_ids(model: Dense, tokenizer: Tokenizer, asked: list[Question]) -> None:
    teacher = EngineTeacher(Engine(model, tokenizer), tokenizer, name="tiny", licence="MIT", reported="run-1")
    traces = list(teacher.answer(asked, SAMPLING))
    first = traces[0]
    assert first.prompt_ids == render(asked[0].messages, tokenizer, generation_prompt=True).ids
    assert first.token_ids is not None
    assert first.usage == {"prompt_tokens": len(first.prompt_ids), "completion_tokens": len(first.token_ids)}
    assert (first.task, first.problem_id) == ("questions", asked[0].id)
    assert (traces[-1].task, traces[-1].problem_id) == (None, "free")
    assert traces[-1].messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "3 + 8 ?"}]
    assert (first.teacher, first.teacher_reported, first.licence) == ("tiny", "run-1", "MIT")
    assert [trace.decoding["sample"] for trace in traces[:3]] == [0, 1, 2]
    assert all(trace.correct is None and trace.cost_usd == 0.0 for trace in traces)
    scored = Engine(model).score([first.prompt_ids + first.token_ids])
    assert len(scored[0]) == len(first.prompt_ids) + len(first.token_ids) - 1


def test_batches_do_not_share_random_numbers(model: Dense, tokenizer: Tokenizer) -> None:
    """The same question in two batches, the same row of each: other answers."""
    teacher = EngineTeacher(Engine(model, tokenizer), tokenizer, name="t", licence="MIT", questions_per_batch=1)
    question = Question((Message("user", "3 + 8 ?"),))
    traces = list(teacher.answer([question, question], Sampling(max_new_tokens=12, seed=1)))
    assert traces[0].token_ids != traces[1].token_ids


def test_without_a_seed_one_is_drawn_and_recorded(model: Dense, tokenizer: Tokenizer, asked: list[Question]) -> None:
    teacher = EngineTeacher(Engine(model, tokenizer), tokenizer, name="tiny", licence="MIT")
    first, second = (list(teacher.answer(asked[:1], Sampling(max_new_tokens=6))) for _ in range(2))
    assert first[0].id != second[0].id
    again = list(teacher.answer(asked[:1], Sampling(max_new_tokens=6, seed=first[0].decoding["seed"])))
    assert (again[0].id, again[0].token_ids) == (first[0].id, first[0].token_ids)


class Says:
    def __init__(self, text: str):
        self.text = text

    def generate(self, prompts: Any, sampling: Sampling) -> list[list[Completion]]:
        return [[Completion(self.text, [5, 1], [0.0, 0.0], "stop")] * sampling.n for _ in prompts]


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("<think>3 + 8 1</think>1", True, ("3 + 8 1", "1")),
        ("1", True, (None, "")),  # not the form it was trained to answer in
        (" 1\n", False, (None, "1")),
    ],
)
def test_thinking_and_answer(
    tokenizer: Tokenizer, asked: list[Question], text: str, thinking: bool, expected: tuple[str | None, str]
) -> None:
    teacher = EngineTeacher(Says(text), tokenizer, name="t", licence="MIT", thinking=thinking)  # type: ignore[arg-type]
    (trace,) = teacher.answer(asked[:1], Sampling())
    assert (trace.thinking, trace.answer) == expected


def test_cost_is_divided_by_tokens(
    model: Dense, tokenizer: Tokenizer, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 136.0])
    monkeypatch.setattr("shoestring.teachers.engine.time.monotonic", lambda: next(clock))
    teacher = EngineTeacher(Engine(model, tokenizer), tokenizer, name="t", licence="MIT", usd_per_hour=2.0)
    traces = list(teacher.answer(asked, SAMPLING))
    assert sum(trace.cost_usd for trace in traces) == pytest.approx(0.02)  # 36 s
    lengths = [len(trace.token_ids or []) for trace in traces]
    assert [trace.cost_usd / 0.02 * sum(lengths) for trace in traces] == pytest.approx(lengths)


def test_parts_are_built_from_options(
    model: Dense, tokenizer: Tokenizer, asked: list[Question], tmp_path: Path
) -> None:
    save(model, tokenizer, tmp_path / "model")
    live = load_part("teachers", "engine").teacher(model=str(tmp_path / "model"), licence="MIT", name="tiny")
    store = TraceStore(tmp_path / "traces.db")
    store.append(live.answer(asked, SAMPLING))
    replayed = load_part("teachers", "replay").teacher(traces=store.path)
    assert list(replayed.answer(asked, SAMPLING)) == store.read()
    assert (replayed.name, replayed.licence) == ("tiny", "MIT")


def test_mistakes(model: Dense, tokenizer: Tokenizer, asked: list[Question], tmp_path: Path) -> None:
    engine = Engine(model, tokenizer)
    with pytest.raises(UserError, match="licence"):
        EngineTeacher(engine, tokenizer, name="t", licence="")
    with pytest.raises(UserError, match="questions_per_batch"):
        EngineTeacher(engine, tokenizer, name="t", licence="MIT", questions_per_batch=0)
    live = EngineTeacher(engine, tokenizer, name="t", licence="MIT")
    replay = ReplayTeacher(list(live.answer(asked[:1], SAMPLING)))
    with pytest.raises(UserError, match=r"3 answers are recorded .* 4 are asked"):
        list(replay.answer(asked[:1], Sampling(n=4)))
    with pytest.raises(UserError, match="0 answers are recorded"):
        list(replay.answer(asked[1:2], Sampling()))
    with pytest.raises(UserError, match="no recorded traces"):
        ReplayTeacher([])
    with pytest.raises(UserError, match="no traces file"):
        load_part("teachers", "replay").teacher(traces=tmp_path / "none.jsonl")
    save(model, None, tmp_path / "bare")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_part("teachers", "engine").teacher(model=str(tmp_path / "bare"), licence="MIT")
