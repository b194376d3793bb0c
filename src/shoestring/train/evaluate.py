"""Evaluation: pass@1, pass@k, cons@k with standard errors on unseen problems, for each entry of the mix.

Problems come from the test split: no training problem is among them, whatever the seeds. The same seed asks every
model the same problems, so two evaluations can be compared in pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoestring.core.atomic import append_line, read_lines, write_json
from shoestring.core.nouns import Problem
from shoestring.data.textbook import distinct_problems
from shoestring.evals.runner import evaluate, summarise, tokens_of
from shoestring.infer.generator import generator_of
from shoestring.tasks.grading import Grader, check_golds, own_tasks
from shoestring.train.configs import EvalStage
from shoestring.train.context import Context, Outcome, derived_seed
from shoestring.train.state import load_model, use_kernels
from shoestring.train.step import sampling_flops

ANSWERS = "answers.jsonl"  # in samples/: a row a problem, with every text


def test_problems(stage: EvalStage) -> list[Problem]:
    """`stage.problems` distinct test problems of every entry of the mix. Raises UserError when there are fewer."""
    return [p for entry in stage.mix for p in distinct_problems([entry], stage.seed, stage.problems, split="test")]


def run(stage: EvalStage, ctx: Context) -> Outcome:
    """Evaluate input "model"; the headline number is pass@1 over all problems. Each batch's cost is on disk, and
    its answers, before the next is asked."""
    model, tokenizer = load_model(ctx, "model")
    use_kernels(model, ctx, stage.compute, tokens=stage.rows_per_batch * 64, seq_len=64)
    asked, batch = test_problems(stage), max(1, stage.rows_per_batch // stage.samples)
    rows = _answered(ctx, batch, len(asked))
    ctx.run.rewind_metrics(len(rows))
    done = list(rows)
    sampling = stage.decoding.sampling(n=stage.samples, seed=derived_seed(stage.seed, 5), stop_ids=(tokenizer.end,))
    with Grader(tasks=own_tasks(entry.task for entry in stage.mix)) as grade, \
            ctx.progress(len(asked), unit="problems") as bar:  # fmt: skip

        def keep(made: list[dict[str, Any]]) -> None:
            rows.extend(made)
            lines = [json.dumps(row, ensure_ascii=False) for row in made]
            # The cost first: killed between the two, the next attempt drops this row and answers the batch again.
            ctx.run.metric(len(rows), **_spent(model, rows), **{"pass@1": summarise(rows)["pass@1"] or 0.0})
            append_line(ctx.run.path / "samples" / ANSWERS, "\n".join(lines))
            ctx.note_sandbox(grade.layer)
            bar.update(len(rows), tokens=tokens_of(rows))

        check_golds(grade, asked[len(done) :])
        result = evaluate(
            generator_of(model, tokenizer), tokenizer, asked, sampling, grade, batch=batch, done=done, on_batch=keep
        )
    path = write_json(ctx.run.path / "result.json", result.to_dict())
    overall = result.overall
    metric = {"name": "pass@1", "value": overall["pass@1"], "stderr": overall["pass@1_stderr"]}
    return Outcome([path], metric, **_spent(model, result.rows))


def _answered(ctx: Context, batch: int, total: int) -> list[dict[str, Any]]:
    """The rows of whole batches that an earlier attempt left; what a kill cut short is dropped from the file."""
    found = read_lines(ctx.run.path / "samples" / ANSWERS)
    rows = found if len(found) == total else found[: len(found) // batch * batch]
    if len(rows) < len(found):
        ctx.run.save_samples(Path(ANSWERS).stem, rows)
    return rows


def _spent(model: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens = tokens_of(rows)
    flops = sampling_flops(model, ((row["prompt_tokens"], row["tokens"]) for row in rows))
    return {"tokens": tokens, "sampled_tokens": tokens, "flops": flops}
