"""What the visible loops share besides the step: how much budget is left, a line of metrics, the last checkpoint."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from shoestring.core.errors import UserError
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import TrainBase
from shoestring.train.context import Context, Outcome
from shoestring.train.state import save_training
from shoestring.train.step import StepStats, TrainState


@dataclass(slots=True, frozen=True)
class Budget:
    """Steps, or the training FLOPs of other stages (a control at equal compute)."""

    total: float
    unit: Literal["steps", "FLOPs"]

    @classmethod
    def of(cls, stage: TrainBase, ctx: Context) -> Budget:
        if stage.steps is not None:
            return cls(stage.steps, "steps")
        given, spent = ctx.budget_flops(stage.match_flops), ctx.budget_flops(stage.spent_flops)
        total = given - spent
        if given <= 0:
            raise UserError(f"{ctx.run.name}: the inputs named by match_flops trained nothing, so there is no budget.")
        if total <= 0:
            raise UserError(
                f"{ctx.run.name}: the inputs named by spent_flops took {spent:.3g} of {given:.3g} FLOPs, so nothing is "
                "left to train with; sample less."
            )
        return cls(total, "FLOPs")

    def done(self, state: TrainState) -> float:
        return state.step if self.unit == "steps" else state.flops

    def spent(self, state: TrainState) -> float:
        """The share of the budget that is spent; 1 or more: stop."""
        return self.done(state) / self.total


def record(ctx: Context, state: TrainState, stats: StepStats, **more: float) -> None:
    """One line of metrics.jsonl for the update just made."""
    ctx.run.metric(
        state.step, loss=stats.loss, grad_norm=stats.grad_norm, lr=stats.lr, **state.spent(), **stats.metrics, **more
    )  # fmt: skip


def finish_training(ctx: Context, state: TrainState, tokenizer: Tokenizer, *, metric: str = "loss") -> Outcome:
    """Make sure the last step is on disk; the headline number is the mean of `metric` over the last 20 steps."""
    latest = ctx.run.latest_checkpoint()
    path = latest[1] if latest and latest[0] == state.step else save_training(ctx, state, tokenizer)
    last = [float(row[metric]) for row in ctx.run.metrics() if metric in row][-20:]
    headline = {
        "name": f"{metric}, mean of the last {len(last)} steps",
        "value": statistics.fmean(last),
        "stderr": statistics.stdev(last) / len(last) ** 0.5 if len(last) > 1 else None,
    }
    return Outcome([path], headline, **state.spent(), train_flops=state.flops)
