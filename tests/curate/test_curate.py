"""The filters, and that the contract catches filters that break it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.core.parts import check
from shoestring.curate import correct, dedup
from shoestring.curate._contract import example, traces


def test_correct_keeps_what_is_verified_and_finished() -> None:
    assert [trace.id for trace in correct.keep(traces())] == ["a0", "a4", "a5", "a6"]
    assert correct.keep([example(finish_reason="length")]) == []


def test_dedup_keeps_the_first_of_equal_answers() -> None:
    same = [example(), example(id="b", date="2027-01-01T00:00:00+00:00"), example(id="c", thinking=None)]
    other = example(id="d", messages=[{"role": "user", "content": "3 + 9 ?"}])
    assert [trace.id for trace in dedup.keep([*same, other])] == ["a0", "c", "d"]


@pytest.mark.parametrize(
    ("body", "breach"),
    [
        ("", "keep"),
        ("def keep(traces): return traces[0]", "raises IndexError|must return a list"),
        ("def keep(traces): return list(traces) * 2", "at most once"),
        ("def keep(traces): return list(traces)[::-1]", "in order"),
        ("import copy\ndef keep(traces): return copy.deepcopy(list(traces))", "it was given"),
        ("def keep(traces):\n    for t in traces: t.answer = ''\n    return list(traces)", "alters"),
        (
            "calls = []\ndef keep(traces):\n    calls.append(1)\n    return list(traces)[: len(calls) % 2]",
            "differently",
        ),
        ("def keep(traces): return [t for t in traces if len(t.thinking) > 3]", "raises TypeError"),
    ],
)
def test_the_contract_catches(tmp_path: Path, body: str, breach: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f'"""A filter."""\n{body}\n')
    failures = check("curate", file)
    assert failures
    assert any(word in " ".join(failures) for word in breach.split("|"))
