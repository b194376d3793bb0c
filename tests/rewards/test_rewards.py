"""Each reward's numbers, and what must never earn one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, FinishReason, Problem, Rollout
from shoestring.rewards import _contract, correct, format, language, length, repetition
from shoestring.tasks import questions
from shoestring.tasks.grading import Grader


def rollout(text: Any = "", *, tokens: int | list[int] = 1, problem: Problem = _contract.PROBLEM,
            finish: FinishReason = "stop") -> Rollout:  # fmt: skip
    ids = list(range(tokens)) if isinstance(tokens, int) else tokens
    return Rollout(problem, [0], Completion(text, ids, [0.0] * len(ids), finish))


def score(text: Any, **options: Any) -> float:
    return correct.reward([rollout(text, **options)], grade=_contract.exact_grade)[0]


@pytest.mark.parametrize("text", _contract.RIGHT)
def test_the_gold_is_correct(text: str) -> None:
    assert score(text) == 1.0
    assert score(text, finish="length") == 0.0, "an answer that was cut off is none"


@pytest.mark.parametrize("what", _contract.WRONG)
def test_what_only_looks_right_is_not(what: str) -> None:
    assert score(_contract.WRONG[what]) == 0.0


@pytest.mark.parametrize("text", [None, 12, b"<think></think>12", float("nan")])
def test_no_text_is_not_correct(text: Any) -> None:
    assert score(text) == 0.0


@given(st.text(max_size=200), st.text(max_size=50))
@settings(max_examples=300, deadline=None)
def test_only_the_exact_answer_after_the_thinking_is_correct(thinking: str, answer: str) -> None:
    tagged = f"<think>{thinking}</think>{answer}"
    clean = "think>" not in thinking + answer
    assert score(tagged) == float(clean and answer.strip() == _contract.GOLD)
    assert score(f"{thinking}{answer}{_contract.GOLD}") == 0.0


def test_correct_grades_once_and_keeps_the_order() -> None:
    calls: list[int] = []

    def grade(pairs: Any) -> list[bool]:
        calls.append(len(pairs))
        return _contract.exact_grade(pairs)

    texts = [_contract.RIGHT[0], "", "<think>1</think>13", _contract.RIGHT[1], "<think>"]
    assert correct.reward([rollout(text) for text in texts], grade=grade) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert calls == [3], "what has no answer is not graded"
    assert correct.reward([rollout("")], grade=grade) == [0.0] and calls == [3]


def test_correct_with_the_grader_itself() -> None:
    problems = [questions.make(seed, 4) for seed in range(20)]
    texts = [f"<think>{problem.voices['long'].thinking}</think>{problem.gold}" for problem in problems]
    with Grader() as grader:
        right = [rollout(text, problem=problem) for text, problem in zip(texts, problems, strict=True)]
        assert correct.reward(right, grade=grader) == [1.0] * 20
        shifted = [rollout(text, problem=problem) for text, problem in zip(texts[1:], problems, strict=False)]
        wanted = [float(a.gold == b.gold) for a, b in zip(problems[1:], problems, strict=False)]
        assert correct.reward(shifted, grade=grader) == wanted


@pytest.mark.parametrize(
    ("text", "value", "with_thinking"),
    [
        ("<think>a</think>b", 1, 1), ("<think></think>b", 1, 0), ("<think> </think>b", 1, 0),
        (" <think>a</think> b ", 1, 1),
        ("<think>a</think>", 0, 0), ("<think>a</think> \n", 0, 0), ("b", 0, 0), ("", 0, 0), ("<think>a", 0, 0),
        ("a</think>b", 0, 0), ("x<think>a</think>b", 0, 0), ("<think><think>a</think>b", 0, 0),
        ("<think>a</think>b</think>c", 0, 0), ("<think>a</think>b<think>c</think>", 0, 0), ("</think>a<think>", 0, 0),
        ("<THINK>a</THINK>b", 0, 0), (None, 0, 0),
    ],
)  # fmt: skip
def test_format(text: Any, value: float, with_thinking: float) -> None:
    assert format.reward([rollout(text)]) == [value]
    assert format.reward([rollout(text)], thinking=True) == [with_thinking]


@pytest.mark.parametrize(
    ("thinking", "wanted", "value"),
    [
        ("first add two", "en", 1.0), ("3 + 8 = 11", "en", 1.0), ("", "en", 0.0), ("  ", "en", 0.0),
        ("add 加法 two", "en", 0.5), ("加法", "zh", 1.0), ("加法 ok", "zh", 2 / 3), ("сумма add", "ru", 0.5),
        ("сумma", "ru", 0.0), ("naïve café", "fr", 1.0), ("これは足し算", "ja", 1.0), ("ｆｕｌｌ", "en", 0.0),
        ("더하기 add", "ko", 0.75), ("x 加 y 加 z", "en", 0.6), ("αβγ", "el", 1.0),
        ("ab中cd", "en", 2 / 3), ("aж中b", "en", 1 / 3), ("ラーメン", "ja", 1.0),
    ],
)  # fmt: skip
def test_language(thinking: str, wanted: str, value: float) -> None:
    text = f"<think>{thinking}</think>12 加法"
    assert language.reward([rollout(text)], language=wanted) == [pytest.approx(value)]


def test_options_unless_said_otherwise() -> None:
    """English; 32 tokens before 128; runs of 8, so that four tokens said twice repeat nothing."""
    assert language.reward([rollout("<think>add</think>12"), rollout("<think>加法</think>12")]) == [1.0, 0.0]
    assert length.reward([rollout(tokens=count) for count in (96, 112, 128)]) == [0.0, -0.5, -1.0]
    assert repetition.reward([rollout(tokens=[1, 2, 3, 4] * 2), rollout(tokens=[7] * 9)]) == [0.0, -0.5]


def test_language_mistakes() -> None:
    assert language.reward([rollout("no thinking at all"), rollout(None)]) == [0.0, 0.0]
    with pytest.raises(UserError, match="language"):
        language.reward([rollout("")], language="english")


def test_length_is_dapos_equation_13() -> None:
    values = {0: 0, 79: 0, 80: 0, 81: -0.05, 90: -0.5, 99: -0.95, 100: -1, 101: -1, 5000: -1}
    rollouts = [rollout(tokens=count) for count in values]
    assert length.reward(rollouts, max_tokens=100, buffer_tokens=20) == pytest.approx(list(values.values()))
    assert length.reward([rollout(tokens=10)], max_tokens=20, buffer_tokens=20) == [-0.5]
    for buffer in (0, 101, -1):
        with pytest.raises(UserError, match="buffer_tokens"):
            length.reward(rollouts, max_tokens=100, buffer_tokens=buffer)


def test_repetition_counts_runs_of_tokens() -> None:
    cases = [([], 0.0), ([1] * 2, 0.0), ([1, 2, 3, 4], 0.0), ([1] * 10, 1 / 8 - 1), ([1, 2, 3] * 3, 3 / 7 - 1)]
    assert repetition.reward([rollout(tokens=ids) for ids, _ in cases], n=3) == pytest.approx([v for _, v in cases])
    with pytest.raises(UserError, match="n is 0"):
        repetition.reward([rollout()], n=0)


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_repetition_against_a_plain_count(ids: list[int], n: int) -> None:
    runs = [ids[i : i + n] for i in range(len(ids)) if i + n <= len(ids)]
    first = sum(run not in runs[:i] for i, run in enumerate(runs))
    wanted = first / len(runs) - 1 if runs else 0.0
    assert repetition.reward([rollout(tokens=ids)], n=n) == [pytest.approx(wanted)]
