r"""Word problems in GSM8K's format: a jsonl of question and answer, graded with math-verify.

Each line is {"question": ..., "answer": "worked steps with <<3*4=12>> notes #### 12"}. The kind "sample" is a few
dozen problems written for this package; any other kind is the path of such a file. Difficulty is the largest number
of noted steps a problem may have. Files are split by content like every other task; `read` gives a file whole, for
data sets that come with a split of their own.

An answer is one value: `12`, `$1,200`, `12 apples`, `3/4`, `\boxed{12}`, `#### 12`, `The answer is 12.` Anything with
a second number, a word that makes another number of it (`12 million`) or more text is no answer. Left out: choosing one
of several values in prose, as lenient graders do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import cache, lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem
from shoestring.tasks._aside import Aside, Late
from shoestring.tasks._draw import Draft, Split, draw, finish

VERSION = "1.1"
KINDS = ("sample",)
SAMPLE = Path(__file__).with_name("gsm8k_sample.jsonl")
SECONDS = 5.0  # one comparison by math-verify takes about a millisecond; late is wrong
MAX_ANSWER = 200  # characters

PLAIN = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?", re.ASCII)
VALUE = re.compile(
    r"(?P<value>[-+]?\s?[$]?[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?|[-+]?\\d?frac\{\d+\}\{\d+\})"
    r"\s*(?:\\?%|(?P<unit>[A-Za-z]+(?: [A-Za-z]+){0,2})?)\.?",
    re.ASCII,
)
LEAD = re.compile(r"(?:#### |(?:the )?(?:final )?answer(?: is:|:| is))\s*", re.IGNORECASE)
UNDECIDED = {"or", "and", "not", "to", "than", "no", "is", "isn", "wrong"}
OTHER = {  # words that make another number of the one before them
    *("hundred", "thousand", "million", "billion", "trillion", "dozen", "score", "k", "mn", "bn", "mln", "point"),
    *("half", "halves", "third", "thirds", "quarter", "quarters", "tenth", "tenths", "hundredth", "hundredths"),
    *("plus", "minus", "times", "negative", "squared", "cubed", "factorial", "divided", "multiplied", "doubled"),
}


def make(seed: int, difficulty: int, split: Split = "train", kind: str | None = None) -> Problem:
    """The problem of `seed` among those of at most `difficulty` steps; raises UserError for an unreadable file."""
    chosen = "sample" if kind is None else kind
    return draw("gsm8k", VERSION, {chosen: partial(_pick, chosen)}, seed, difficulty, split, chosen)


def read(path: str | Path) -> list[Problem]:
    """Every problem of a GSM8K-format file, in order. Raises UserError where a line is not in the format."""
    drafts = _drafts(str(path), _stamp(path))
    return [finish("gsm8k", VERSION, draft, steps, seed) for seed, (draft, steps) in enumerate(drafts)]


def grade(problems: Sequence[Problem], answers: Sequence[str], *, sandbox: Any = None) -> list[bool]:
    """True where the answer is one value and equal to the gold. Raises UserError where math-verify is not installed
    and a comparison needs it: plain numbers do not."""
    return [_right(problem, answer) for problem, answer in zip(problems, answers, strict=True)]


def _right(problem: Problem, answer: object) -> bool:
    if not isinstance(answer, str) or len(answer) > MAX_ANSWER or answer.strip() == problem.prompt:
        return False
    value, gold = _value(answer, numeric=_is_number(problem.gold)), problem.gold.replace("$", "")
    if value is None:
        return answer.strip() == problem.gold
    if _is_plain(gold) and _is_plain(value):
        return Decimal(gold.replace(",", "")) == Decimal(value.replace(",", ""))
    try:
        return bool(_judge(os.getpid())(gold, value, seconds=SECONDS))
    except (Late, ValueError):  # too hard to compare, or not mathematics
        return False


def _value(answer: str, numeric: bool) -> str | None:
    """The one value an answer states, or None."""
    text = answer.strip()
    if text.count("\\boxed") == 1:
        text = _boxed(text)
    text = LEAD.sub("", text, count=1) if LEAD.match(text) else text
    text = text.strip("*").strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    if not numeric:
        return text if text and text.isascii() and "\\boxed" not in text and _balanced(text) else None
    match = VALUE.fullmatch(text)
    words = re.findall("[a-z]+", text.lower())
    if match is None or (UNDECIDED | OTHER).intersection(words):
        return None
    return match["value"].replace("$", "").replace(" ", "")


def _boxed(text: str) -> str:
    """What stands in the only box; "" for one that is never closed."""
    start = text.index("\\boxed") + len("\\boxed")
    inside = text[start:].lstrip()
    depth = 0
    for index, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return inside[1:index].strip()
    return ""


def _balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth < 0:
            return False
    return depth == 0


def _is_plain(text: str) -> bool:
    return PLAIN.fullmatch(text) is not None and any(letter.isdigit() for letter in text)


def _is_number(gold: str) -> bool:
    return VALUE.fullmatch(gold) is not None


@cache
def _judge(owner: int) -> Aside:
    """One process aside for each process that grades: a fork must not share its parent's pipes."""
    return Aside("shoestring.tasks._math:equal")


def _pick(kind: str, rng: Random, difficulty: int) -> Draft:
    path = str(SAMPLE) if kind == "sample" else kind
    drafts = [draft for draft, steps in _drafts(path, _stamp(path)) if steps <= difficulty]
    if not drafts:
        raise UserError(f"{path} has no problem of at most {difficulty} step(s); raise difficulty.")
    draft = rng.choice(drafts)
    return Draft(draft.prompt, draft.gold, draft.steps, dict(draft.meta))


def _stamp(path: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"gsm8k cannot read {path}: {error.strerror}; give the path of a jsonl file.") from error
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=8)
def _drafts(path: str, stamp: tuple[int, int]) -> list[tuple[Draft, int]]:
    """Each problem of the file with its number of noted steps. `stamp` makes a changed file another one."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of lines
    return [_draft(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _draft(path: str, number: int, line: str) -> tuple[Draft, int]:
    try:
        row = json.loads(line)
        question, (steps, gold) = row["question"].strip(), row["answer"].rsplit("####", 1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"question": ..., "answer": "... #### 12"}'
        raise UserError(f"{path} line {number} is not in GSM8K's format; each line is {form}.") from error
    kind = "sample" if path == str(SAMPLE) else Path(path).stem
    plain = re.sub(r"<<[^>]*>>", "", steps).strip()
    return Draft(question, gold.strip(), plain, {"kind": kind}), max(1, steps.count("<<"))
