"""From problems to rewarded rollouts with their advantages, and from those to training examples. Nothing is tokenised
twice.

    grpo     A_i = (r_i - mean r) / std r      DeepSeekMath (arXiv 2402.03300) section 4.1; population std
    dr_grpo  A_i = r_i - mean r                Dr. GRPO (arXiv 2503.20783): no up-weighting of easy or hard groups

A group of equal rewards carries no signal: all its advantages are 0 (never 0/0, never noise over an epsilon).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch

from shoestring.core.contracts import Generator
from shoestring.core.errors import UserError
from shoestring.core.nouns import Completion, Problem, Rollout, Sampling
from shoestring.core.registry import load_part
from shoestring.data.batch import Example
from shoestring.data.textbook import conversation
from shoestring.text.chat import render, whole_answer
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import RlStage
from shoestring.train.context import step_generator

Grade = Callable[[Sequence[tuple[Problem, str]]], list[bool]]
Group = list[Rollout]


def prompt_ids(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """The problem as the model reads it: the chat template up to where the assistant speaks."""
    return render(conversation(problem), tokenizer, generation_prompt=True).ids


def answer_groups(
    engine: Generator, tokenizer: Tokenizer, problems: Sequence[Problem], sampling: Sampling
) -> list[Group]:
    """`sampling.n` rollouts of each problem, unrewarded. Texts begin with the tag that a prompt may end in."""
    prompts = [prompt_ids(problem, tokenizer) for problem in problems]
    answered: list[list[Completion]] = engine.generate(prompts, sampling)
    for prompt, completions in zip(prompts, answered, strict=True):
        for completion in completions:
            completion.text = whole_answer(completion.text, prompt, tokenizer)
    return [
        [Rollout(problem, ids, completion) for completion in completions]
        for problem, ids, completions in zip(problems, prompts, answered, strict=True)
    ]


def reward_groups(groups: Sequence[Group], rewards: Mapping[str, float], grade: Grade) -> None:
    """Fill in each rollout's rewards by name and their weighted sum. Raises UserError for one that is no number: its
    group would pass for one without signal."""
    rollouts = [rollout for group in groups for rollout in group]
    for name, weight in rewards.items():
        values = load_part("rewards", name).reward(rollouts, grade=grade)
        for rollout, value in zip(rollouts, values, strict=True):
            if not math.isfinite(value):
                raise UserError(f'the reward "{name}" gives {value} for an answer to {rollout.problem.id}; mend it.')
            rollout.rewards[name] = value
            rollout.reward += weight * value


def carries_signal(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group differ. Tested on the spread, so that continuous rewards count too."""
    return max(rewards) - min(rewards) > 1e-9


def advantages(rewards: Sequence[float], kind: Literal["grpo", "dr_grpo"]) -> list[float]:
    """One advantage for each reward of the group; they sum to 0."""
    if not carries_signal(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.pstdev(rewards) if kind == "grpo" else 1.0
    return [(r - mean) / scale for r in rewards]


def collect(
    stage: RlStage, engine: Generator, tokenizer: Tokenizer, source: Iterator[Problem], grade: Grade, seed: int
) -> tuple[list[Group], list[Group]]:
    """Groups of one step, dynamic sampling included: groups without signal are replaced, up to `max_tries` rounds.

    Returns (groups to train on, everything sampled). Source: DAPO (arXiv 2503.14476) section 3.2.
    """
    kept: list[Group] = []
    sampled: list[Group] = []
    for attempt in range(stage.max_tries):
        wanted = stage.problems_per_step - len(kept)
        if wanted <= 0:
            break
        sampling = stage.decoding.sampling(n=stage.group_size, seed=seed + attempt, stop_ids=(tokenizer.end,))
        groups = answer_groups(engine, tokenizer, list(islice(source, wanted)), sampling)
        reward_groups(groups, stage.rewards, grade)
        if stage.shuffle_rewards:
            _shuffle(groups, seed + attempt)
        sampled += groups
        kept += [group for group in groups if carries_signal([r.reward for r in group])]
    for group in kept:
        for rollout, advantage in zip(group, advantages([r.reward for r in group], stage.advantage), strict=True):
            rollout.advantage = advantage
    return kept, sampled


def _shuffle(groups: Sequence[Group], seed: int) -> None:
    """Deal the step's rewards out at random: the control that keeps everything but their meaning."""
    rollouts = [rollout for group in groups for rollout in group]
    order = torch.randperm(len(rollouts), generator=step_generator(seed, 11)).tolist()
    rewards = [rollouts[i].reward for i in order]
    for rollout, reward in zip(rollouts, rewards, strict=True):
        rollout.reward = reward


def measure(groups: Sequence[Group], kept: int) -> dict[str, float]:
    """What a step's rollouts look like: means over everything sampled."""
    rollouts = [rollout for group in groups for rollout in group]
    lengths = [len(r.completion.token_ids) for r in rollouts]
    out = {
        "reward": sum(r.reward for r in rollouts) / len(rollouts),
        "length": sum(lengths) / len(rollouts),
        "truncated": sum(r.completion.finish_reason == "length" for r in rollouts) / len(rollouts),
        "mixed_groups": sum(carries_signal([r.reward for r in g]) for g in groups) / len(groups),
        "sampled_groups": float(len(groups)),
        "kept_groups": float(kept),
        "rollout_tokens": float(sampled_tokens(groups)),
    }
    for name in rollouts[0].rewards:
        out[f"reward/{name}"] = sum(r.rewards[name] for r in rollouts) / len(rollouts)
    return out


def rollout_example(rollout: Rollout, *, own: int | None = None) -> Example:
    """The sampled ids with the sampler's logprobs; weight 1 on every sampled token, <|end|> included.

    Samples of one prompt may share it but for its last `own` tokens: those that predict sampled ones. None: all of it.
    """
    prompt, completion = rollout.prompt_ids, rollout.completion
    nothing = [0.0] * len(prompt)
    return Example(
        ids=[*prompt, *completion.token_ids],
        weight=nothing + [1.0] * len(completion.token_ids),
        advantage=rollout.advantage,
        old=nothing + completion.logprobs,
        stem=0 if own is None else max(0, len(prompt) - own),
    )


def sampled_tokens(groups: Sequence[Group]) -> int:
    """Prompt and completion tokens read and written for these groups; a prompt is read once a group."""
    return sum(prompt + sum(completions) for prompt, completions in lengths_of(groups))


def lengths_of(groups: Sequence[Group]) -> list[tuple[int, list[int]]]:
    """(prompt length, completion lengths) of each group: what sampling is priced by."""
    return [(len(g[0].prompt_ids), [len(r.completion.token_ids) for r in g]) for g in groups if g]


def sample_row(rollout: Rollout) -> dict[str, Any]:
    """A rollout for samples/*.jsonl and the report."""
    return {
        "task": rollout.problem.task, "kind": rollout.problem.meta.get("kind"), "problem_id": rollout.problem.id,
        "prompt": rollout.problem.prompt, "gold": rollout.problem.gold, "text": rollout.completion.text,
        "tokens": len(rollout.completion.token_ids), "finish_reason": rollout.completion.finish_reason,
        "reward": rollout.reward, **{f"reward/{k}": v for k, v in rollout.rewards.items()},
    }  # fmt: skip
