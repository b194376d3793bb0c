"""The quickstart over three seeds, with the arms that say what the gain is made of: error bars, claims, upper bounds.

Beside the quickstart's own controls, each at the training FLOPs of the stage it stands against:
rejection sampling (SFT on the teacher's own verified answers, the sampling of them counted in the budget) and SFT on
gold step-by-step solutions for the teacher,
SFT on gold solutions for the student (upper bounds), and RL with its rewards shuffled (is it the rewards?).
Seed 0 shares its runs with `shoestring run quickstart`.

    shoestring run study-quickstart               # about 17 minutes on two cores, less with the quickstart done
"""

from __future__ import annotations

from typing import Any

from shoestring.core.errors import UserError
from shoestring.recipes import quickstart
from shoestring.train.configs import Optim, Recipe, RejectStage, RlStage, SftStage, Stage, Textbook

ARMS = {
    "teacher-reject-sft": ("teacher", "SFT on its own verified answers", True),
    "teacher-gold-sft": ("teacher", "SFT on gold steps (upper bound)", True),
    "teacher-shuffled-rl": ("teacher", "RL with shuffled rewards", True),
    "student-gold-sft": ("student", "SFT on gold steps (upper bound)", True),
}


def recipe(size: str = "full", seeds: int = 3) -> Recipe:
    """The study at a size ("full" or "smoke") over `seeds` seeds."""
    if seeds < 1:
        raise UserError(f"seeds is {seeds}; a study needs at least one.")
    one = quickstart.recipe(size)  # says in a sentence when the size is unknown
    budgets = quickstart.SIZES[size]
    stages: list[Stage] = [quickstart.tokenizer()]
    suffixes = ["" if seed == 0 else f"-s{seed}" for seed in range(seeds)]
    for seed, suffix in enumerate(suffixes):
        made = [*quickstart.teacher(budgets, seed, suffix), *quickstart.student(budgets, seed, suffix)]
        if seed == 0:  # the arms carry no claim: one seed of them keeps the study within its 45 minutes
            made += arms(budgets, seed, suffix)
        examined = [f"{name}{suffix}" for name in (*quickstart.EXAMINED, *ARMS)]
        stages += made
        stages += [quickstart.exam(stage.name, budgets) for stage in made if stage.name in examined]
    return Recipe(
        name=f"study-{one.name}", runs_as=one.name, about=(__doc__ or "").split("\n")[0], stages=tuple(stages),
        report=quickstart.report(list(range(seeds)), suffixes, ARMS, size=size),
    )  # fmt: skip


def arms(size: quickstart.Size, seed: int, suffix: str) -> list[Stage]:
    """The arms of one seed, none of them part of the headline."""
    common: dict[str, Any] = {
        "seed": seed, "compute": quickstart.COMPUTE, "checkpoint_every": size.checkpoint_every, "headline": False,
    }  # fmt: skip
    gold = Textbook(mix=quickstart.EXAM, long_share=1.0)
    sft, rl, base = f"teacher-sft{suffix}", f"teacher-rl{suffix}", f"student-base{suffix}"
    return [
        RejectStage(
            name=f"teacher-reject{suffix}", inputs={"model": sft}, mix=quickstart.EXAM, problems=size.reject_problems,
            samples=4, curate=size.curate, decoding=quickstart.DECODING, seed=seed, compute=quickstart.COMPUTE,
            headline=False,
        ),
        SftStage(
            name=f"teacher-reject-sft{suffix}", match_flops=("budget",), row_tokens=224, optim=Optim(lr=1e-3),
            inputs={"model": sft, "traces": f"teacher-reject{suffix}", "budget": rl}, spent_flops=("traces",),
            mtp_lambda=0.1, **common,
        ),
        SftStage(
            name=f"teacher-gold-sft{suffix}", inputs={"model": sft, "budget": rl}, match_flops=("budget",),
            textbook=gold, problems=size.ask_problems, row_tokens=224, optim=Optim(lr=1e-3), mtp_lambda=0.1, **common,
        ),
        RlStage(
            name=f"teacher-shuffled-rl{suffix}", inputs={"model": sft, "budget": rl}, match_flops=("budget",),
            shuffle_rewards=True, **quickstart.rl_options(size), **common,
        ),
        SftStage(
            name=f"student-gold-sft{suffix}", inputs={"model": base, "budget": f"student-distilled{suffix}"},
            match_flops=("budget",), textbook=gold, problems=size.ask_problems, row_tokens=224,
            optim=quickstart.DISTILL_OPTIM, **common,
        ),
    ]  # fmt: skip
