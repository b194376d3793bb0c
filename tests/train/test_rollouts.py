"""What a step of RL trains on: groups that carry signal, replaced while there are rounds; SFT only on answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from shoestring.core.nouns import Completion, Problem, Rollout, Sampling
from shoestring.data.textbook import problems, solved
from shoestring.recipes import quickstart
from shoestring.road import run_recipe
from shoestring.text.chat import DEFAULT_TEMPLATE
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import rl
from shoestring.train.configs import Decoding, Optim, Recipe, RlStage, TaskMix
from shoestring.train.examples import textbook_examples
from shoestring.train.rollouts import answer_groups, collect, measure, reward_groups, rollout_example

MIX = (TaskMix(task="questions", kinds=("sum",), difficulty=(2, 4)),)
GIVEN: dict[str, Any] = {
    "problems_per_step": 4, "group_size": 3, "decoding": Decoding(max_new_tokens=4), "optim": Optim(lr=1e-3),
    "preflight_problems": 0, "compute": quickstart.COMPUTE,
}  # fmt: skip


class Dealer:
    """A generator whose groups are all right, all wrong or mixed, as they are dealt; it notes what it was asked."""

    def __init__(self, hands: str, thinking: str = "<think>a</think>"):
        self.thinking = thinking
        self.hands, self.rounds, self.seeds = iter(hands), list[int](), list[int]()
        self.asked = list[Sampling]()

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[Completion]]:
        self.rounds.append(len(prompts))
        self.asked.append(sampling)
        self.seeds.append(sampling.seed or 0)
        return [self._group(next(self.hands), sampling.n) for _ in prompts]

    def _group(self, hand: str, size: int) -> list[Completion]:
        right = {"+": size, "-": 0, "m": 1}[hand]
        return [Completion(self.thinking + "yn"[i >= right], [7, i], [-1.0, -1.0], "stop") for i in range(size)]


def yes(pairs: Sequence[tuple[Problem, str]]) -> list[bool]:
    return [answer == "y" for _, answer in pairs]


@pytest.mark.parametrize(
    ("hands", "tries", "rounds", "kept"),
    [("m+-m" "mm", 2, [4, 2], 4), ("+-+-" "-m+-" "m+m", 3, [4, 4, 3], 3), ("mmmm", 3, [4], 4), ("++--", 1, [4], 0),
     ("++--" "----", 2, [4, 4], 0)],
)  # fmt: skip
def test_groups_without_signal_are_replaced(
    tokenizer: Tokenizer, hands: str, tries: int, rounds: list[int], kept: int
) -> None:
    """With other problems and other draws, while there are rounds; all that was sampled is told, for the bill."""
    stage = RlStage(name="rl", inputs={"model": "m"}, mix=MIX, steps=1, max_tries=tries, **GIVEN)
    dealer = Dealer(hands)
    groups, sampled = collect(stage, dealer, tokenizer, problems(MIX, 5), yes, 100)  # type: ignore[arg-type]
    assert dealer.rounds == rounds and len(set(dealer.seeds)) == len(rounds)
    assert len(groups) == kept and len(sampled) == sum(rounds)
    asked = [group[0].problem.id for group in sampled]
    assert asked == [problem.id for problem in islice(problems(MIX, 5), len(asked))]
    for group in groups:
        assert sum(r.reward for r in group) == 1.0
        assert sum(r.advantage for r in group) == pytest.approx(0) and group[0].advantage > 0 > group[1].advantage


def test_what_the_sampler_is_asked(tokenizer: Tokenizer) -> None:
    """Prompts end where the assistant speaks, answers where it ends; a tag that the prompt opens is put before them."""
    stage = RlStage(name="rl", inputs={"model": "m"}, mix=MIX, steps=1, **GIVEN)
    dealer = Dealer("mmmm")
    _, sampled = collect(stage, dealer, tokenizer, problems(MIX, 5), yes, 100)  # type: ignore[arg-type]
    for rollout in (r for group in sampled for r in group):
        assert tokenizer.decode(rollout.prompt_ids).endswith(f"{rollout.problem.prompt}<|assistant|>")
        assert rollout.completion.text.startswith("<think>a")
    (asked,) = dealer.asked
    assert (asked.stop_ids, asked.n, asked.max_new_tokens, asked.temperature) == ((tokenizer.end,), 3, 4, 1.0)
    opening = copy.copy(tokenizer)
    opening.chat_template = DEFAULT_TEMPLATE.replace(
        "'<|assistant|>' -}}{%- endif", "'<|assistant|><think>' -}}{%- endif"
    )
    (group,) = answer_groups(Dealer("m", "a</think>"), opening, list(islice(problems(MIX, 5), 1)), Sampling(n=2))  # type: ignore[arg-type]
    assert group[0].completion.text == "<think>a</think>y"


def test_shuffled_rewards_are_the_same_ones_elsewhere(tokenizer: Tokenizer) -> None:
    """The control: as many of each, in other places, the same places for the same seed."""
    stage = RlStage(name="rl", inputs={"model": "m"}, mix=MIX, steps=1, shuffle_rewards=True, **GIVEN)
    found = []
    for seed in (100, 100, 101):
        _, sampled = collect(stage, Dealer("mmmm----"), tokenizer, problems(MIX, 5), yes, seed)  # type: ignore[arg-type]
        found.append([r.reward for group in sampled[:4] for r in group])
    assert found[0] == found[1] != found[2]
    assert sorted(found[0]) == sorted(found[2]) == [0.0] * 8 + [1.0] * 4
    assert [1.0, 0.0, 0.0] * 4 not in found


def _rollout(tokens: int, finish: str = "stop", text: str = "") -> Rollout:
    problem = Problem(task="task", version="1", id="p", prompt="?", gold="y", difficulty=1, seed=0)
    return Rollout(problem, [1, 2, 3, 4, 5], Completion(text, list(range(tokens)), [-0.5] * tokens, finish))  # type: ignore[arg-type]


def test_rewards_are_summed_by_weight() -> None:
    group = [_rollout(3, text="<think>a</think>y"), _rollout(3, text="<think>a</think>n"), _rollout(3, text="n")]
    reward_groups([group], {"correct": 2.0, "format": 0.5}, yes)
    assert [r.reward for r in group] == [2.5, 0.5, 0.0]
    assert [r.rewards for r in group] == [{"correct": c, "format": f} for c, f in ((1, 1), (0, 1), (0, 0))]


def test_a_step_measured_by_hand() -> None:
    groups = [[_rollout(3), _rollout(5, "length")], [_rollout(2), _rollout(2)], [_rollout(4), _rollout(8)]]
    for group, rewards in zip(groups, ((1.0, 0.0), (1.0, 1.0), (0.0, 0.25)), strict=True):
        for rollout, reward in zip(group, rewards, strict=True):
            rollout.reward, rollout.rewards = reward, {"correct": reward / 2}
    assert measure(groups, kept=2) == pytest.approx({
        "reward": 3.25 / 6, "length": 24 / 6, "truncated": 1 / 6, "mixed_groups": 2 / 3, "sampled_groups": 3,
        "kept_groups": 2, "rollout_tokens": 3 * 5 + 24, "reward/correct": 3.25 / 12,
    })  # fmt: skip


def test_a_rollout_as_an_example() -> None:
    """Every sampled token is learned, the end among them, and nothing of the prompt; `own` of it are not shared."""
    rollout = _rollout(3)
    rollout.advantage = 0.7
    example = rollout_example(rollout)
    assert (list(example.ids), list(example.weight)) == ([1, 2, 3, 4, 5, 0, 1, 2], [0.0] * 5 + [1.0] * 3)
    assert (example.advantage, example.old, example.stem) == (0.7, [0.0] * 5 + [-0.5] * 3, 0)
    assert [rollout_example(rollout, own=own).stem for own in (1, 2, 9)] == [4, 3, 0]


def test_a_step_without_any_signal_goes_on_to_other_problems(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing is trained in it, its sampling is paid for, and the next step asks others."""
    asked: list[list[str]] = []
    turn, real = count(), rl.collect

    def sometimes(*arguments: Any) -> Any:
        groups, sampled = real(*arguments)
        asked.append([group[0].problem.id for group in sampled])
        return (groups if next(turn) else []), sampled

    monkeypatch.setattr(rl, "collect", sometimes)
    reward = str(Path(__file__).with_name("wish.py"))
    stage = RlStage(name="rl", inputs={"model": str(folder)}, mix=MIX, rewards={reward: 1.0}, steps=3, **GIVEN)
    run = run_recipe(Recipe(name="t", stages=(stage,)), tmp_path / "runs", quiet=True).runs["rl"]
    first, *later = run.metrics()
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert "loss" not in first and all("loss" in row for row in later)
    assert first["tokens"] == first["rollout_tokens"] > 0 and first["kept_groups"] == 0
    assert not set(asked[0]) & set(asked[1])


def test_sft_learns_the_answer_alone(tokenizer: Tokenizer) -> None:
    """Every token of the answer with its end, none of the question: told by where the text stands, not by the mask."""
    examples = textbook_examples(quickstart.LEARN, 0.5, 3, 40, tokenizer)
    for example, (problem, voice) in zip(examples, solved(quickstart.LEARN, 3, 0.5), strict=False):
        learnt = [token for token, weight in zip(example.ids, example.weight, strict=True) if weight]
        rest = [token for token, weight in zip(example.ids, example.weight, strict=True) if not weight]
        solution = problem.voices[voice]
        text = tokenizer.decode(learnt)
        assert set(example.weight) == {0.0, 1.0} and learnt[-1] == tokenizer.end
        assert text.endswith(f"{solution.answer}<|end|>") and solution.thinking in text
        assert problem.prompt in tokenizer.decode(rest) and problem.prompt not in text
        assert example.weight == sorted(example.weight)  # the question, then the answer
