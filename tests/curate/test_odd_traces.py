"""Traces as strangers leave them, through every filter; and what a filter counts, counted by other means."""

from __future__ import annotations

import json
import random
import unicodedata
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shoestring.core.atomic import DiskFull
from shoestring.core.nouns import Trace
from shoestring.core.registry import list_parts, load_part
from shoestring.curate._contract import example
from shoestring.curate._sieve import Filter, run
from shoestring.data.store import Store
from shoestring.data.traces import TraceStore

FILTERS = [name for name in list_parts("curate") if name != "decontaminate"]
TEXTS = [
    "", " \n\t", "\0", "\ud800 half a character", "🙂" * 50, "a" * 200_000, "\\boxed{" * 5_000, "{" * 50_000,
    "1," * 30_000,    "é" * 1000, "e\u0301" * 1000, "ﷺ" * 1000, "\u202egnp.exe", "नमस्ते दुनिया " * 40, "สวัสดีชาวโลก" * 40,
    "你好世界" * 60,
    "السلام عليكم " * 40, "<think>" * 300, "-", "nan", "inf", "1e999", "٣٤٥", "½ ² ①",
    "no\x85line\u2028ends", "\r\n" * 500,
]  # fmt: skip
MESSAGES: list[list[dict[str, Any]]] = [
    [], [{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, "x", None, {"text": None}]}],
    [{"role": "system", "content": "s"}, {"role": "assistant", "content": "x", "tool_calls": [{"a": 1}]}],
    [{"role": "user", "content": 17}], [{"role": "user", "content": {"text": "x"}}],
]  # fmt: skip


def reasons(name: str, given: list[Trace], **options: Any) -> list[str]:
    module: ModuleType = load_part("curate", name)
    return list(module.judge(given, **options))


def odd() -> list[Trace]:
    found = [example(id=f"t{i}", answer=text, thinking=None) for i, text in enumerate(TEXTS)]
    found += [example(id=f"h{i}", answer="1", thinking=text) for i, text in enumerate(TEXTS)]
    found += [example(id=f"q{i}", messages=[{"role": "user", "content": text}]) for i, text in enumerate(TEXTS)]
    found += [example(id=f"m{i}", messages=messages) for i, messages in enumerate(MESSAGES)]
    found += [example(id=f"d{i}", correct=None, task=None, usage=usage) for i, usage in enumerate([{}, {"x": 1}])]
    return found


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_takes_anything(name: str) -> None:
    found = reasons(name, odd())
    assert len(found) == len(odd()) and all(isinstance(why, str) and "\n" not in why for why in found)
    assert reasons(name, odd()) == found


def test_decontamination_takes_anything(tmp_path: Path) -> None:
    path = tmp_path / "eval.txt"
    path.write_text("\n".join(text for text in TEXTS if text.strip() and "\ud800" not in text), encoding="utf-8")
    found = reasons("decontaminate", odd(), against=str(path))
    assert len(found) == len(odd()) and Counter(found)[""] > 5 and Counter(found)["in an evaluation set"] > 20


def disguised(text: str) -> dict[str, str]:
    """The same words to whoever reads them."""
    wide = {c: chr(ord(c) + 0xFEE0) for c in map(chr, range(0x21, 0x7F))}
    return {
        "accents apart": unicodedata.normalize("NFD", text), "full width": "".join(wide.get(c, c) for c in text),
        "capitals": text.upper(), "invisible": "\u200b".join(text), "soft hyphens": text.replace("e", "e\u00ad"),
        "other spaces": text.replace(" ", "\u00a0\u2003"), "other marks": text.replace(" ", " — ").replace("'", "’"),
        "ligatures": text.replace("fi", "ﬁ"), "line ends": text.replace(" ", "\r\n"), "a mark": "\ufeff" + text,
    }  # fmt: skip


QUESTION = (
    "Élodie finds fifty-five café tables in the Straße, sells a third of them and gives her niece five: how many?"
)


@pytest.mark.parametrize("way", list(disguised("")))
def test_a_question_of_the_test_is_found_however_it_is_encoded(tmp_path: Path, way: str) -> None:
    path = tmp_path / "eval.jsonl"
    hidden = disguised(QUESTION)[way]
    other = example(messages=[{"role": "user", "content": "what is the way to the station"}], answer="1", thinking=None)
    for one, two in ((QUESTION, hidden), (hidden, QUESTION)):
        path.write_text(json.dumps({"question": one}) + "\n")
        asked = example(messages=[{"role": "user", "content": two}], answer="1", thinking=None)
        answered = example(messages=[{"role": "user", "content": "?"}], answer=f"I was asked: {two}", thinking=None)
        found = reasons("decontaminate", [asked, answered, other], against=str(path))
        assert found == ["in an evaluation set", "in an evaluation set", ""]


def test_near_repeats_however_they_are_encoded() -> None:
    pytest.importorskip("rensa")
    given = [example(id="0", thinking=None, answer=QUESTION, messages=[])]
    given += [example(id=way, thinking=None, answer=text, messages=[]) for way, text in disguised(QUESTION).items()]
    assert reasons("near_duplicates", given) == [""] + ["near repeat"] * (len(given) - 1)


def test_near_duplicates_at_scale_against_a_plain_count() -> None:
    """20,000 texts with 1,500 planted repeats of known similarity, over five scripts: what is found is what sets of
    runs of words say, computed here pair by pair with the original and never with hashes."""
    pytest.importorskip("rensa")
    draw = random.Random(3)
    scripts = ["abcdefghijklmnop", "абвгдежзийклмноп", "αβγδεζηθικλμνξοπ", "אבגדהוזחטיכלמנסע", "ابتثجحخدذرزسشصضط"]
    vocabulary = [["".join(draw.choices(letters, k=6)) for _ in range(4000)] for letters in scripts]
    texts: list[list[str]] = [draw.choices(vocabulary[i % 5], k=draw.randrange(30, 90)) for i in range(18_500)]
    planted: dict[int, float] = {}
    for _ in range(1_500):
        original = draw.choice(texts[:18_500])
        share = draw.choice([0.0, 0.01, 0.03, 0.1, 0.3])
        changed = [draw.choice(vocabulary[0]) if draw.random() < share else word for word in original]
        one, two = (set(zip(*(ws[i : len(ws) - 4 + i] for i in range(5)), strict=True)) for ws in (original, changed))
        planted[len(texts)] = len(one & two) / len(one | two)
        texts.append(changed)
    given = [example(id=str(i), thinking=None, answer=" ".join(words), messages=[]) for i, words in enumerate(texts)]
    found = reasons("near_duplicates", given)
    dropped = {i for i, why in enumerate(found) if why}
    sure = {i for i, similarity in planted.items() if similarity >= 0.8}
    never = {i for i in range(18_500)} | {i for i, similarity in planted.items() if similarity < 0.55}
    assert len(sure) > 600 and len(never) > 18_600
    assert len(sure & dropped) >= 0.99 * len(sure) and not never & dropped


def test_the_funnel_adds_up_against_a_count_by_hand() -> None:
    """Each filter of its own, on 3,000 drawn traces, against the sentence that describes it."""
    draw = random.Random(8)
    finishes = ["stop", "stop", "stop", "length", "content_filter"]
    given = [
        example(
            id=f"t{i}", answer=draw.choice(["so \\boxed{4}", "It is 5.", "", "4.0", "6"]), thinking=None,
            finish_reason=draw.choice(finishes), correct=draw.choice([True, False, None]),
            messages=[{"role": "user", "content": f"question {i % 400}"}], task=draw.choice(["a", "b", None]),
            usage={"completion_tokens": draw.randrange(1, 500)},
        )
        for i in range(3000)
    ]  # fmt: skip
    asked = [trace.messages[0]["content"] for trace in given]
    ended = [t.finish_reason == "stop" for t in given]
    spoke = [e and t.answer != "" for e, t in zip(ended, given, strict=True)]
    right_ones = [e and t.correct is True for e, t in zip(ended, given, strict=True)]
    assert [not why for why in reasons("finished", given)] == spoke
    assert [not why for why in reasons("correct", given)] == right_ones
    seen: set[tuple[str, str]] = set()
    first = []
    for both in zip(asked, (t.answer for t in given), strict=True):
        first.append(both not in seen)
        seen.add(both)
    assert [not why for why in reasons("dedup", given)] == first
    right = Counter(q for q, t in zip(asked, given, strict=True) if t.correct)
    graded = Counter(q for q, t in zip(asked, given, strict=True) if t.correct is not None)
    in_band = [not graded[q] or 0.25 <= right[q] / graded[q] <= 0.75 for q in asked]
    assert [not why for why in reasons("difficulty", given, lowest=0.25, highest=0.75)] == in_band
    most = Counter(t.task for t, why in zip(given, reasons("balance", given, most=300), strict=True) if not why)
    assert most == {"a": 300, "b": 300, None: 300}
    kept = [
        t for t, why in zip(given, reasons("length", given, policy="short", per_question=2), strict=True) if not why
    ]
    by_question: dict[str, list[int]] = {}
    for q, t in zip(asked, given, strict=True):
        by_question.setdefault(q, []).append(t.usage["completion_tokens"])
    wanted = sum(sum(sorted(lengths)[:2]) for lengths in by_question.values())
    assert len(kept) == 2 * len(by_question) and sum(t.usage["completion_tokens"] for t in kept) == wanted
    said = {"so \\boxed{4}": "4", "It is 5.": "5", "": "", "4.0": "4", "6": "6"}
    votes: dict[str, Counter[str]] = {}
    for q, t in zip(asked, given, strict=True):
        votes.setdefault(q, Counter())[said[t.answer]] += 1
    for q, t, why in zip(asked, given, reasons("majority", given), strict=True):
        number = max(votes[q].values())
        if votes[q].total() < 3 or number < votes[q].total() / 2:
            assert why
        else:
            assert not why or votes[q][said[t.answer]] <= number


@pytest.mark.parametrize("room", range(6))
def test_a_disk_that_fills_while_marks_are_written(tmp_path: Path, room: int) -> None:
    """Wherever it happens it is one sentence, and afterwards the same chain comes to the same end."""
    names = ["finished", "dedup", "correct"]
    given = [example(id=f"t{i}", answer=f"{i % 900}" if i % 5 else "") for i in range(2000)]
    ends = []
    for folder, cramped in ((tmp_path / "a", False), (tmp_path / "b", True)):
        TraceStore(folder).append(given)
        store = Store(folder)
        if cramped:
            pages = store.base.execute("PRAGMA page_count").fetchone()[0]
            store.base.execute(f"PRAGMA max_page_count = {pages + room}")
            with pytest.raises(DiskFull, match="No space left"):
                run(store, [Filter(name) for name in names])
            store.base.execute("PRAGMA max_page_count = 1000000")
        steps, view = run(store, [Filter(name) for name in names])
        ends.append(([step.to_json() for step in steps], [trace.id for trace in view]))
        store.close()
    assert ends[0] == ends[1] and len(ends[0][1]) > 500
