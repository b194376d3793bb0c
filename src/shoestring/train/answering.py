"""Asking many problems in batches and keeping verified traces: shared by `reject` and `ask`.

Each batch of problems is appended to traces.jsonl when it is done; after a crash the batches that are there are not
asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from shoestring.core.contracts import Question, Teacher
from shoestring.core.nouns import Problem, Trace
from shoestring.core.registry import load_part
from shoestring.data.textbook import conversation, problems
from shoestring.data.traces import TraceStore
from shoestring.tasks.grading import Grader
from shoestring.train.configs import AskStage, RejectStage
from shoestring.train.context import Context, derived_seed

Keep = Callable[[Sequence[Trace]], list[Trace]]


def ask_all(
    stage: AskStage | RejectStage, ctx: Context, teacher: Teacher, keep: Keep
) -> tuple[TraceStore, dict[str, int]]:
    """Ask `stage.problems` problems; returns the store of kept traces and counts (problems, answers, correct, ...)."""
    store = TraceStore(ctx.run.path / "traces.jsonl")
    asked = list(islice(problems(stage.mix, derived_seed(stage.seed, 4)), stage.problems))
    counts = {"problems": 0, "answers": 0, "correct": 0, "kept": 0, "tokens": 0, "prompt_tokens": 0}
    done = {row["step"]: row for row in ctx.run.metrics()}
    with Grader() as grade, ctx.progress(len(asked), unit="problems") as bar:
        for start in range(0, len(asked), stage.problems_per_batch):
            batch = asked[start : start + stage.problems_per_batch]
            row = done.get(start)
            if row is None:
                row = _ask_batch(stage, batch, start, teacher, keep, grade, store)
                ctx.run.metric(start, **row)
            for name in counts:
                counts[name] += int(row[name])
            bar.update(start + len(batch), tokens=counts["tokens"], kept=counts["kept"])
        ctx.run.note(sandbox=grade.layer)
    return store, counts


def _ask_batch(
    stage: AskStage | RejectStage, batch: Sequence[Problem], start: int, teacher: Teacher, keep: Keep, grade: Grader,
    store: TraceStore,
) -> dict[str, int]:
    by_id = {problem.id: problem for problem in batch}
    sampling = stage.decoding.sampling(n=stage.samples, seed=derived_seed(stage.seed, 5, start), stop_ids=())
    questions = [Question(tuple(conversation(p)), p, p.id) for p in by_id.values()]
    traces = sorted(teacher.answer(questions, sampling), key=lambda t: t.id)
    verdicts = grade([(by_id[t.problem_id or ""], t.answer) for t in traces])
    for trace, verdict in zip(traces, verdicts, strict=True):
        trace.correct = verdict
    kept = keep(traces)
    store.append(kept)
    return {
        "problems": len(batch), "answers": len(traces), "correct": sum(verdicts), "kept": len(kept),
        "tokens": sum(t.usage["completion_tokens"] for t in traces),
        "prompt_tokens": sum(t.usage["prompt_tokens"] for t in traces),
    }  # fmt: skip


def curation(filters: Sequence[str]) -> Keep:
    """The filters of `curate/` by name, one after the other."""
    parts = [load_part("curate", name) for name in filters]

    def keep(traces: Sequence[Trace]) -> list[Trace]:
        kept = list(traces)
        for part in parts:
            kept = part.keep(kept)
        return kept

    return keep
