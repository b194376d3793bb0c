"""R1's distillation: SFT on a reasoning teacher's traces with the hyperparameters of its six students, one command.

Source: R1 (arXiv 2501.12948 v2) supplement B.4.3: 2-3 epochs on 800k samples, batch 64, context 32,768, cosine to a
tenth of the learning rate, which depends on the student: 1e-4 at 1.5B down to 2e-5 at 70B.

    shoestring run distill-r1 --set student=Qwen/Qwen2.5-Math-1.5B --set traces=runs/ask-mine-0123
    shoestring run distill-r1 --set student=some/folder --set traces=some/traces.jsonl --set samples=2000 --dry-run
"""

from __future__ import annotations

from shoestring.core.errors import UserError
from shoestring.train.configs import Compute, DistillStage, Optim, Recipe

# parameters of the student up to which the learning rate holds
RATES = ((3e9, 1e-4), (7.8e9, 8e-5), (9e9, 5e-5), (20e9, 7e-5), (50e9, 6e-5), (float("inf"), 2e-5))
BATCH, CONTEXT = 64, 32_768


def rate(parameters: float) -> float:
    """R1's learning rate for a student of this size: its Qwen students but for the 8B and 70B, which are Llamas."""
    return next(lr for limit, lr in RATES if parameters <= limit)


def recipe(
    student: str = "", traces: str = "", samples: int = 800_000, epochs: int = 2, billions: int = 1,
    row_tokens: int = CONTEXT,
) -> Recipe:  # fmt: skip
    """One stage. `samples`: how many traces there are, to count the steps; `billions`: the student's size."""
    if not student or not traces:
        raise UserError("distill-r1 needs a student and traces: --set student=MODEL --set traces=RUN.")
    steps = max(1, round(samples * epochs / BATCH))
    optim = Optim(
        lr=rate(billions * 1e9), schedule="cosine", final_ratio=0.1, warmup_steps=min(20, steps // 10), weight_decay=0.0
    )
    stage = DistillStage(
        name="student", inputs={"model": student, "traces": traces}, way="text", steps=steps, examples_per_step=BATCH,
        row_tokens=row_tokens, tokens_per_microbatch=row_tokens, optim=optim, compute=Compute(dtype="bfloat16"),
    )  # fmt: skip
    return Recipe(name="distill-r1", about=(__doc__ or "").split("\n")[0], stages=(stage,))
