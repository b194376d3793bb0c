"""What a step of RL trains on: groups that carry signal, replaced while there are rounds; SFT only on answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from shoestring.core.nouns import Completion, Problem, Sampling
from shoestring.data.textbook import problems, solved
from shoestring.recipes import quickstart
from shoestring.road import run_recipe
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import rl
from shoestring.train.configs import Decoding, Optim, Recipe, RlStage, TaskMix
from shoestring.train.examples import textbook_examples
from shoestring.train.rollouts import collect

MIX = (TaskMix(task="questions", kinds=("sum",), difficulty=(2, 4)),)
GIVEN: dict[str, Any] = {
    "problems_per_step": 4, "group_size": 3, "decoding": Decoding(max_new_tokens=4), "optim": Optim(lr=1e-3),
    "preflight_problems": 0, "compute": quickstart.COMPUTE,
}  # fmt: skip


class Dealer:
    """A generator whose groups are all right, all wrong or mixed, as they are dealt; it notes what it was asked."""

    def __init__(self, hands: str):
        self.hands, self.rounds, self.seeds = iter(hands), list[int](), list[int]()

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[Completion]]:
        self.rounds.append(len(prompts))
        self.seeds.append(sampling.seed or 0)
        return [self._group(next(self.hands), sampling.n) for _ in prompts]

    @staticmethod
    def _group(hand: str, size: int) -> list[Completion]:
        right = {"+": size, "-": 0, "m": 1}[hand]
        return [Completion("<think>a</think>" + "yn"[i >= right], [7, i], [-1.0, -1.0], "stop") for i in range(size)]


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
