"""Ask a model problems several times each, grade the answers, and say how sure the numbers are.

Printed with every number, because each has moved published results: problems, samples, seed, a digest of the prompts,
decoding, the share of truncated answers. A grader's exception is not swallowed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from shoestring.core.contracts import Generator
from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Message, Problem, Sampling
from shoestring.evals.passk import cons_at_k, mean_and_stderr, pass_at_k
from shoestring.tasks.grading import gradable
from shoestring.text.chat import render, split_thinking, whole_answer
from shoestring.text.tokenizer import Tokenizer

Grade = Callable[[Sequence[tuple[Problem, str]]], list[bool]]
Summary = dict[str, float | int | None]


@dataclass(slots=True)
class EvalResult:
    """`rows`: one per problem. `overall`, `by_task`, `by_kind` ("task/kind"): summaries. `tokens`: read and written."""

    rows: list[dict[str, Any]]
    overall: Summary
    by_task: dict[str, Summary]
    by_kind: dict[str, Summary]
    tokens: int
    sampling: dict[str, Any]
    prompts_digest: str

    def scores(self) -> dict[str, float]:
        """Share of right samples by problem id: what `evals.paired.compare` compares."""
        return {row["problem_id"]: row["correct"] / row["samples"] for row in self.rows}

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the sampled texts (they are in `rows`)."""
        without = [{key: value for key, value in row.items() if key != "texts"} for row in self.rows]
        return asdict(self) | {"rows": without}


def evaluate(
    engine: Generator,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    sampling: Sampling,
    grade: Grade,
    *,
    system: str | None = None,
    batch: int = 64,
    done: Sequence[dict[str, Any]] = (),
    on_batch: Callable[[list[dict[str, Any]]], None] | None = None,
) -> EvalResult:
    """`sampling.n` answers to each problem, `batch` problems at a time; what follows the thinking is graded, and an
    answer that was cut off is not right (`tasks.grading.gradable`).

    `on_batch` is given each batch's rows when they are there; `done`, rows of the first batches from an earlier call
    that was cut short, are taken as they are. Raises UserError for no or repeated problems.
    """
    if not problems:
        raise UserError("no problems to evaluate on.")
    if len({problem.id for problem in problems}) < len(problems):
        raise UserError("a problem appears twice in the evaluation; its samples would count double.")
    prompts = [_prompt(problem, system, tokenizer) for problem in problems]
    seeds = random.Random(sampling.seed) if sampling.seed is not None else None
    rows = list(done)
    if [row["problem_id"] for row in rows] != [problem.id for problem in problems[: len(rows)]]:
        raise ValueError("the rows that are done are not those of the first problems")
    for start in range(0, len(problems), batch):
        part = slice(start, start + batch)
        seed = seeds.randrange(1 << 62) if seeds else None
        if start < len(done):
            continue
        groups = engine.generate(prompts[part], replace(sampling, seed=seed))
        for prompt, group in zip(prompts[part], groups, strict=True):
            for completion in group:
                completion.text = whole_answer(completion.text, prompt, tokenizer)
        made = _grade(problems[part], prompts[part], groups, grade)
        rows += made
        if on_batch is not None:
            on_batch(made)
    return EvalResult(
        rows=rows,
        overall=summarise(rows),
        by_task=_by(rows, lambda row: row["task"]),
        by_kind=_by(rows, lambda row: f"{row['task']}/{row['kind']}"),
        tokens=tokens_of(rows),
        sampling=asdict(sampling) | {"stop_ids": list(sampling.stop_ids)},
        prompts_digest=hashlib.sha256(repr(prompts).encode()).hexdigest()[:12],
    )


def tokens_of(rows: Iterable[dict[str, Any]]) -> int:
    """Tokens read and written for these rows; a prompt is read once for all its samples."""
    return sum(row["prompt_tokens"] + sum(row["tokens"]) for row in rows)


def summarise(rows: Sequence[dict[str, Any]]) -> Summary:
    """pass@1, pass@k and cons@k with standard errors, mean answer length in tokens, share of truncated answers."""
    k = rows[0]["samples"]
    columns: dict[str, list[float]] = {"pass@1": [row["correct"] / k for row in rows]}
    if k > 1:
        columns[f"pass@{k}"] = [pass_at_k(k, row["correct"], k) for row in rows]
        columns[f"cons@{k}"] = [row["cons"] for row in rows]
    summary: Summary = {"problems": len(rows), "samples": k}
    for name, values in columns.items():
        summary[name], summary[f"{name}_stderr"] = mean_and_stderr(values)
    summary["mean_tokens"] = sum(sum(row["tokens"]) for row in rows) / (len(rows) * k)
    summary["truncated"] = sum(row["truncated"] for row in rows) / (len(rows) * k)
    return summary


def _by(rows: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> dict[str, Summary]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {name: summarise(group) for name, group in sorted(groups.items())}


def _prompt(problem: Problem, system: str | None, tokenizer: Tokenizer) -> list[int]:
    before = [] if system is None else [Message("system", system)]
    return render([*before, Message("user", problem.prompt)], tokenizer, generation_prompt=True).ids


def _grade(
    problems: Sequence[Problem], prompts: Sequence[list[int]], groups: Sequence[list[Completion]], grade: Grade
) -> list[dict[str, Any]]:
    """A row per problem."""
    answers = [[gradable(split_thinking(c.text)[1], c.finish_reason) for c in group] for group in groups]
    verdicts = iter(grade([(p, answer) for p, given in zip(problems, answers, strict=True) for answer in given]))
    rows = []
    for problem, prompt, group, given in zip(problems, prompts, groups, answers, strict=True):
        right = [next(verdicts) for _ in given]
        rows.append(
            {
                "problem_id": problem.id,
                "task": problem.task,
                "kind": problem.meta.get("kind", "all"),
                "difficulty": problem.difficulty,
                "prompt": problem.prompt,
                "gold": problem.gold,
                "samples": len(group),
                "correct": sum(right),
                "right": right,
                "cons": cons_at_k(given, right),
                "prompt_tokens": len(prompt),
                "tokens": [len(completion.token_ids) for completion in group],
                "truncated": sum(completion.finish_reason == "length" for completion in group),
                "texts": [completion.text for completion in group],
            }
        )
    return rows
