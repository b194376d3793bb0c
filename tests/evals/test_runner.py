"""The runner on a model that knows some answers: counts, summaries, what is printed with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Problem, Sampling
from shoestring.evals.runner import evaluate, tokens_of
from shoestring.tasks import questions
from shoestring.tasks.grading import Grader
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.rollouts import answer_groups, reward_groups


class Oracle:
    """Answers problem i rightly in its first `knows[i]` samples; the last sample of problem 0 is cut off."""

    def __init__(self, tokenizer: Tokenizer, problems: Sequence[Problem], knows: Sequence[int]):
        self.tokenizer, self.calls, self.tokens = tokenizer, [], 0
        self.by_prompt = {p.prompt: (p, right) for p, right in zip(problems, knows, strict=True)}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append((len(prompts), sampling.seed))
        groups = [self._group(list(prompt), sampling.n) for prompt in prompts]
        self.tokens += sum(map(len, prompts)) + sum(len(c.token_ids) for group in groups for c in group)
        return groups

    def _group(self, prompt: list[int], n: int) -> list[Completion]:
        text = self.tokenizer.decode(prompt).removeprefix("<|begin|><|user|>").removesuffix("<|assistant|>")
        problem, right = self.by_prompt[text]
        wrong = str((int(problem.gold) + 1) % 10)
        said = [f"<think>3</think>{problem.gold if i < right else wrong}" for i in range(n)]
        if problem is next(iter(self.by_prompt.values()))[0]:
            said[-1] = f"<think>{problem.gold}"
        return [
            Completion(text, [3] * len(text), [0.0] * len(text), "stop" if "</think>" in text else "length")
            for text in said
        ]


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [
        questions.make(seed, 2, "test", kind) for seed, kind in ((1, "sum"), (2, "sum"), (3, "story"), (4, "story"))
    ]


@pytest.fixture(scope="module")
def tokenizer(problems: list[Problem]) -> Tokenizer:
    return Tokenizer.train([p.prompt for p in problems], 400)


def run(tokenizer: Tokenizer, problems: list[Problem], knows: list[int], **options: Any) -> Any:
    oracle = Oracle(tokenizer, problems, knows)
    with Grader() as grade:
        return evaluate(oracle, tokenizer, problems, Sampling(n=4, seed=5), grade, **options), oracle


def test_two_samples_have_a_pass_at_2_and_a_system_prompt_is_read(
    tokenizer: Tokenizer, problems: list[Problem]
) -> None:
    seen: list[str] = []

    class Parrot:
        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
            seen.extend(tokenizer.decode(list(prompt)) for prompt in prompts)
            return [[Completion("<think>3</think>3", [3], [0.0], "stop") for _ in range(sampling.n)] for _ in prompts]

    with Grader() as grade:
        result = evaluate(Parrot(), tokenizer, problems, Sampling(n=2), grade, system="sum")  # type: ignore[arg-type]
    assert {"pass@1", "pass@2", "cons@2"} < set(result.overall)
    assert seen == [f"<|begin|><|system|>sum<|user|>{problem.prompt}<|assistant|>" for problem in problems]


def test_numbers(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    result, oracle = run(tokenizer, problems, [4, 0, 3, 2])
    assert result.tokens == oracle.tokens  # a prompt once for all its samples
    assert [row["correct"] for row in result.rows] == [3, 0, 3, 2]  # the cut answer earns nothing
    assert result.overall["pass@1"] == pytest.approx(8 / 16)
    assert result.overall["pass@4"] == pytest.approx(3 / 4)
    assert result.overall["cons@4"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    values = [3 / 4, 0.0, 3 / 4, 2 / 4]
    variance = sum((v - 0.5) ** 2 for v in values) / 3
    assert result.overall["pass@1_stderr"] == pytest.approx((variance / 4) ** 0.5)
    assert result.overall["truncated"] == pytest.approx(1 / 16)
    assert result.overall["problems"] == 4
    assert result.by_kind["questions/sum"]["pass@1"] == pytest.approx(3 / 8)
    assert result.by_kind["questions/story"]["pass@1"] == pytest.approx(5 / 8)
    assert result.by_task["questions"] == result.overall
    written = sum(sum(row["tokens"]) for row in result.rows)
    assert result.overall["mean_tokens"] == pytest.approx(written / 16)
    assert result.tokens > written
    assert result.scores() == {p.id: v for p, v in zip(problems, values, strict=True)}


def test_what_is_written_is_json_and_says_how_it_was_made(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    result, _ = run(tokenizer, problems, [4, 0, 3, 2])
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["sampling"]["seed"] == 5
    assert document["prompts_digest"] == result.prompts_digest
    assert "texts" not in document["rows"][0]
    assert result.rows[0]["texts"][0].startswith("<think>")
    other, _ = run(tokenizer, problems[::-1], [2] * 4)
    assert other.prompts_digest != result.prompts_digest


def test_batches(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    seen: list[list[dict[str, Any]]] = []
    result, oracle = run(tokenizer, problems, [4, 0, 3, 2], batch=3, on_batch=seen.append)
    assert [count for count, _ in oracle.calls] == [3, 1]
    assert oracle.calls[0][1] != oracle.calls[1][1]  # batches do not share their random numbers
    assert [len(made) for made in seen] == [3, 1]
    assert seen[0] + seen[1] == result.rows
    assert result.tokens == sum(tokens_of(made) for made in seen)
    again, repeated = run(tokenizer, problems, [4, 0, 3, 2], batch=3)
    assert repeated.calls == oracle.calls
    assert again.overall == result.overall


def test_goes_on_where_it_was_cut_short(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    """What is done is not asked again, and what follows draws as it would have."""
    whole, oracle = run(tokenizer, problems, [4, 0, 3, 2], batch=3)
    result, asked = run(tokenizer, problems, [4, 0, 3, 2], batch=3, done=whole.rows[:3])
    assert asked.calls == oracle.calls[1:]
    assert result.to_dict() == whole.to_dict()
    with pytest.raises(ValueError, match="not those of the first problems"):
        run(tokenizer, problems, [4, 0, 3, 2], batch=3, done=whole.rows[1:])


def test_a_right_answer_that_was_cut_off_is_not_right(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    """The same text counts when the model ended it itself, and neither passes nor votes when the limit did."""

    class Cut(Oracle):
        def _group(self, prompt: list[int], n: int) -> list[Completion]:
            made = super()._group(prompt, n)
            return [replace(c, finish_reason="length" if i % 2 else "stop") for i, c in enumerate(made)]

    with Grader() as grade:
        result = evaluate(Cut(tokenizer, problems, [0, 4, 4, 0]), tokenizer, problems, Sampling(n=4, seed=5), grade)
    assert [row["right"] for row in result.rows[1:3]] == [[True, False, True, False]] * 2
    assert [row["cons"] for row in result.rows] == [0, 1, 1, 0]
    assert result.overall["truncated"] == 0.5


def test_one_sample_has_no_pass_at_k(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    oracle = Oracle(tokenizer, problems, [1, 1, 0, 1])
    with Grader() as grade:
        result = evaluate(oracle, tokenizer, problems, Sampling(n=1, seed=0), grade)
    assert set(result.overall) == {"problems", "samples", "pass@1", "pass@1_stderr", "mean_tokens", "truncated"}


def test_mistakes(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    with pytest.raises(UserError, match="no problems"):
        run(tokenizer, [], [])
    with pytest.raises(UserError, match="appears twice"):
        run(tokenizer, [problems[0], problems[0]], [1, 1])

    def broken(_: Any) -> list[bool]:
        raise RuntimeError("the grader broke")

    with pytest.raises(RuntimeError, match="the grader broke"):
        evaluate(Oracle(tokenizer, problems, [1] * 4), tokenizer, problems, Sampling(seed=0), broken)


def test_thinking_that_the_prompt_opens_is_part_of_what_is_said(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    """R1's template ends its prompt in <think>: completions begin behind it. Evaluation and rollouts alike."""
    template = (
        "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    other = Tokenizer(tokenizer._full, config=tokenizer.config, chat_template=template)

    class Says:
        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
            asked = [other.decode(list(prompt)).removeprefix("<|user|>").split("<|")[0] for prompt in prompts]
            golds = [next(p.gold for p in problems if p.prompt == text) for text in asked]
            said = [[f"so\n</think>\n\n{gold}", f"so {gold}", f"<think>so</think>{gold}"] for gold in golds]
            return [[Completion(text, [3], [0.0], "stop") for text in texts] for texts in said]

    with Grader() as grade:
        result = evaluate(Says(), other, problems, Sampling(n=3, seed=5), grade)
        groups = answer_groups(Says(), other, problems, Sampling(n=3))
        reward_groups(groups, {"correct": 1.0, "format": 1.0}, grade)
    assert [row["right"] for row in result.rows] == [[True, False, True]] * 4
    assert result.rows[0]["texts"][0].startswith("<think>so\n</think>")
    assert [[rollout.reward for rollout in group] for group in groups] == [[2.0, 0.0, 2.0]] * 4
