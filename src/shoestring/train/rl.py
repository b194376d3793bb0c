"""Reinforcement learning with verifiable rewards: GRPO.

One step: sample groups -> reward -> drop groups without signal -> advantages -> clipped updates -> new weights to the
sampler. Source: DeepSeekMath (arXiv 2402.03300) section 4.1, R1 (arXiv 2501.12948) section 2.2 (rule rewards only),
DAPO (arXiv 2503.14476) for Clip-Higher, dynamic sampling and the token mean. Left out: asynchronous rollouts,
value models, importance correction (the sampler computes with the trainer's own weights, and the difference of
their logprobs is measured every step).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from shoestring.data.batch import Batch, Example, packed_batches
from shoestring.data.textbook import problems
from shoestring.infer.generator import generator_of
from shoestring.infer.score import score
from shoestring.losses import policy
from shoestring.nn.decoder import Decoder
from shoestring.tasks.grading import Grader, check_golds, own_tasks
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import RlStage
from shoestring.train.context import Context, Outcome, derived_seed, step_generator
from shoestring.train.loop import Budget, finish_training, record
from shoestring.train.preflight import preflight
from shoestring.train.rollouts import (
    Group,
    collect,
    lengths_of,
    measure,
    rollout_example,
    sample_row,
    sampled_tokens,
)
from shoestring.train.state import load_model, save_training, start_or_resume, use_kernels
from shoestring.train.step import StepStats, TrainState, sampling_flops, scoring_flops, together, train_step

LONGEST_ROW = 1280  # for the sake of sharing prompts: masks grow with its square


def run(stage: RlStage, ctx: Context) -> Outcome:
    """Train to the budget, a checkpoint every `checkpoint_every` steps. Samples of first and last steps are kept."""
    state, tokenizer = start_or_resume(ctx, stage, lambda: load_model(ctx, "model"))
    use_kernels(state.model, ctx, stage.compute, tokens=stage.tokens_per_microbatch, seq_len=stage.row_tokens)
    if state.reference is not None:
        state.reference.kernels = state.model.kernels  # as in the run that was not interrupted
    engine = generator_of(state.model, tokenizer, state.room)
    budget = Budget.of(stage, ctx)
    with Grader(tasks=own_tasks(entry.task for entry in stage.mix)) as grade, \
            ctx.progress(budget.total, unit=budget.unit) as bar:  # fmt: skip
        check_golds(grade, islice(problems(stage.mix, derived_seed(stage.seed, 8)), stage.problems_per_step))
        price = functools.partial(sampling_flops, state.model)
        state.checked_tokens, state.checked_flops = preflight(stage, ctx, engine, tokenizer, grade, price)
        while (spent := budget.spent(state)) < 1.0:
            # Problems of update t are those from t·1000 on: a function of the step, whatever was resampled before.
            apart = max(1000, stage.problems_per_step * stage.max_tries)
            source = problems(stage.mix, derived_seed(stage.seed, 4), start=state.step * apart)
            groups, sampled = collect(stage, engine, tokenizer, source, grade, derived_seed(stage.seed, 5, state.step))
            facts = measure(sampled, len(groups))
            ctx.note_sandbox(grade.layer)
            state.sampled += sampled_tokens(sampled)
            state.flops += sampling_flops(state.model, lengths_of(sampled))
            if groups:
                engine.let_go()
                _refresh_reference(stage, state)
                stats = _update(stage, state, groups, tokenizer, spent)
                engine.update_weights(state.model)
                record(ctx, state, stats, **facts)
                _keep_samples(ctx, groups)
            else:
                state.step += 1  # nothing to learn from this step's problems; the next ones are others
                ctx.run.metric(state.step, **state.spent(), **facts)
            tokens = state.spent()["tokens"]
            bar.update(budget.done(state), tokens=tokens, reward=facts["reward"], length=facts["length"])
            if state.step % stage.checkpoint_every == 0:
                save_training(ctx, state, tokenizer)
    return finish_training(ctx, state, tokenizer, metric="reward")


def _update(
    stage: RlStage, state: TrainState, groups: Sequence[Group], tokenizer: Tokenizer, spent: float
) -> StepStats:
    """`minibatches` optimiser updates on the rollouts; returns what they were together (all but the first are
    off-policy). The step counter advances by one whatever `minibatches` is."""
    own = own_tokens(stage, state.model)
    examples = [rollout_example(rollout, own=own) for group in groups for rollout in group]
    if state.reference is not None:
        _fill_reference(examples, state.reference, stage)
        state.flops += scoring_flops(state.reference, (len(example.ids) for example in examples))
    objective = functools.partial(
        policy.loss, clip_low=stage.clip_low, clip_high=stage.clip_high, kl_beta=stage.kl_beta,
        temperature=stage.decoding.temperature,
    )  # fmt: skip
    order = torch.randperm(len(examples), generator=step_generator(stage.seed, 6, state.step)).tolist()
    step, share = state.step, -(-len(examples) // stage.minibatches)
    updates: list[StepStats] = []
    for start in range(0, len(examples), share):
        chosen = [examples[i] for i in sorted(order[start : start + share])]
        batches: list[Batch] = packed_batches(chosen, row_tokens=row_tokens(stage, state.model, groups),
                                              tokens_per_microbatch=stage.tokens_per_microbatch,
                                              pad_id=tokenizer.pad)  # fmt: skip
        state.step = step
        updates.append(train_step(state, batches, objective, stage, progress=spent))
    stats = together(updates)
    # only the first update is on-policy: its ratio error is the difference between sampler and trainer
    stats.metrics["ratio_error"] = updates[0].metrics["ratio_error"]
    return stats


def own_tokens(stage: RlStage, model: Any) -> int | None:
    """How many of a prompt's last tokens each of its samples has to itself in an update (see rollout_example)."""
    if not isinstance(model, Decoder):
        return None  # the masks of `transformers` know no branches
    return 2 if stage.mtp_lambda > 0 else 1


def row_tokens(stage: RlStage, model: Any, groups: Sequence[Group]) -> int:
    """Rows for the largest group, so that its prompt is read once: where the keys that a mask hides cost nothing."""
    if not isinstance(model, Decoder) or model.kernels.attention != "native":
        return stage.row_tokens
    whole = max(len(group[0].prompt_ids) + sum(len(r.completion.token_ids) + 2 for r in group) for group in groups)
    return max(stage.row_tokens, min(-(-whole // 16) * 16, LONGEST_ROW))


def _refresh_reference(stage: RlStage, state: TrainState) -> None:
    """The frozen model that the KL pulls to: the policy at the start, and again every `reference_every` steps."""
    if stage.kl_beta > 0 and (state.reference is None or state.step % stage.reference_every == 0):
        state.reference = copy.deepcopy(state.model).requires_grad_(False)


def _fill_reference(examples: Sequence[Example], reference: Any, stage: RlStage) -> None:
    scores = score(reference, [e.ids for e in examples], temperature=stage.decoding.temperature)
    for example, logprobs in zip(examples, scores, strict=True):
        example.ref = [0.0, *logprobs]


def _keep_samples(ctx: Context, groups: Sequence[Group]) -> None:
    """The newest step's rollouts and, once, those of the first step that learned: what the report shows."""
    rows = [sample_row(rollout) for group in groups[:8] for rollout in group[:4]]
    if not (ctx.run.path / "samples" / "first.jsonl").exists():
        ctx.run.save_samples("first", rows)
    ctx.run.save_samples("last", rows)
