"""GSM8K-format files: reading, splitting, and one value as the answer, compared by math-verify."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from shoestring.core.errors import UserError
from shoestring.tasks import gsm8k
from shoestring.tasks._aside import Late

RIGHT = [
    ("12", "12"), ("12", "12.0"), ("12", "$12"), ("12", "$12$"), ("12", " 12.\n"), ("12", "12 apples"), ("12", "12%"),
    ("12", "12 red apples"), ("12", r"\boxed{12}"), ("12", r"So it is \boxed{12}."),
    ("12", "The answer is 12."),
    ("12", "Answer: 12"), ("12", "**12**"), ("12", "+12"), ("1/2", "0.5"), ("0.5", r"\frac{1}{2}"), ("0.5", "1/2"),
    ("1000", "1,000"), ("1,050", "1050"), ("1/3", ".333333"), ("7.20", "7.2"), ("7.20", "$7.20"), ("-7", "-7"),
    ("x^2+1", "1+x^2"), (r"\frac{3}{4}", "0.75"), ("(1,2)", "(1,2)"), ("A", "A"), ("$15", "15"), ("-3", "-3.0"),
    ("12", "#### 12"), ("12", "the final answer is: 12."), ("12", "12 more"), ("2 dozen", "2 dozen"),
]  # fmt: skip
WRONG = [
    ("12", "112"), ("12", "121"), ("12", "12 13"), ("12", "13 12"), ("12", "12 or 13"), ("12", "12, 13"), ("12", "-12"),
    ("12", "not 12"), ("12", "12 or thirteen"), ("12", "12.0000001"), ("12", r"\boxed{12} \boxed{13}"), ("12", "5+7"),
    ("12", r"\boxed{12"), ("12", r"\boxed{5+7}"), ("12", "1,2"), ("12", "１２"), ("12", "١٢"), ("12", "x=12"),
    ("12", ""), ("12", "\\boxed{}"), ("12", "nan"), ("12", "inf"), ("12", "twelve"), ("12", "9**9**9**9"),
    ("12", "1" * 10**5),
    ("12", "12" + " " * 10**5 + "13"), ("12", "She had 5 and 7 so 12"), ("1/3", ".333"), ("x^2+1", "x^2"),
    ("12", "12\n\n12"),
    ("(1,2)", "(1,3)"), ("A", "B"), ("12", "12/0"), ("12", "\0" + "12"), ("12", "0 1 2 3 4 5 6 7 8 9"),
    ("12", "12 million"), ("12", "12k"), ("12", "$12 billion"), ("12", "12 hundred"), ("12", "12 dozen"),
    ("12", "12 squared"), ("12", "12 minus one"), ("12", "12 negative"), ("12", "12 is wrong"), ("12", "12 halves"),
    ("12", "#### 13 #### 12"), ("12", "12 factorial"), ("12", "12 point five"),
]  # fmt: skip


def grade(gold: str, answer: str) -> bool:
    return gsm8k.grade([replace(gsm8k.make(0, 4), gold=gold)], [answer])[0]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_one_value_is_right(gold: str, answer: str) -> None:
    assert grade(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), WRONG, ids=range(len(WRONG)))
def test_anything_else_is_wrong(gold: str, answer: str) -> None:
    assert not grade(gold, answer)


def test_works_outside_the_main_thread() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.extend([grade("0.5", "1/2"), grade("0.5", "1/3")]))
    thread.start()
    thread.join()
    assert found == [True, False]


def test_a_late_comparison_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object, seconds: float) -> bool:
        raise Late

    monkeypatch.setattr(gsm8k, "_judge", lambda owner: late)
    assert not grade("0.5", "1/2") and grade("0.5", "0.50")


def test_the_sample_is_worked_correctly() -> None:
    problems = gsm8k.read(gsm8k.SAMPLE)
    assert len(problems) == len({problem.id for problem in problems}) == 36
    for line in gsm8k.SAMPLE.read_text().splitlines():
        notes = re.findall(r"<<([^=]*)=([^>]*)>>(\S+)", json.loads(line)["answer"])
        for expression, value, text in notes:
            assert re.fullmatch(r"[\d+*/.-]+", expression) and text.startswith(value)
            exact = eval(re.sub(r"\d+(\.\d+)?", lambda number: f"Fraction('{number[0]}')", expression))
            assert exact == Fraction(value)
        assert Fraction(notes[-1][1]) == Fraction(json.loads(line)["answer"].split("#### ")[1].replace(",", ""))


def test_make_draws_by_steps_and_split() -> None:
    for difficulty in (1, 2, 4):
        sides = [{gsm8k.make(seed, difficulty, split).id for seed in range(100)} for split in ("train", "test")]  # type: ignore[arg-type]
        assert all(sides) and not sides[0] & sides[1]
    problem = gsm8k.make(3, 4)
    assert problem == gsm8k.make(3, 4) and "<<" not in problem.voices["long"].thinking
    assert problem.voices["long"].answer == problem.gold


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{n} + 1?", "answer": f"so {n + 1}\n#### {n + 1}"}) + "\n" for n in range(40))
    )
    problems = gsm8k.read(path)
    assert [problem.gold for problem in problems] == [str(n + 1) for n in range(40)]
    assert problems[0].meta["kind"] == "own" and gsm8k.make(1, 1, "test", str(path)).gold in {p.gold for p in problems}
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(UserError, match=r"own\.jsonl line 1 is not in GSM8K's format"):
        gsm8k.read(path)
    with pytest.raises(UserError, match="cannot read"):
        gsm8k.make(0, 1, kind=str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="raise difficulty"):
        gsm8k.make(0, 1, "test", str(_only_hard(tmp_path)))


def _only_hard(folder: Path) -> Path:
    path = folder / "hard.jsonl"
    path.write_text(json.dumps({"question": "?", "answer": "<<1+1=2>>2 <<2+1=3>>3 #### 3"}) + "\n")
    return path
