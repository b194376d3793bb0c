"""Which way of learning from a teacher is worth its dollars: text, stored and live logits, on-policy, RL, a textbook.

On the quickstart's tasks, with the quickstart's teacher and base student (their runs are shared when they are there),
each arm at the same number of updates over the same traces, at three budgets, several seeds; every arm is examined
after it. What an arm spent (the teacher's reading and the student's writing too) stands in its bill, so accuracy is
drawn against dollars and tokens.

    shoestring run study-distill --dry-run
    shoestring run study-distill --set size=smoke
"""

from __future__ import annotations

from typing import Any

from shoestring.core.errors import UserError
from shoestring.recipes import quickstart
from shoestring.train.configs import (
    CaptureStage,
    Compute,
    DistillStage,
    Optim,
    Recipe,
    RlStage,
    SftStage,
    Stage,
    Textbook,
)

# arm -> settings of its distill stage
WAYS: dict[str, dict[str, Any]] = {
    "text": {"way": "text"},
    "offline-topk": {"way": "offline", "logits": "topk"},
    "offline-sampled": {"way": "offline", "logits": "sampled"},
    "offline-hidden": {"way": "offline", "logits": "hidden"},
    "forward-kl": {"way": "forward_kl"},
    "reverse-kl": {"way": "reverse_kl"},
    "on-policy": {"way": "on_policy"},
}
STORES = {"topk": 32, "sampled": 50, "hidden": 1}
BUDGETS = {"full": (25, 75, 250), "smoke": (1, 4)}  # updates of 64 examples; each with a schedule of its own
ON_POLICY_OPTIM = Optim(lr=1e-3, weight_decay=0.0, warmup_steps=5, schedule="constant")


def recipe(size: str = "full", seeds: int = 3) -> Recipe:
    """The study at a size ("full" or "smoke") over `seeds` seeds of the arms; teacher, base and traces are seed 0's."""
    if seeds < 1:
        raise UserError(f"seeds is {seeds}; a study needs at least one.")
    one = quickstart.recipe(size)  # says in a sentence when the size is unknown
    budgets = quickstart.SIZES[size]
    needed = {"tokenizer", "teacher-pretrain", "teacher-sft", "teacher-rl", "student-pretrain", "student-base", "ask"}
    shared: list[Stage] = [stage for stage in one.stages if stage.name in needed]
    stages = [*shared, *_captures(), quickstart.exam("teacher-rl", budgets), quickstart.exam("student-base", budgets)]
    shown: list[dict[str, Any]] = [
        _row("teacher", "the teacher", "teacher-rl", 0), _row("student", "before", "student-base", 0),
    ]  # fmt: skip
    frontier: list[dict[str, Any]] = []
    for seed in range(seeds):
        for updates in BUDGETS[size]:
            whole = updates == BUDGETS[size][-1]
            for way, arm in arms(budgets, seed, updates, f"-s{seed}" if whole else f"-{updates}-s{seed}"):
                stages += [arm, quickstart.exam(arm.name, budgets)]
                frontier.append({
                    "way": way, "budget": updates, "stage": f"eval-{arm.name}", "model": arm.name, "seed": seed,
                })  # fmt: skip
                if whole:
                    shown.append(_row("student", way, arm.name, seed))
    return Recipe(
        name=f"study-distill{'' if size == 'full' else '-' + size}", runs_as=one.name,
        about=(__doc__ or "").split("\n")[0], stages=tuple(stages),
        report={"title": "Ways to learn from a teacher", "evals": shown, "claims": [], "note": "", "samples": {},
                "curves": {}, "frontier": frontier, "given": ["teacher-rl", "student-base"]},
    )  # fmt: skip


def _captures() -> list[Stage]:
    common: dict[str, Any] = {
        "inputs": {"teacher": "teacher-rl", "traces": "ask"}, "row_tokens": 224, "compute": quickstart.COMPUTE,
        "headline": False,
    }  # fmt: skip
    return [
        CaptureStage.from_dict({"name": f"logits-{kind}", "stage": "capture", "kind": kind, "k": k} | _plain(common))
        for kind, k in STORES.items()
    ]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to_dict() if isinstance(value, Compute) else value for key, value in values.items()}


def arms(size: quickstart.Size, seed: int, updates: int, ending: str) -> list[tuple[str, Stage]]:
    """Every way of learning of one seed, at the same number of updates; RL and the textbook at text's FLOPs."""
    common: dict[str, Any] = {"seed": seed, "compute": quickstart.COMPUTE, "checkpoint_every": size.checkpoint_every,
                              "headline": False}  # fmt: skip
    reading: dict[str, Any] = {"steps": updates, "row_tokens": 224, "examples_per_step": 64, **common}
    made: list[Stage] = []
    for name, given in WAYS.items():
        settings = dict(given)
        inputs = {"model": "student-base", "traces": "ask"}
        if (kind := settings.pop("logits", None)) is not None:
            inputs["logits"] = f"logits-{kind}"
        elif settings["way"] != "text":
            inputs["teacher"] = "teacher-rl"
        if settings["way"] == "on_policy":
            settings |= {"decoding": quickstart.DECODING, "mix": quickstart.EXAM, "optim": ON_POLICY_OPTIM}
        made.append(DistillStage(name=f"arm-{name}{ending}", inputs=inputs,
                                 **{"optim": quickstart.DISTILL_OPTIM, **reading, **settings}))  # fmt: skip
    text = f"arm-text{ending}"
    made.append(DistillStage(
        name=f"arm-text-then-on-policy{ending}", inputs={"model": text, "teacher": "teacher-rl"}, way="on_policy",
        mix=quickstart.EXAM, decoding=quickstart.DECODING, optim=ON_POLICY_OPTIM, **reading,
    ))  # fmt: skip
    budget = {"model": "student-base", "budget": text}
    made.append(RlStage(name=f"arm-rl-only{ending}", inputs=budget, match_flops=("budget",),
                        **quickstart.rl_options(size), **common))  # fmt: skip
    made.append(SftStage(
        name=f"arm-textbook-only{ending}", inputs=budget, match_flops=("budget",), row_tokens=224,
        textbook=Textbook(mix=quickstart.LEARN, long_share=quickstart.LONG_SHARE), problems=size.ask_problems,
        optim=quickstart.DISTILL_OPTIM, **common,
    ))  # fmt: skip
    return [(arm.name.removeprefix("arm-").removesuffix(ending).replace("-", " "), arm) for arm in made]


def _row(of: str, label: str, stage: str, seed: int) -> dict[str, Any]:
    return {"label": label, "of": of, "stage": f"eval-{stage}", "model": stage, "control": False, "seed": seed}
