"""Asking many problems in batches and keeping verified traces: shared by `reject` and `ask`.

No problem is asked twice in a stage, so what curation does within a batch (repeats, so many a problem) holds over the
stage. Each batch is appended to traces.db when it is done, and then a line of metrics with the totals so far: after
a crash the batches that are there are not asked again, and the ledger knows what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoestring.core.contracts import Question, Teacher
from shoestring.core.nouns import Problem, Trace
from shoestring.core.registry import load_part
from shoestring.curate._sieve import keep as keep_by
from shoestring.data.textbook import conversation, distinct_problems
from shoestring.data.traces import TraceStore
from shoestring.tasks.grading import Grader, check_golds, gradable, own_tasks
from shoestring.train.configs import AskStage, RejectStage
from shoestring.train.context import Context, Outcome, derived_seed

Keep = Callable[[Sequence[Trace]], list[Trace]]
Groups = list[tuple[int, list[int]]]  # (prompt length, completion lengths) of each problem asked
COUNTS = ("problems", "answers", "correct", "kept", "tokens", "sampled_tokens", "flops")


def ask_all(
    stage: AskStage | RejectStage, ctx: Context, teacher: Teacher, keep: Keep, flops_of: Callable[[Groups], float]
) -> Outcome:
    """Ask `stage.problems` distinct problems; traces.db, what is kept of the answers, is the output.

    `flops_of` prices the sampling. Raises UserError when the mix has fewer problems.
    """
    store = TraceStore(ctx.run.path)
    asked = distinct_problems(stage.mix, derived_seed(stage.seed, 4), stage.problems)
    rows = ctx.run.metrics()
    totals = {name: rows[-1][name] if rows else 0 for name in COUNTS}
    with Grader(tasks=own_tasks(entry.task for entry in stage.mix)) as grade, \
            ctx.progress(len(asked), unit="problems") as bar:  # fmt: skip
        check_golds(grade, asked[totals["problems"] :])
        for start in range(totals["problems"], len(asked), stage.problems_per_batch):
            batch = asked[start : start + stage.problems_per_batch]
            spent = _ask_batch(stage, batch, start, teacher, keep, grade, store, flops_of)
            totals = {name: totals[name] + spent[name] for name in COUNTS}
            ctx.run.metric(totals["problems"], **totals)
            ctx.note_sandbox(grade.layer)
            bar.update(totals["problems"], tokens=totals["tokens"], kept=totals["kept"])
    metric = {"name": "kept share of answers", "value": totals["kept"] / max(1, totals["answers"]), "stderr": None}
    tokens, flops = totals["tokens"], totals["flops"]
    return Outcome([store.path], metric, tokens, flops, train_flops=flops, sampled_tokens=tokens)


def _ask_batch(
    stage: AskStage | RejectStage,
    batch: Sequence[Problem],
    start: int,
    teacher: Teacher,
    keep: Keep,
    grade: Grader,
    store: TraceStore,
    flops_of: Callable[[Groups], float],
) -> dict[str, float]:
    """What this batch adds to the totals. A prompt is read once for all its samples."""
    by_id = {problem.id: problem for problem in batch}
    sampling = stage.decoding.sampling(n=stage.samples, seed=derived_seed(stage.seed, 5, start), stop_ids=())
    questions = [Question(tuple(conversation(p)), p, p.id) for p in batch]
    traces = sorted(teacher.answer(questions, sampling), key=lambda t: t.id)
    verdicts = grade([(by_id[t.problem_id or ""], gradable(t.answer, t.finish_reason)) for t in traces])
    groups: dict[str | None, tuple[int, list[int]]] = {}
    for trace, verdict in zip(traces, verdicts, strict=True):
        trace.correct = verdict
        lengths = groups.setdefault(trace.problem_id, (trace.usage["prompt_tokens"], []))[1]
        lengths.append(trace.usage["completion_tokens"])
    kept = keep(traces)
    store.append(kept)
    tokens = sum(prompt + sum(lengths) for prompt, lengths in groups.values())
    return {
        "problems": len(batch), "answers": len(traces), "correct": sum(verdicts), "kept": len(kept),
        "tokens": tokens, "sampled_tokens": tokens, "flops": flops_of(list(groups.values())),
    }  # fmt: skip


def curation(filters: Sequence[str]) -> Keep:
    """The filters of `curate/` by name, one after the other."""
    parts = [load_part("curate", name) for name in filters]

    def keep(traces: Sequence[Trace]) -> list[Trace]:
        kept = list(traces)
        for part in parts:
            kept = keep_by(part, kept)
        return kept

    return keep
