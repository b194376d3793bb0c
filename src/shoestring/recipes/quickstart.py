"""The whole road in miniature: a V3-style teacher learns to reason by RL, a small dense student learns from it.

Two findings of R1 (arXiv 2501.12948) at the size of a laptop: reinforcement learning on verifiable answers makes a
model think longer and be right more often, and a student learns more from the teacher's answers than from RL of its
own. Three families of problems whose answer cannot be said at once by a model of this size but can be worked out in
steps; the textbook tells most solutions without the steps.

    shoestring run quickstart                     # about 8 minutes on two cores
    shoestring run quickstart --set size=smoke    # the same road in under two minutes, no claims
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoestring.core.errors import UserError, did_you_mean
from shoestring.train.configs import (
    AskStage,
    Compute,
    Decoding,
    DistillStage,
    EvalStage,
    ModelSpec,
    Optim,
    PretrainStage,
    Recipe,
    RlStage,
    SftStage,
    Stage,
    TaskMix,
    Textbook,
    TokenizerStage,
)

NOTE = (
    "The textbook is a construction: it tells {share:.0%} of its solutions step by step and the rest as a bare answer, "
    "and its problems are chosen so that the bare answer is out of reach for models of this size. RL therefore has a "
    "rare skill to amplify; nothing here says how often that is so elsewhere. RL and distillation practise at the "
    "exam's difficulty, their controls read the textbook's mixture."
)


@dataclass(frozen=True)
class Size:
    """The numbers that `size` changes, all of them budgets."""

    pretrain_steps: int
    student_steps: int
    sft_steps: int
    rl_steps: int
    ask_problems: int
    distill_steps: int
    eval_problems: int
    eval_samples: int
    corpus_tokens: int
    tokens_per_step: int = 4096
    problems_per_step: int = 32
    group_size: int = 8
    preflight_problems: int = 64
    curate: tuple[str, ...] = ("correct", "dedup")
    rewards: tuple[str, ...] = ("correct", "format")
    rl_tokens: int = 72
    minimum_mixed: float = 0.05
    reject_problems: int = 3000  # of the study's arm; its sampling comes off its budget
    checkpoint_every: int = 20  # the shortest stage has 60 steps


SIZES = {
    "full": Size(900, 900, 60, 80, 3000, 1000, 300, 4, 3_000_000),
    "smoke": Size(
        12, 12, 4, 3, 24, 4, 8, 2, 40_000, tokens_per_step=1024, problems_per_step=4, group_size=4,
        preflight_problems=4, minimum_mixed=0.0, reject_problems=4, checkpoint_every=2, curate=("empty", "dedup"),
        rewards=("length",), rl_tokens=112,
    ),
}  # fmt: skip
LONG_SHARE = 0.3
# The last only to give an untrained model a signal: some of its answers go on beyond the 96 tokens that are free.
REWARDS = {"correct": 1.0, "format": 0.1, "length": 1.0}

# Learnt on every length up to the hardest, examined on the hardest.
LEARN = (
    TaskMix(task="questions", kinds=("sum",), difficulty=(1, 6)),
    TaskMix(task="logic", kinds=("order",), difficulty=(1, 6)),
    TaskMix(task="programs", kinds=("describe",), difficulty=(1, 5)),
)
EXAM = (
    TaskMix(task="questions", kinds=("sum",), difficulty=(5, 6)),
    TaskMix(task="logic", kinds=("order",), difficulty=(5, 6)),
    TaskMix(task="programs", kinds=("describe",), difficulty=(4, 5)),
)

# DeepSeek-V3 in small: MLA, one dense layer then 8 routed + 1 shared experts, top-2, one MTP module, tied tables.
TEACHER = ModelSpec(
    family="deepseek",
    config={
        "hidden_size": 96, "intermediate_size": 192, "moe_intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24,
        "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 512, "initializer_range": 0.06,
        "tie_word_embeddings": True,
    },
)  # fmt: skip
# Qwen2's architecture with less than a quarter of the teacher's active parameters.
STUDENT = ModelSpec(
    family="dense",
    config={
        "model_type": "qwen2", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.08,
        "tie_word_embeddings": True,
    },
)  # fmt: skip

DECODING = Decoding(temperature=1.0, max_new_tokens=72)
DISTILL_OPTIM = Optim(kind="muon", lr=3e-3)
COMPUTE = Compute(dtype="float32", experts="grouped")


def recipe(size: str = "full", seed: int = 0) -> Recipe:
    """The road at a `size` ("full" or "smoke") for a seed."""
    if size not in SIZES:
        raise UserError(f'quickstart has no size "{size}".{did_you_mean(size, SIZES)}')
    stages: list[Stage] = [tokenizer(), *teacher(SIZES[size], seed), *student(SIZES[size], seed)]
    stages += [exam(stage.name, SIZES[size]) for stage in stages if stage.name in EXAMINED]
    return Recipe(
        name="quickstart" if size == "full" else f"quickstart-{size}",
        about=(__doc__ or "").split("\n")[0], stages=tuple(stages),
        report=report([seed], [""], size=size),
    )  # fmt: skip


def tokenizer() -> TokenizerStage:
    """The same for every seed, so that models of different seeds can be compared token by token."""
    return TokenizerStage(name="tokenizer", corpus=Textbook(mix=LEARN, long_share=0.5), vocab_size=400, documents=3000)


def teacher(size: Size, seed: int, suffix: str = "") -> list[Stage]:
    """Pretrain, SFT, RL; and the control: more SFT for the training FLOPs that RL took."""
    book = Textbook(mix=LEARN, long_share=LONG_SHARE)
    common: dict[str, Any] = {"seed": seed, "compute": COMPUTE, "checkpoint_every": size.checkpoint_every}
    sft: dict[str, Any] = {"textbook": book, "problems": 2000, "row_tokens": 192, "mtp_lambda": 0.1, **common}
    return [
        PretrainStage(
            name=f"teacher-pretrain{suffix}", inputs={"tokenizer": "tokenizer"}, model=TEACHER, corpus=book,
            corpus_seed=seed, corpus_tokens=size.corpus_tokens, steps=size.pretrain_steps, row_tokens=128, isolate=True,
            tokens_per_step=size.tokens_per_step, mtp_lambda=0.3, optim=Optim(kind="muon", lr=1e-2, decay_share=0.3),
            **common,
        ),
        SftStage(
            name=f"teacher-sft{suffix}", inputs={"model": f"teacher-pretrain{suffix}"}, steps=size.sft_steps,
            optim=Optim(lr=1e-3), **sft,
        ),
        RlStage(
            name=f"teacher-rl{suffix}", inputs={"model": f"teacher-sft{suffix}"}, steps=size.rl_steps,
            **rl_options(size), **common,
        ),
        SftStage(
            name=f"teacher-more-sft{suffix}",
            inputs={"model": f"teacher-sft{suffix}", "budget": f"teacher-rl{suffix}"}, match_flops=("budget",),
            headline=False, optim=Optim(lr=1e-3), **sft,
        ),
    ]  # fmt: skip


def student(size: Size, seed: int, suffix: str = "") -> list[Stage]:
    """Pretrain, ask the teacher, distil; and the controls at distillation's training FLOPs: more textbook, RL only."""
    book = Textbook(mix=LEARN, long_share=LONG_SHARE)
    common: dict[str, Any] = {"seed": seed, "compute": COMPUTE, "checkpoint_every": size.checkpoint_every}
    reading: dict[str, Any] = {
        "corpus": book, "corpus_tokens": size.corpus_tokens, "row_tokens": 128, "isolate": True,
        "tokens_per_step": size.tokens_per_step, **common,
    }  # fmt: skip
    base, distilled = f"student-base{suffix}", f"student-distilled{suffix}"
    return [
        PretrainStage(
            name=f"student-pretrain{suffix}", inputs={"tokenizer": "tokenizer"}, model=STUDENT, corpus_seed=seed + 1000,
            steps=size.student_steps, optim=Optim(kind="muon", lr=1e-2, decay_share=0.3), **reading,
        ),
        SftStage(
            name=base, inputs={"model": f"student-pretrain{suffix}"}, steps=size.sft_steps, textbook=book,
            problems=2000, row_tokens=192, optim=Optim(lr=1e-3), **common,
        ),
        AskStage(
            name=f"ask{suffix}", inputs={"teacher": f"teacher-rl{suffix}"}, mix=EXAM, problems=size.ask_problems,
            decoding=DECODING, curate=size.curate, seed=seed, compute=COMPUTE,
        ),
        DistillStage(
            name=distilled, inputs={"model": base, "traces": f"ask{suffix}"}, steps=size.distill_steps, row_tokens=224,
            examples_per_step=16, optim=DISTILL_OPTIM, **common,  # small updates; the controls do better with 64
        ),
        SftStage(
            name=f"student-more-textbook{suffix}", inputs={"model": base, "budget": distilled}, match_flops=("budget",),
            textbook=book, problems=size.ask_problems, row_tokens=224, headline=False, optim=DISTILL_OPTIM, **common,
        ),
        RlStage(
            name=f"student-rl{suffix}", inputs={"model": base, "budget": distilled}, match_flops=("budget",),
            headline=False, **rl_options(size), **common,
        ),
    ]  # fmt: skip


def rl_options(size: Size) -> dict[str, Any]:
    """GRPO on exam-like training problems; the same for teacher and student."""
    return {
        "mix": EXAM, "rewards": {name: REWARDS[name] for name in size.rewards},
        "problems_per_step": size.problems_per_step, "group_size": size.group_size,
        "decoding": Decoding(temperature=1.0, max_new_tokens=size.rl_tokens), "row_tokens": 224, "max_tries": 1,
        "preflight_problems": size.preflight_problems, "minimum_mixed": size.minimum_mixed,
        "optim": Optim(lr=3e-4, weight_decay=0.0, warmup_steps=5, schedule="constant"), "balance_alpha": 0.0,
    }  # fmt: skip


# The claims, decided over the seeds of `study-quickstart`.
AFTER_SFT, AFTER_RL = {"of": "teacher", "label": "after SFT"}, {"of": "teacher", "label": "after RL"}
MORE_SFT = {"of": "teacher", "label": "more SFT instead of RL"}
DISTILLED = {"of": "student", "label": "distilled"}
CLAIMS: list[dict[str, Any]] = [
    {
        "text": "RL adds at least 15 points to the teacher", "minuend": AFTER_RL, "subtrahend": AFTER_SFT,
        "at_least": 0.15,
    },
    {
        "text": "RL adds at least 10 points more than as many FLOPs of SFT add", "at_least": 0.10,
        "difference_of": [AFTER_RL, AFTER_SFT], "minus": [MORE_SFT, AFTER_SFT],
    },
    {
        "text": "the answers grow longer by themselves, by at least 5 tokens", "metric": "mean_tokens", "at_least": 5.0,
        "minuend": AFTER_RL, "subtrahend": AFTER_SFT,
    },
    {
        "text": "the distilled student keeps at least 85 % of the teacher", "ratio_of": DISTILLED, "to": AFTER_RL,
        "at_least": 0.85,
    },
    {
        "text": "distilling beats as many FLOPs of textbook by at least 10 points", "minuend": DISTILLED,
        "subtrahend": {"of": "student", "label": "more textbook instead"}, "at_least": 0.10,
    },
    {
        "text": "distilling beats as many FLOPs of RL by at least 10 points", "minuend": DISTILLED,
        "subtrahend": {"of": "student", "label": "RL only instead"}, "at_least": 0.10,
    },
]  # fmt: skip

FINDING = (
    "RL takes the teacher from {teacher/after SFT} to {teacher/after RL} of unseen problems, and a student with a "
    "quarter of its active parameters learns {student/distilled} from its answers."
)

# What is examined: stage (without seed suffix) -> (whose, label in the tables, control?)
EXAMINED = {
    "teacher-sft": ("teacher", "after SFT", False),
    "teacher-rl": ("teacher", "after RL", False),
    "teacher-more-sft": ("teacher", "more SFT instead of RL", True),
    "student-base": ("student", "after SFT", False),
    "student-distilled": ("student", "distilled", False),
    "student-more-textbook": ("student", "more textbook instead", True),
    "student-rl": ("student", "RL only instead", True),
}


def exam(model: str, size: Size) -> EvalStage:
    """The same unseen problems for every model of every seed."""
    return EvalStage(
        name=f"eval-{model}", inputs={"model": model}, mix=EXAM, problems=size.eval_problems, samples=size.eval_samples,
        decoding=DECODING, compute=COMPUTE, rows_per_batch=512,
    )  # fmt: skip


def report(
    seeds: list[int], suffixes: list[str], arms: dict[str, tuple[str, str, bool]] | None = None, *, size: str
) -> dict[str, Any]:
    """What the report shows; its schema is described in report/tables.py. `arms` are of the first seed only, and only
    the full size claims anything."""
    first = suffixes[0]

    def row(stage: str, of: str, label: str, control: bool, seed: int, suffix: str) -> dict[str, Any]:
        name = f"{stage}{suffix}"
        return {"label": label, "of": of, "stage": f"eval-{name}", "model": name, "control": control, "seed": seed}

    shown = [row(stage, *what, seed, suffix) for seed, suffix in zip(seeds, suffixes, strict=True)
             for stage, what in EXAMINED.items()]  # fmt: skip
    shown += [row(stage, *what, seeds[0], first) for stage, what in (arms or {}).items()]
    return {
        "title": "A reasoning model on a shoestring",
        "finding": FINDING if size == "full" else "The whole road at a size that shows its parts and no effect.",
        "note": NOTE.format(share=LONG_SHARE),
        "claims": CLAIMS if size == "full" else [],
        "evals": shown,
        "samples": {
            "before": f"eval-teacher-sft{first}", "after": f"eval-teacher-rl{first}",
            "teacher": f"eval-teacher-rl{first}", "student": f"eval-student-distilled{first}",
        },
        "curves": {
            "teacher, pretraining": f"teacher-pretrain{first}", "teacher, RL": f"teacher-rl{first}",
            "student, pretraining": f"student-pretrain{first}", "student, RL only": f"student-rl{first}",
        },
    }  # fmt: skip
