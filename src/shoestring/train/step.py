"""The one optimiser step of every stage: accumulate, normalise, clip, check, update, balance, count.

The trainer is blind to the algorithm: an objective turns hidden states and target tokens into a sum over tokens
(`losses/`), and this file divides it, once, by the token weight of the whole optimiser batch. So the gradient does
not depend on how the batch was split. To it come DeepSeek-V3's extras where the model has them:

    L = L_main + λ·L_mtp + α·L_balance                      (V3 section 2.2 eq. 25, section 2.1.2 eq. 17)

and, after the update, the auxiliary-loss-free bias of the router (V3 section 2.1.2).
Left out: loss scaling (bf16 needs none), skipping steps on spikes (a spike stops the stage in one sentence).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shoestring.data.batch import BRANCH, PADDING, Batch, total_weight
from shoestring.losses import next_token
from shoestring.losses._tokens import Tokens
from shoestring.nn.moe import update_router_bias
from shoestring.nn.room import Room
from shoestring.optim.base import Optimizer
from shoestring.optim.schedules import lr_at
from shoestring.train.configs import TrainBase

Objective = Callable[[Tensor, Tensor, Tokens], tuple[Tensor, dict[str, Tensor]]]


@dataclass(slots=True)
class TrainState:
    """What a training stage carries from step to step, and saves."""

    model: Any
    optimizers: list[Optimizer]
    step: int = 0  # optimiser updates done
    tokens: int = 0  # trained tokens, padding not counted
    sampled: int = 0  # tokens that rollouts read and wrote (RL)
    flops: float = 0.0  # training FLOPs spent (rollouts and reference of RL included)
    reference: Any = None  # the frozen model of a KL term, saved with the rest
    checked_tokens: int = 0  # what the check before RL spent: on the bill, not in the training budget; in the
    checked_flops: float = 0.0  # manifest, not in checkpoints
    room: Room = field(default_factory=Room)  # memory that every step uses again

    def spent(self) -> dict[str, Any]:
        """Totals of the run so far, as metrics, ledger and bill name them."""
        sampled = self.sampled + self.checked_tokens
        return {
            "tokens": self.tokens + sampled, "sampled_tokens": sampled, "flops": self.flops + self.checked_flops
        }  # fmt: skip


@dataclass(slots=True)
class StepStats:
    """One step, measured. `metrics` are means over the weighted tokens of the step."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    flops: float
    metrics: dict[str, float]


def flat_tokens(batch: Batch) -> tuple[Tokens, Tensor]:
    """The target tokens that carry weight, and their flat indices into B·T: the rest never reaches the head."""
    keep_N = batch.weight_BT.flatten().nonzero().squeeze(1)

    def pick(x_BT: Tensor | None) -> Tensor | None:
        return None if x_BT is None else x_BT.flatten()[keep_N]

    ids_N, weight_N = batch.target_BT.flatten()[keep_N], batch.weight_BT.flatten()[keep_N]
    more = pick(batch.advantage_BT), pick(batch.old_BT), pick(batch.ref_BT)
    return Tokens(ids_N, weight_N, *more, batch.teacher, keep_N), keep_N


def _mtp_sum(mtp_hidden_BTD: Tensor, head_VD: Tensor, batch: Batch, native: bool, room: Room | None) -> Tensor:
    """Σ of -log p over the tokens two ahead (V3 eq. 24, depth 1). The module has T-1 positions."""
    length = mtp_hidden_BTD.shape[1]
    weight_N = batch.weight2_BT[:, :length].flatten()
    keep_N = weight_N.nonzero().squeeze(1)
    tokens = Tokens(batch.target2_BT[:, :length].flatten()[keep_N], weight_N[keep_N], native=native, room=room)
    return next_token.loss(mtp_hidden_BTD.flatten(0, 1)[keep_N], head_VD, tokens)[0]


def accumulate(
    model: Any,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    mtp_lambda: float,
    balance_alpha: float,
    room: Room | None = None,
) -> tuple[float, dict[str, float], Tensor | None]:
    """Gradients of one optimiser batch into `.grad`. Returns (mean loss of the objective, its metrics as means,
    expert load [L, E] summed over the micro-batches or None)."""
    weight, weight2 = total_weight(batches), sum(float(b.weight2_BT.sum()) for b in batches)
    rows = sum(len(batch.tokens_BT) for batch in batches)
    if weight <= 0:
        raise ValueError("no token of this batch carries weight: there is nothing to learn from")
    with_mtp = mtp_lambda > 0 and getattr(model.config, "num_nextn_predict_layers", 0) > 0
    loss_sum, load_LE = 0.0, None
    sums: dict[str, float] = {}
    device = model.embedding.device
    for batch in batches:
        batch = batch if device.type == "cpu" else batch.to(device)
        out = model(
            batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT,
            logits=False, mtp=with_mtp, balance=balance_alpha > 0,
        )  # fmt: skip
        targets, keep_N = flat_tokens(batch)
        targets.native, targets.room, targets.softcap = model.kernels.native, room, model.softcap
        targets.weight_N = targets.weight_N / weight  # not the sum: the head's gradient is then made as it is needed
        head_VD = model.head_weight if out.head_VD is None else out.head_VD
        loss, metrics = objective(out.hidden_BTD.flatten(0, 1)[keep_N], head_VD, targets)
        loss_sum += float(loss.detach())
        if with_mtp and weight2 > 0:
            mtp_mean = _mtp_sum(out.mtp_hidden[0], head_VD, batch, model.kernels.native, room) / weight2
            loss = loss + mtp_lambda * mtp_mean
            metrics["mtp"] = mtp_mean.detach()
        if balance_alpha > 0 and out.balance is not None:
            share = len(batch.tokens_BT) / rows  # a mean over rows, however they are split
            loss = loss + balance_alpha * share * out.balance
            metrics["balance"] = out.balance.detach() * share
        loss.backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        if out.expert_load_LE is not None:
            load_LE = out.expert_load_LE if load_LE is None else load_LE + out.expert_load_LE
    return loss_sum, sums, load_LE


def train_step(
    state: TrainState, batches: Sequence[Batch], objective: Objective, stage: TrainBase, *, progress: float
) -> StepStats:
    """One update of `state` from the micro-batches of one optimiser batch. `progress` in [0, 1] is the share of the
    stage's budget already spent; it drives the schedule. Raises FloatingPointError when the gradient is not finite
    (the state is then untouched, the last checkpoint resumes)."""
    loss, metrics, load_LE = accumulate(
        state.model, batches, objective, mtp_lambda=stage.mtp_lambda, balance_alpha=stage.balance_alpha,
        room=state.room,
    )  # fmt: skip
    trainable = [p for p in state.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
    grad_norm = float(norm)
    if grad_norm + 1e-6 > stage.optim.clip_norm:  # else the factor is 1, and a pass over all gradients for nothing
        nn.utils.clip_grads_with_norm_(trainable, stage.optim.clip_norm, norm)
    if not (math.isfinite(grad_norm) and math.isfinite(loss)):
        raise FloatingPointError(
            f"loss {loss} and gradient norm {grad_norm} at step {state.step}: not finite; lower optim.lr and run again."
        )
    lr = lr_at(state.step, progress=progress, optim=stage.optim)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    if load_LE is not None:
        if stage.bias_gamma > 0:
            update_router_bias(state.model, load_LE, stage.bias_gamma)
        metrics["max_violation"] = max_violation(load_LE)
    tokens = sum(batch.tokens for batch in batches)
    flops = training_flops(state.model, batches, mtp=stage.mtp_lambda > 0)
    state.step, state.tokens, state.flops = state.step + 1, state.tokens + tokens, state.flops + flops
    return StepStats(loss, grad_norm, lr, tokens, flops, metrics)


def together(updates: Sequence[StepStats]) -> StepStats:
    """Several updates as one line of metrics: sums of tokens and FLOPs, the last learning rate, means by tokens."""
    tokens, flops = sum(update.tokens for update in updates), sum(update.flops for update in updates)

    def mean(values: Iterable[float]) -> float:
        return sum(value * (update.tokens / tokens) for value, update in zip(values, updates, strict=True))

    loss, grad_norm = mean(update.loss for update in updates), mean(update.grad_norm for update in updates)
    metrics = {name: mean(update.metrics[name] for update in updates) for name in updates[0].metrics}
    return StepStats(loss, grad_norm, updates[-1].lr, tokens, flops, metrics)


def max_violation(load_LE: Tensor) -> float:
    """MaxVio, the mean over layers of max load / mean load - 1 (arXiv 2408.15664): 0 at perfect balance."""
    load_LE = load_LE.double()
    return float((load_LE.amax(1) / load_LE.mean(1).clamp_min(1e-9) - 1).mean())


def mean_length(batch: Batch) -> float:
    """Mean length of what attends to itself: whole rows of a stream, segments of a packed batch; where samples share a
    stem, the length whose tokens see as many keys in the mean."""
    if batch.segments_BT is None:
        return float(batch.tokens_BT.shape[1])
    if batch.positions_BT is not None and bool((batch.segments_BT >= BRANCH).any()):
        return 2.0 * float(batch.positions_BT[batch.segments_BT != PADDING].double().mean()) + 1.0
    segments = int((batch.segments_BT.amax(1) + 1).sum())
    return batch.tokens / max(1, segments)


def training_flops(model: Any, batches: Sequence[Batch], *, mtp: bool) -> float:
    """Forward and backward FLOPs of the batches (6 a matmul parameter a token, plus causal attention)."""
    shape = model.config.shape()
    return sum(b.tokens * shape.flops_per_token(mean_length(b), causal=True, mtp=mtp) for b in batches)


def scoring_flops(model: Any, lengths: Iterable[int]) -> float:
    """FLOPs of one forward pass over sequences of these lengths."""
    shape = model.config.shape()
    counted = Counter(lengths)
    return float(sum(n * T * shape.flops_per_token(T, causal=True, backward=False) for T, n in counted.items() if T))


def sampling_flops(model: Any, groups: Iterable[tuple[int, Sequence[int]]]) -> float:
    """FLOPs of sampling groups of (prompt length, completion lengths): a prompt is read once for its whole group, and
    every sampled token passes through the model once."""
    prompts: list[int] = []
    wholes: list[int] = []
    shared: list[int] = []  # a prompt again in every whole sequence, where it is not read anew
    for prompt, completions in groups:
        prompts.append(prompt)
        wholes += [prompt + length for length in completions]
        shared += [prompt] * len(completions)
    return scoring_flops(model, prompts) + scoring_flops(model, wholes) - scoring_flops(model, shared)
