"""A road of made-up runs, as the stages leave them: what the report reads, without training anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from shoestring.core.atomic import write_json
from shoestring.core.nouns import Problem
from shoestring.core.registry import load_part
from shoestring.core.run import Run
from shoestring.evals.runner import EvalResult, summarise
from shoestring.train.configs import Recipe

MIX = [{"task": name, "difficulty": [6, 6]} for name in ("questions", "logic", "programs")]
OPTIM = {"lr": 1e-3}
RATE = 0.10  # dollars an hour
PEAK = 1.3e11

# name -> (kind, inputs, seconds, steps, headline)
ROAD: dict[str, tuple[str, dict[str, str], float, int, bool]] = {
    "tokenizer": ("tokenizer", {}, 1.2, 1, True),
    "teacher-pretrain": ("pretrain", {"tokenizer": "tokenizer"}, 182, 300, True),
    "teacher-sft": ("sft", {"model": "teacher-pretrain"}, 31, 60, True),
    "teacher-rl": ("rl", {"model": "teacher-sft"}, 163, 80, True),
    "teacher-more-sft": ("sft", {"model": "teacher-sft", "rl": "teacher-rl"}, 140, 90, False),
    "teacher-shuffled": ("rl", {"model": "teacher-sft"}, 88, 80, False),
    "ask": ("ask", {"teacher": "teacher-rl"}, 48, 1, True),
    "student-pretrain": ("pretrain", {"tokenizer": "tokenizer"}, 74, 200, True),
    "distill": ("distill", {"model": "student-pretrain", "traces": "ask"}, 41, 100, True),
    "student-textbook": ("pretrain", {"model": "student-pretrain", "distill": "distill"}, 44, 100, False),
    "student-rl": ("rl", {"model": "student-pretrain", "distill": "distill"}, 61, 50, False),
}
# of, label, model, control, right short answers, tokens thought
EVALS = [
    ("teacher", "after SFT", "teacher-sft", False, 0.52, 7),
    ("teacher", "after RL", "teacher-rl", False, 0.91, 23),
    ("teacher", "more SFT, same compute", "teacher-more-sft", True, 0.58, 8),
    ("teacher", "RL, shuffled rewards", "teacher-shuffled", True, 0.50, 6),
    ("student", "pretrained", "student-pretrain", False, 0.33, 5),
    ("student", "distilled", "distill", False, 0.84, 22),
    ("student", "more textbook, same compute", "student-textbook", True, 0.41, 6),
    ("student", "RL only, same compute", "student-rl", True, 0.55, 9),
]
TEACHER, STUDENT = {"of": "teacher"}, {"of": "student"}


def eval_name(model: str) -> str:
    return f"eval-{model}"


def spec(evals: list[tuple[str, str, str, bool, float, int]] = EVALS) -> dict[str, Any]:
    rl, sft = TEACHER | {"label": "after RL"}, TEACHER | {"label": "after SFT"}
    more, kept = TEACHER | {"label": "more SFT, same compute"}, STUDENT | {"label": "distilled"}
    return {
        "title": "Made to reason, then poured into a student",
        "finding": "Reinforcement learning took the teacher from {teacher/after SFT} to {teacher/after RL} while its "
        "answers grew from {teacher/after SFT:mean_tokens} to {teacher/after RL:mean_tokens} tokens; the student, "
        "a quarter of its size, reaches {student/distilled} by learning from what it said.",
        "note": "The textbook is a construction: 20 % of its solutions think step by step, the rest answer at once. "
        "That the long voice is rare is our doing, so that reinforcement learning has something to find.",
        "evals": [
            {"of": of, "label": label, "stage": eval_name(model), "model": model, "control": control}
            for of, label, model, control, _, _ in evals
        ],
        "claims": [
            {"text": "RL adds at least 15 points to the post-SFT teacher", "minuend": rl, "subtrahend": sft,
             "at_least": 0.15},
            {"text": "… and at least 10 more than the control adds", "difference_of": [rl, sft], "minus": [more, sft],
             "at_least": 0.10},
            {"text": "The reasoning grows longer by itself", "metric": "mean_tokens", "ratio_of": rl, "to": sft,
             "at_least": 1.5},
            {"text": "The student keeps at least 85 % of the teacher", "ratio_of": kept, "to": rl, "at_least": 0.85},
            {"text": "The student beats RL alone by 35 points", "minuend": kept,
             "subtrahend": STUDENT | {"label": "RL only, same compute"}, "at_least": 0.35},
        ],
        "samples": {"before": "eval-teacher-sft", "after": "eval-teacher-rl", "teacher": "eval-teacher-rl",
                    "student": "eval-distill"},
        "curves": {"teacher": "teacher-pretrain", "student": "student-pretrain", "cold start": "teacher-sft",
                   "distillation": "distill", "more SFT (control)": "teacher-more-sft", "teacher RL": "teacher-rl",
                   "shuffled rewards (control)": "teacher-shuffled", "student RL only (control)": "student-rl"},
    }  # fmt: skip


def stage_values(name: str, kind: str, inputs: dict[str, str], steps: int, headline: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"stage": kind, "name": name, "inputs": inputs, "headline": headline}
    budget = [role for role in inputs if role in ("rl", "distill")]
    if kind in ("pretrain", "sft", "rl", "distill"):
        values |= {"optim": OPTIM} | ({"match_flops": budget} if budget else {"steps": steps})
    if kind in ("rl", "ask", "eval"):
        values["mix"] = MIX
    if kind in ("tokenizer", "pretrain"):
        values["corpus"] = {"mix": MIX}
    if kind == "pretrain":
        values["corpus_tokens"] = 10_000
        if "model" not in inputs:
            values["model"] = {"family": "deepseek", "config": {}}
    if kind == "sft":
        values["textbook"] = {"mix": MIX}
    if kind == "rl":
        values["rewards"] = {"correct": 1.0, "format": 0.1}
    return values


def make_recipe() -> Recipe:
    stages = [stage_values(name, kind, inputs, n, headline) for name, (kind, inputs, _, n, headline) in ROAD.items()]
    stages += [stage_values(eval_name(e[2]), "eval", {"model": e[2]}, 1, False) for e in EVALS]
    return Recipe.from_dict({"name": "quickstart", "stages": stages, "usd_per_hour": RATE, "report": spec()})


def curve(kind: str, name: str, step: int, steps: int, rng: random.Random) -> dict[str, float]:
    x, noise = step / steps, rng.gauss(0, 1)
    row = {"max_violation": 0.2 + 1.1 * math.exp(-5 * x) + 0.05 * abs(noise), "grad_norm": 0.5 + 0.1 * abs(noise)}
    if kind == "rl":
        gain = 0.0 if "shuffled" in name else 1 / (1 + math.exp(-9 * (x - 0.45)))
        right = 0.5 + 0.42 * gain + 0.03 * noise
        row |= {
            "reward/correct": right,
            "reward/format": 0.97 + 0.003 * noise,
            "reward": right + 0.097,
            "length": 7 + 16 * gain + 0.5 * noise,
            "entropy": 0.30 - 0.22 * x + 0.01 * noise,
            "ratio_error": 3e-7 * (1 + 0.1 * abs(noise)),
            "mixed_groups": 0.8 - 0.5 * gain,
            "loss": 0.01 * noise,
        }
        if "student" in name:
            del row["max_violation"]
    else:
        low = {"teacher-pretrain": 0.9, "student-pretrain": 1.05}.get(name, 0.5)
        row |= {"loss": low + 3.5 * math.exp(-7 * x) + 0.02 * noise}
        if kind == "pretrain" and name.startswith("teacher"):
            row["mtp"] = row["loss"] + 0.5
    return row  # fmt: skip


def fake_result(of: str, model: str, right: float, tokens: int, problems: list[Problem]) -> EvalResult:
    rows = []
    for problem in problems:
        luck, noise = random.Random(problem.id), random.Random(model + problem.id)
        chance = min(1.0, max(0.0, right + 0.5 * (luck.random() - 0.5)))
        rights = [noise.random() < chance for _ in range(4)]
        voice = problem.voices["long" if tokens > 12 else "short"]
        lengths = [max(3, round(noise.gauss(tokens, 2))) for _ in rights]
        texts = [f"<think>{voice.thinking}</think>{problem.gold if good else '<b>no</b>'}" for good in rights]
        rows.append({
            "problem_id": problem.id, "task": problem.task, "kind": problem.meta.get("kind", "all"),
            "difficulty": problem.difficulty, "prompt": problem.prompt, "gold": problem.gold, "samples": 4,
            "correct": sum(rights), "right": rights, "cons": float(sum(rights) >= 2), "tokens": lengths,
            "truncated": 0, "texts": texts,
        })  # fmt: skip
    by = {task: summarise([row for row in rows if row["task"] == task]) for task in sorted({p.task for p in problems})}
    return EvalResult(rows, summarise(rows), by, by, 1000, {"n": 4, "temperature": 1.0}, "0" * 12)


def finish(run: Run, kind: str, seconds: float, steps: int, result: EvalResult | None = None) -> None:
    rng, outputs = random.Random(run.name), []
    flops = 0.0 if kind == "tokenizer" else seconds * PEAK * {"rl": 0.11, "eval": 0.08, "ask": 0.09}.get(kind, 0.31)
    with run.attempt(usd_per_hour=RATE):
        run.note(processor="Xeon x2 torch 2.13.0", kernels="Kernels(dtype='float32', experts='bmm')")
        if kind in ("pretrain", "sft", "rl", "distill"):
            for step in range(1, steps + 1):
                run.metric(step, tokens=step * 8192, flops=flops * step / steps,
                           **curve(kind, run.manifest["stage"], step, steps, rng))  # fmt: skip
        if kind == "rl":
            run.note(preflight={"problems": 64, "samples": 16, "pass@1": 0.51, "pass@16": 0.93,
                                "mixed_groups_expected": 0.71, "solved_histogram": [4, 3, 5, 4, 3, 4, 6, 5, 4, 3, 4,
                                                                                    5, 3, 4, 2, 3, 2]})  # fmt: skip
        if result is not None:
            outputs.append(run.path / "result.json")
            write_json(outputs[0], result.to_dict())
            run.save_samples("answers", result.rows)
        sampled = steps * 8192 if kind in ("ask", "eval") else steps * 4096 if kind == "rl" else 0
        cost = {"seconds": seconds, "tokens": steps * 8192, "sampled_tokens": sampled, "flops": flops,
                "train_flops": flops, "peak_flops": PEAK,
                "usd": seconds / 3600 * RATE, "usd_per_hour": RATE, "peak_share": flops / seconds / PEAK}  # fmt: skip
        run.finish(outputs=outputs, headline_metric={"name": "loss", "value": 0.9, "stderr": 0.01}, cost=cost)


def make_road(root: Path, problems: int = 20, skip: tuple[str, ...] = ()) -> tuple[Recipe, dict[str, Run]]:
    """The recipe and its finished runs under `root`, but for the stages named in `skip`."""
    recipe, runs = make_recipe(), dict[str, Run]()
    asked = [
        load_part("tasks", entry["task"]).make(seed, 6, split="test")
        for entry in MIX for seed in range(problems)
    ]  # fmt: skip
    asked = list({problem.id: problem for problem in asked}.values())
    evals = {eval_name(e[2]): e for e in EVALS}
    for stage in recipe.stages:
        if stage.name in skip:
            continue
        parents = {role: runs[value].digest for role, value in stage.inputs.items() if value in runs}
        run = Run.open(root, stage=stage.name, recipe=recipe.name, config=stage, parents=parents,
                       headline=stage.headline)  # fmt: skip
        if stage.name in evals:
            of, _, model, _, right, tokens = evals[stage.name]
            finish(run, "eval", 9.0, 1, fake_result(of, model, right, tokens, asked))
        else:
            kind, _, seconds, steps, _ = ROAD[stage.name]
            finish(run, kind, seconds, steps)
        runs[stage.name] = run
    _as_if_it_had_taken_long(root)
    return recipe, runs


def _as_if_it_had_taken_long(root: Path) -> None:
    """The ledger measures what making these runs up took; give it the seconds their bills speak of."""
    costs = {path.parent.name: json.loads(path.read_text()) for path in root.glob("*/cost.json")}
    lines = [json.loads(line) for line in (root / "ledger.jsonl").read_text().splitlines()]
    told = [line | {"seconds": costs[line["run"]]["seconds"]} for line in lines]
    (root / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Run], Path]:
    """A finished road; read it, do not change it."""
    root = tmp_path_factory.mktemp("runs")
    return (*make_road(root), root)
