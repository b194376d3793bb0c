"""A student made of its teacher: pruned to size, then distilled from the unpruned model's logits.

The most important layers, hidden channels, neurons, experts and heads by their activations on the traces, and then
forward KL to the whole model on the same traces (Minitron, arXiv 2407.14679). 0 keeps all of a kind.

    shoestring run distill-pruned --set teacher=runs/rl-mine-0123 --set traces=runs/ask-mine-0123 --set layers=2
    shoestring run distill-pruned --set teacher=some/folder --set traces=traces/kept.jsonl --set ffn=64 --dry-run
"""

from __future__ import annotations

from shoestring.core.errors import UserError
from shoestring.train.configs import DistillStage, Optim, PruneStage, Recipe

RATE = 1e-3  # as for the quickstart's student; lower it for a model of billions


def recipe(
    teacher: str = "", traces: str = "", layers: int = 0, hidden: int = 0, ffn: int = 0, experts: int = 0,
    heads: int = 0, steps: int = 200, row_tokens: int = 256,
) -> Recipe:  # fmt: skip
    """Two stages: `prune` and `distill`. The last is the student."""
    if not teacher or not traces:
        raise UserError("distill-pruned needs a teacher and traces: --set teacher=MODEL --set traces=RUN.")
    small = PruneStage(
        name="pruned", inputs={"model": teacher, "traces": traces}, layers=layers or None, hidden=hidden or None,
        ffn=ffn or None, experts=experts or None, heads=heads or None, row_tokens=row_tokens,
    )  # fmt: skip
    student = DistillStage(
        name="student", inputs={"model": "pruned", "teacher": teacher, "traces": traces}, way="forward_kl", steps=steps,
        row_tokens=row_tokens, optim=Optim(lr=RATE, weight_decay=0.0, warmup_steps=min(20, steps // 10)),
    )  # fmt: skip
    return Recipe(name="distill-pruned", about=(__doc__ or "").split("\n")[0], stages=(small, student))
