"""Sample answers side by side: the same problem, before and after RL, teacher and student.

What a model wrote is untrusted text: it is escaped, cut when long, and never rendered. Which problems are shown is
decided by a rule that stands above them, not by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoestring.core.run import Run
from shoestring.report import words
from shoestring.report.results import read_answers
from shoestring.report.spec import ReportSpec
from shoestring.text.chat import split_thinking

LONG = 400  # characters of thinking that are folded away
Answers = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two evaluations side by side, and which problems are shown: one a family where (left right, right right) is
    `shown`, then one of any family where it is `also`."""

    title: str
    left: tuple[str, str | None]
    right: tuple[str, str | None]
    shown: tuple[bool, bool]
    also: tuple[bool | None, bool]
    rule: str


def pairs_of(spec: ReportSpec) -> tuple[Pair, Pair]:
    """Before | after, teacher | student."""
    chosen = spec.samples
    return (
        Pair(
            "Before and after reinforcement learning", ("before RL", chosen.before), ("after RL", chosen.after),
            (False, True), (None, False),
            "Chosen by rule: of each family the first problem that was answered wrong before and right after (where "
            "there is none, its first), and the first of all that is still wrong. First samples.",
        ),
        Pair(
            "Teacher and student", ("teacher", chosen.teacher), ("student", chosen.student),
            (True, True), (True, False),
            "Chosen by rule: of each family the first problem that both answer right (where there is none, its first), "
            "and the first of all that only the teacher does. First samples.",
        ),
    )  # fmt: skip


def samples_html(spec: ReportSpec, runs: Mapping[str, Run]) -> str:
    """Both pairs, where there are answers to show."""
    parts = []
    for pair in pairs_of(spec):
        left, right = read_answers(runs, pair.left[1]), read_answers(runs, pair.right[1])
        chosen = choose(left, right, pair)
        if chosen:
            shown = "".join(_problem(left[i], right[i], pair.left[0], pair.right[0]) for i in chosen)
            parts.append(f'<h3>{pair.title}</h3><p class="caption">{pair.rule}</p><div class="answers">{shown}</div>')
    return "".join(parts)


def choose(left: Answers, right: Answers, pair: Pair) -> list[str]:
    """Problem ids by the pair's rule; a family where nothing fits shows its first problem."""
    marks = {i: (bool(left[i]["right"][0]), bool(right[i]["right"][0])) for i in left if i in right}
    chosen: dict[str, None] = {}
    for task in dict.fromkeys(left[i]["task"] for i in marks):
        mine = [i for i in marks if left[i]["task"] == task]
        fitting = [i for i in mine if marks[i] == pair.shown]
        chosen[(fitting or mine)[0]] = None
    before, after = pair.also
    for i in [i for i, (a, b) in marks.items() if b == after and before in (None, a)][:1]:
        chosen[i] = None
    return list(chosen)


def _problem(left: dict[str, Any], right: dict[str, Any], left_name: str, right_name: str) -> str:
    kind = f"{left['task']} / {left['kind']}"
    return (
        f'<article class="problem"><header><span class="kind">{words.text(kind)}</span>'
        f'<p class="prompt">{words.text(left["prompt"])}</p>'
        f'<p class="gold"><span>gold</span> {words.text(left["gold"])}</p></header>'
        f'<div class="pair">{_answer(left, left_name)}{_answer(right, right_name)}</div></article>'
    )


def _answer(row: dict[str, Any], name: str) -> str:
    body, right, tokens = row["texts"][0], bool(row["right"][0]), row["tokens"][0]
    thinking, answer = split_thinking(body)
    mark = '<b class="yes">✓ right</b>' if right else '<b class="no">✗ wrong</b>'
    return (
        f'<section class="answer"><h4>{words.text(name)} {mark}<span class="count">{tokens} tokens</span></h4>'
        f"{_parts(body, thinking, answer)}</section>"
    )


def _parts(body: str, thinking: str | None, answer: str) -> str:
    if thinking is None:
        return f'<p class="said">{words.text(body) or "(nothing)"}</p><p class="caption">malformed: no credit</p>'
    said = f'<p class="said">{words.text(answer) or "(nothing)"}</p>'
    if not thinking:
        return f'<p class="thinking none">no thinking</p>{said}'
    opened = "" if len(thinking) > LONG else " open"
    return f'<details class="thinking"{opened}><summary>thinking</summary><p>{words.text(thinking)}</p></details>{said}'
