"""Evaluation: pass@1, pass@k, cons@k with standard errors on unseen problems, for each entry of the mix.

Problems come from the test split: no training problem is among them, whatever the seeds. The same seed asks every
model the same problems, so two evaluations can be compared in pairs.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from shoestring.core.atomic import write_json
from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem
from shoestring.data.textbook import problems
from shoestring.evals.runner import evaluate
from shoestring.infer.engine import Engine
from shoestring.tasks.grading import Grader
from shoestring.train.configs import EvalStage
from shoestring.train.context import Context, Outcome, derived_seed
from shoestring.train.state import load_model, use_kernels
from shoestring.train.step import forward_flops


def test_problems(stage: EvalStage) -> list[Problem]:
    """`stage.problems` distinct test problems of every entry of the mix. Raises UserError when there are fewer."""
    chosen: list[Problem] = []
    for entry in stage.mix:
        seen: dict[str, Problem] = {}
        for problem in islice(problems([entry], stage.seed, split="test"), 50 * stage.problems):
            seen.setdefault(problem.id, problem)
            if len(seen) == stage.problems:
                break
        else:
            raise UserError(
                f"{entry.task} {'/'.join(entry.kinds)} at difficulty {entry.difficulty} has only about {len(seen)} "
                f"test problems, not {stage.problems}; ask fewer or raise the difficulty."
            )
        chosen += seen.values()
    return chosen


def run(stage: EvalStage, ctx: Context) -> Outcome:
    """Evaluate input "model"; the headline number is pass@1 over all problems."""
    model, tokenizer = load_model(ctx, "model")
    use_kernels(model, ctx, stage.compute, tokens=stage.rows_per_batch * 64, seq_len=64)
    engine = Engine(model, tokenizer)
    asked = test_problems(stage)
    sampling = stage.decoding.sampling(n=stage.samples, seed=derived_seed(stage.seed, 5), stop_ids=(tokenizer.end,))
    with Grader() as grade, ctx.progress(len(asked), unit="problems") as bar:
        result = evaluate(
            engine, tokenizer, asked, sampling, grade, batch=max(1, stage.rows_per_batch // stage.samples),
            on_batch=lambda done, tokens: bar.update(done, tokens=tokens),
        )  # fmt: skip
        ctx.run.note(sandbox=grade.layer)
    path = ctx.run.path / "result.json"
    write_json(path, result.to_dict())
    ctx.run.save_samples("answers", result.rows)
    overall = result.overall
    ctx.run.metric(0, **{k: v for k, v in overall.items() if isinstance(v, int | float)})
    flops = forward_flops(model, result.tokens, float(overall["mean_tokens"] or 0.0))
    metric: dict[str, Any] = {"name": "pass@1", "value": overall["pass@1"], "stderr": overall["pass@1_stderr"]}
    return Outcome([path], metric, result.tokens, flops)
