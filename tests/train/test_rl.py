"""RL: what it spends is counted once and wholly, and the KL term pulls to its reference."""

from __future__ import annotations

import copy
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoestring.core import ledger
from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling
from shoestring.core.run import Run, runs_tree, totals
from shoestring.data.batch import Batch, Example, packed_batches
from shoestring.data.textbook import problems
from shoestring.infer.engine import Engine
from shoestring.losses import policy
from shoestring.models.deepseek import Deepseek
from shoestring.optim.make import optimizers
from shoestring.recipes import quickstart
from shoestring.road import run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import rl
from shoestring.train.configs import Decoding, Optim, Recipe, RlStage, SftStage, TaskMix, Textbook
from shoestring.train.loop import Budget
from shoestring.train.rollouts import answer_groups, rollout_example
from shoestring.train.step import StepStats, TrainState, accumulate, train_step

MIX = (TaskMix(task="questions", kinds=("sum",), difficulty=(2, 4)),)
WISH = Path(__file__).with_name("wish.py")  # a reward of the user's own that an untrained model earns now and then


class Killed(BaseException):
    """The death of the process."""


def stage(model: Path, **options: Any) -> RlStage:
    values: dict[str, Any] = {
        "steps": 4, "preflight_problems": 3, "preflight_samples": 4, "checkpoint_every": 2, "minimum_mixed": 0.0,
        "max_tries": 1,
        "optim": Optim(lr=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.0),
    }  # fmt: skip
    return RlStage(
        name="rl", inputs={"model": str(model)}, mix=MIX, rewards={str(WISH): 1.0}, problems_per_step=4, group_size=4,
        decoding=Decoding(max_new_tokens=12), compute=quickstart.COMPUTE, balance_alpha=0.0,
        **values | options,
    )  # fmt: skip


def road(made: RlStage, root: Path) -> Run:
    return run_recipe(Recipe(name="t", stages=(made,)), root, quiet=True).runs["rl"]


def test_several_updates_a_rollout_are_told_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of three updates: its line of metrics is the mean over them, not what the last one happened to see."""
    seen: list[StepStats] = []
    monkeypatch.setattr(rl, "train_step", lambda *args, **named: seen.append(train_step(*args, **named)) or seen[-1])
    run = road(stage(folder, steps=1, minibatches=3), tmp_path)
    row = next(row for row in run.metrics() if "grad_norm" in row)
    assert len(seen) == 3 and len({update.loss for update in seen}) == 3
    tokens = sum(update.tokens for update in seen)
    assert row["loss"] == pytest.approx(sum(update.loss * update.tokens for update in seen) / tokens)
    for name in seen[0].metrics.keys() - {"ratio_error"}:
        assert row[name] == pytest.approx(sum(u.metrics[name] * u.tokens for u in seen) / tokens), name
    assert row["ratio_error"] == seen[0].metrics["ratio_error"]


# ---- the KL term --------------------------------------------------------------------------------------------------


def test_kl_is_zero_at_the_reference_and_grows(folder: Path, tmp_path: Path) -> None:
    free, held = (road(stage(folder, kl_beta=beta), tmp_path / str(beta)) for beta in (1e-9, 0.5))
    kl = {run.path.parent.name: [row["kl"] for row in run.metrics() if "kl" in row] for run in (free, held)}
    assert abs(kl["1e-09"][0]) < 1e-9 and abs(kl["0.5"][0]) < 1e-9
    assert kl["1e-09"][-1] > 1e-3
    weights = [run.latest_checkpoint()[1] / "model.safetensors" for run in (free, held)]  # type: ignore[index]
    assert weights[0].read_bytes() != weights[1].read_bytes()  # the pull reached the policy
    references = [path.parent / "reference" / "model.safetensors" for path in weights]
    assert references[0].read_bytes() == references[1].read_bytes() != weights[0].read_bytes()


def rollouts(model: Deepseek, tokenizer: Tokenizer) -> list[Example]:
    asked = list(islice(problems(quickstart.EXAM, 1), 6))
    sampling = Sampling(n=4, temperature=1.0, max_new_tokens=16, seed=1, stop_ids=(tokenizer.end,))
    groups = answer_groups(Engine(model, tokenizer), tokenizer, asked, sampling)
    examples = [rollout_example(r) for group in groups for r in group]
    for example in examples:
        example.advantage = 0.0  # nothing but the KL speaks
    return examples


def batches_with(reference: Deepseek, examples: list[Example], tokenizer: Tokenizer) -> list[Batch]:
    rl._fill_reference(examples, reference, stage(Path("nowhere")))
    return packed_batches(examples, row_tokens=128, tokens_per_microbatch=10_000, pad_id=tokenizer.pad)


def test_the_gradient_of_the_kl_alone(model: Deepseek, tokenizer: Tokenizer) -> None:
    """None where policy and reference are one; away from it, its steps lead back."""
    examples = rollouts(model, tokenizer)
    objective = partial(policy.loss, kl_beta=1.0)
    _, metrics, _ = accumulate(
        model, batches_with(model, examples, tokenizer), objective, mtp_lambda=0.0, balance_alpha=0.0
    )
    at_home = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert metrics["kl"] < 1e-9 and at_home < 1e-4

    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.zero_grad(set_to_none=True)
    state = TrainState(model, optimizers(model, "adamw", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0))
    examples = rollouts(model, tokenizer)
    batches = batches_with(reference, examples, tokenizer)
    made = stage(Path("nowhere"), optim=Optim(lr=1e-3, warmup_steps=0, schedule="constant", weight_decay=0.0))
    seen = [train_step(state, batches, objective, made, progress=0.0) for _ in range(8)]
    assert seen[0].grad_norm > 100 * at_home
    assert seen[-1].metrics["kl"] < 0.7 * seen[0].metrics["kl"]


# ---- what it costs ------------------------------------------------------------------------------------------------


def test_everything_is_counted_and_the_check_is_not_training(folder: Path, tmp_path: Path) -> None:
    with_check, without = (road(stage(folder, preflight_problems=n), tmp_path / str(n)) for n in (3, 0))
    costs = [run.manifest["cost"] for run in (with_check, without)]
    checked = with_check.manifest["facts"]["preflight"]
    assert checked["tokens"] > 0 and checked["flops"] > 0
    assert costs[0]["train_flops"] == costs[1]["train_flops"] == costs[1]["flops"]
    assert costs[0]["flops"] == pytest.approx(costs[1]["flops"] + checked["flops"])
    assert costs[0]["sampled_tokens"] == costs[1]["sampled_tokens"] + checked["tokens"]
    rows = without.metrics()
    assert costs[1]["sampled_tokens"] == sum(row["rollout_tokens"] for row in rows)
    assert costs[1]["tokens"] - costs[1]["sampled_tokens"] > 0  # what was trained on


def test_the_first_samples_are_of_the_first_step_that_learned(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected, stream, starts = rl.collect, rl.problems, []

    def nothing_at_first(*options: Any) -> Any:
        groups, sampled = collected(*options)
        return ([] if len(starts) == 1 else groups), sampled

    def from_where(*options: Any, start: int = -1) -> Any:
        if start >= 0:
            starts.append(start)
        return stream(*options, start=max(start, 0))

    monkeypatch.setattr(rl, "collect", nothing_at_first)
    monkeypatch.setattr(rl, "problems", from_where)
    run = road(stage(folder, steps=3, preflight_problems=0, max_tries=300), tmp_path)
    first, last = ((run.path / "samples" / f"{name}.jsonl").read_text() for name in ("first", "last"))
    assert first and first != last
    assert starts == [0, 1200, 2400]  # 4 problems, 300 times: none of a step's comes again in the next


def test_the_reference_is_paid_for(folder: Path, tmp_path: Path) -> None:
    plain, pulled = (road(stage(folder, steps=1, kl_beta=beta), tmp_path / str(beta)) for beta in (0.0, 1e-9))
    more = pulled.manifest["cost"]["train_flops"] - plain.manifest["cost"]["train_flops"]
    trained = plain.manifest["cost"]["tokens"] - plain.manifest["cost"]["sampled_tokens"]
    # one forward pass over whole samples, beside about four in which a prompt counts once for all its samples
    assert 0.25 < more / plain.manifest["cost"]["train_flops"] < 0.45
    assert trained == pulled.manifest["cost"]["tokens"] - pulled.manifest["cost"]["sampled_tokens"]


def test_a_kill_between_check_and_first_checkpoint_loses_no_cost(
    folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole, checks, real = road(stage(folder), tmp_path / "whole"), 0, rl.preflight

    def counted(*arguments: Any) -> Any:
        nonlocal checks
        checks += "preflight" not in arguments[1].run.manifest["facts"]
        return real(*arguments)

    def dying(*_: Any, **__: Any) -> Any:
        raise Killed

    monkeypatch.setattr(rl, "preflight", counted)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(rl, "train_step", dying)
        road(stage(folder), tmp_path / "killed")
    (cut,) = ledger.read(tmp_path / "killed")
    assert cut.flops == pytest.approx(whole.manifest["facts"]["preflight"]["flops"])
    run = road(stage(folder), tmp_path / "killed")
    assert checks == 1 and run.metrics() == whole.metrics()
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3, 4]
    assert run.manifest["cost"]["flops"] == whole.manifest["cost"]["flops"]
    assert totals(tmp_path / "killed")["everything"]["flops"] == pytest.approx(run.manifest["cost"]["flops"])


def test_a_check_that_says_no_stops_in_a_sentence_with_its_cost(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):  # and says so again, without sampling again
        with pytest.raises(UserError, match=r"RL cannot help here: 0\.0% of groups of 4 would carry signal"):
            road(stage(folder, minimum_mixed=0.5), tmp_path)
    assert runs_tree(tmp_path)[0].manifest["status"] == "failed"
    first, second = ledger.read(tmp_path)
    assert first.flops == runs_tree(tmp_path)[0].manifest["facts"]["preflight"]["flops"] > 0 == second.flops


def test_what_was_sampled_for_a_control_comes_off_its_budget() -> None:
    made = SftStage(
        name="x", inputs={"budget": "b", "traces": "t"}, match_flops=("budget",), spent_flops=("traces",),
        optim=Optim(lr=1e-3),
    )  # fmt: skip
    flops = {("budget",): 100.0, ("traces",): 30.0}
    ctx: Any = SimpleNamespace(budget_flops=lambda roles: flops[roles], run=SimpleNamespace(name="x-1"))
    assert Budget.of(made, ctx).total == 70.0
    flops["traces",] = 100.0
    with pytest.raises(UserError, match="took 100 of 100 FLOPs, so nothing is left to train with; sample less"):
        Budget.of(made, ctx)
    book = Textbook(mix=quickstart.LEARN)
    with pytest.raises(UserError, match="spent_flops is taken off a budget of match_flops"):
        SftStage(name="x", inputs={"a": "b"}, spent_flops=("a",), steps=3, textbook=book, optim=Optim(lr=1e-3))
