"""The contract of rewards sees what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.core.registry import load_part
from shoestring.rewards import _contract

HEAD = '"""A reward."""\nimport random\nfrom shoestring.text.chat import split_thinking\n'
SOUND = HEAD + (
    "RANGE, JUDGES_CORRECTNESS = (0.0, 1.0), True\n"
    "def reward(rollouts, *, grade):\n    return [score(r, grade) for r in rollouts]\n"
    "def score(r, grade):\n"
    "    if not isinstance(r.completion.text, str) or r.completion.finish_reason != 'stop': return 0.0\n"
    "    return float(grade([(r.problem, split_thinking(r.completion.text)[1])])[0])\n"
)
SPLIT = "split_thinking(r.completion.text)[1]"
BROKEN = {
    "whole text": ((SPLIT, "r.completion.text"), "not its maximum"),
    "last word": (
        (SPLIT, "(r.completion.text.replace('>', ' ').split() or [''])[-1]"),
        "for several answers, wrong first",
    ),
    "after the tag": ((SPLIT, "r.completion.text.split('</think>')[-1].strip()"), "for a closing tag alone"),
    "gold anywhere": (("float(grade", "float(r.problem.gold in r.completion.text) or float(grade"), "only inside the"),
    "cut off": ((" or r.completion.finish_reason != 'stop'", ""), "for a cut-off answer"),
    "out of range": (("return 0.0", "return -1.0"), "outside its RANGE"),
    "not a number": (("return 0.0", "return float('nan')"), "outside its RANGE"),
    "raises": (("not isinstance(r.completion.text, str) or", ""), "it fails on no text (AttributeError"),
    "random": (("return 0.0", "return random.random()"), "it has to repeat"),
    "too few": (("for r in rollouts]", "for r in rollouts[:1]]"), "one number for each rollout"),
    "no range": (("(0.0, 1.0), True", "(0.0, 0.0), True"), "RANGE is missing"),
    "no claim": (("(0.0, 1.0), True", "(0.0, 1.0), 1"), "JUDGES_CORRECTNESS is missing"),
    "no docstring": (('"""A reward."""', ""), "no docstring"),
    "no reward": (("def reward", "def score_all"), "reward is missing"),
}


def check(path: Path, source: str) -> list[str]:
    path.write_text(source)
    return _contract.check(load_part("rewards", str(path)), path)


def test_a_sound_reward_passes(tmp_path: Path) -> None:
    assert check(tmp_path / "own.py", SOUND) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_breach_is_named(tmp_path: Path, name: str) -> None:
    (old, new), sentence = BROKEN[name]
    assert old in SOUND
    failures = check(tmp_path / "own.py", SOUND.replace(old, new))
    assert any(sentence in failure for failure in failures), failures
