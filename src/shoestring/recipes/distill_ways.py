"""Three ways of distillation one after another: a teacher's answers, its logits on them, then the student's own text.

Text teaches most for little, logits say more of every token of it, and on-policy mends what the student does by itself
(GKD, arXiv 2306.13649; Qwen3, arXiv 2505.09388, section 4.5, goes from off-policy to on-policy too). 0 steps leave a
way out. Left out: evaluation between them (`shoestring eval`), and teachers that only answer (text alone).

    shoestring run distill-ways --set student=a/b --set teacher=runs/rl-mine-0123 --set traces=runs/ask-mine-0123
    shoestring run distill-ways --set student=a/b --set teacher=c/d --set traces=traces.jsonl --set text=0 --dry-run
"""

from __future__ import annotations

from typing import Any

from shoestring.core.errors import UserError
from shoestring.train.configs import Decoding, DistillStage, Optim, Recipe

RATES = {"text": 1e-3, "logits": 1e-3, "on-policy": 5e-4}  # as for the quickstart's student; lower them for billions


def recipe(
    student: str = "", teacher: str = "", traces: str = "", text: int = 200, logits: int = 100, on_policy: int = 50,
    divergence: str = "reverse_kl", row_tokens: int = 256, max_new_tokens: int = 96,
) -> Recipe:  # fmt: skip
    """Up to three stages, each from the student of the one before. `text`, `logits`, `on_policy`: their steps."""
    if not student or not teacher or not traces:
        raise UserError("distill-ways needs a student, a teacher and traces: --set student=MODEL --set teacher=MODEL "
                        "--set traces=RUN.")  # fmt: skip
    own: dict[str, tuple[int, str, dict[str, Any]]] = {
        "text": (text, "text", {}),
        "logits": (logits, divergence, {}),
        "on-policy": (on_policy, "on_policy", {"decoding": Decoding(max_new_tokens=max_new_tokens)}),
    }
    stages: list[DistillStage] = []
    for name, (steps, way, more) in own.items():
        if not steps:
            continue
        inputs = {"model": stages[-1].name if stages else student, "traces": traces}
        stages.append(DistillStage(
            name=name, inputs=inputs | ({} if way == "text" else {"teacher": teacher}), way=way, steps=steps,
            row_tokens=row_tokens, optim=Optim(lr=RATES[name], weight_decay=0.0, warmup_steps=min(20, steps // 10)),
            **more,
        ))  # fmt: skip
    if not stages:
        raise UserError("distill-ways: text, logits and on_policy are all 0 steps; give one of them some.")
    return Recipe(name="distill-ways", about=(__doc__ or "").split("\n")[0], stages=tuple(stages))
