"""Stages other than pretraining: context extension, fine-tuning, distillation, reinforcement learning, generation.

Each returns chip-hours as an 80% interval and says what it assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip, Cluster
from shoestring.cost.plan import Plan, plan
from shoestring.cost.residual import Z80, Interval
from shoestring.cost.serving import decode_rate, decode_step, prefill_rate
from shoestring.cost.shape import ModelShape

SFT_MFU = 0.35  # fine-tuning: an estimate
LEARNER_MFU = 0.25  # updates of reinforcement learning, on long and ragged sequences: an estimate
TAIL = 4.0  # the longest answer of an evaluation over the mean one: a guess
RL_WASTE = (2.0, 4.0)  # real over ideal time of published reinforcement learning
EXTENSION = ((32768, 1920, 1000), (131072, 480, 1000))  # sequence length, sequences a step, steps: DeepSeek-V3's


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage's bill."""

    name: str
    hours: Interval
    assumed: tuple[str, ...]


def _spread(shape: ModelShape) -> int:
    """Chips that share the experts of one copy when it is served: a usual number, a guess."""
    return 64 if shape.n_routed else 1


def _around(mid: float, factor: float) -> Interval:
    return Interval(mid / factor, mid, mid * factor)


def context_extension(
    shape: ModelShape, cluster: Cluster, phases: tuple[tuple[int, int, int], ...] = EXTENSION
) -> StageCost:
    """Longer sequences in phases, each on the best context-parallel layout that fits."""
    answers = [_longer(shape, cluster, *phase) for phase in phases]
    hours = [a.gpu_hours for a in answers]
    span = Interval(sum(h.low for h in hours), sum(h.mid for h in hours), sum(h.high for h in hours))
    return StageCost("context extension", span, tuple(f"{a.seq_len} tokens: {a.layout.short()}" for a in answers))


def _longer(shape: ModelShape, cluster: Cluster, length: int, batch: int, steps: int) -> Plan:
    answers = []
    for cp in (1, 2, 4, 8, 16):
        try:
            tokens = float(length * batch * steps)
            answers.append(plan(shape, tokens, cluster, seq_len=length, global_batch=batch, layout={"cp": cp}))
        except UserError:
            continue
    if not answers:
        raise UserError(f"sequences of {length} tokens fit on {cluster.label} in no layout; give more chips.")
    return min(answers, key=lambda a: a.gpu_hours.mid)


def sft(shape: ModelShape, chip: Chip, tokens: float, *, epochs: float = 1.0, seq_len: int = 0) -> StageCost:
    """Supervised fine-tuning, or distillation on text. `seq_len` 0 leaves attention out."""
    flops = shape.flops_per_token(seq_len) if seq_len else 6 * shape.params().active_with_tables
    hours = flops * tokens * epochs / (SFT_MFU * chip.bf16) / 3600
    return StageCost("fine-tuning", _around(hours, 1.45), (f"utilisation {SFT_MFU:.0%}", f"{epochs:g} epochs"))


def logit_distillation(
    student: ModelShape, teacher: ModelShape, chip: Chip, tokens: float, *, epochs: float = 1.0, top_k: int = 64
) -> StageCost:
    """Fine-tuning plus one teacher forward a token; top-k logits are stored once (6 bytes each)."""
    base = sft(student, chip, tokens, epochs=epochs)
    forward = 2 * teacher.params().active * tokens / (SFT_MFU * chip.bf16) / 3600
    note = f"{tokens * top_k * 6 / 1e12:.3g} TB of top-{top_k} logits"
    return StageCost("distillation on logits", _around(base.hours.mid + forward, 1.45), (*base.assumed, note))


def on_policy_distillation(
    student: ModelShape, teacher: ModelShape, chip: Chip, tokens: float, *, context: int = 4096
) -> StageCost:
    """The student writes, the teacher scores every token, the student learns; the teacher generates nothing."""
    write = tokens / decode_rate(student, chip, context, chips=_spread(student)) / 3600
    score = 2 * teacher.params().active * tokens / (SFT_MFU * chip.bf16) / 3600
    learn = sft(student, chip, tokens).hours.mid
    parts = (f"writing {write:.3g} h", f"scoring {score:.3g} h", f"learning {learn:.3g} h")
    return StageCost("on-policy distillation", _around(write + score + learn, 1.8), parts)


def reinforcement(
    shape: ModelShape, chip: Chip, rollouts: float, mean_length: float, *, prompt: int = 200,
    decode: float | None = None, length_factor: float = 1.0,
) -> StageCost:  # fmt: skip
    """GRPO: rollouts, old and reference scores, updates. `length_factor` widens an unknown mean length."""
    decode = decode or decode_rate(shape, chip, int(mean_length / 2 + prompt), chips=_spread(shape))
    generate = mean_length / decode + prompt / prefill_rate(shape, chip, prompt, chips=_spread(shape))
    flops = 10 * shape.params().active + 5 * shape.attention_flops(int(mean_length + prompt))  # 6 + 2 old + 2 reference
    learn = mean_length * flops / (LEARNER_MFU * chip.bf16)
    low, high = RL_WASTE
    waste = sqrt(low * high)
    sd = sqrt((log(high / low) / 2 / Z80) ** 2 + (log(length_factor) / Z80) ** 2)
    assumed = (
        f"mean length {mean_length:g} tokens", f"decode {decode:,.0f} tokens/s a chip",
        f"generation {generate:.1f} s and learning {learn:.1f} s a rollout", f"x{waste:.1f} for tails and idle chips",
    )  # fmt: skip
    mid = rollouts * (generate + learn) * waste / 3600
    return StageCost("reinforcement learning", _around(mid, exp(Z80 * sd)), assumed)


def generation(
    shape: ModelShape, chip: Chip, samples: float, mean_length: float, *, prompt: int = 200, acceptance: float = 1.0,
    decode: float | None = None,
) -> StageCost:  # fmt: skip
    """Asking a teacher on chips of one's own, or evaluating: kept samples over the share that is kept."""
    if not 0 < acceptance <= 1:
        raise UserError(f"acceptance is {acceptance}; it must be above 0 and at most 1.")
    decode = decode or decode_rate(shape, chip, int(mean_length / 2 + prompt), chips=_spread(shape))
    seconds = (
        samples * (mean_length / decode + prompt / prefill_rate(shape, chip, prompt, chips=_spread(shape))) / acceptance
    )
    note = f"{decode:,.0f} tokens/s a chip, {acceptance:.0%} of samples kept"
    return StageCost("generation", _around(seconds / 3600, 2.0), (note,))


def evaluation(
    shape: ModelShape, cluster: Cluster, samples: float, mean_length: float, *, prompt: int = 200
) -> StageCost:
    """Answers to a benchmark (questions times samples each); grading runs on processors and is not counted.

    A benchmark ends: every chip waits for the longest answer, taken as `TAIL` times the mean, written alone.
    """
    alone = generation(shape, cluster.chip, samples, mean_length, prompt=prompt)
    step = decode_step(shape, cluster.chip, 1, int(TAIL * mean_length / 2 + prompt), chips=_spread(shape))
    tail = cluster.n * (TAIL - 1) * mean_length * step.seconds / 3600
    note = f"{tail:.3g} chip-hours of waiting for the longest answers, {TAIL:g} times the mean"
    return StageCost("evaluation", _around(alone.hours.mid + tail, 2.0), (*alone.assumed, note))
