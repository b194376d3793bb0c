"""Questions from a data set of `datasets`, and the data card with its plots."""

from __future__ import annotations

import gzip
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.core.errors import UserError
from shoestring.curate._contract import example
from shoestring.data.card import write_card
from shoestring.data.questions import source_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set as `datasets` reads it from a folder: a file a split."""
    pytest.importorskip("datasets")
    rows = [{"question": f"What is {i} + 1?", "answer": f"it is #### {i + 1}", "extra": i} for i in range(5)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "set" / "test.jsonl").write_text(json.dumps(rows[0] | {"question": "What is left?"}) + "\n")
    return tmp_path / "set"


def test_questions_of_a_data_set(folder: Path) -> None:
    source, identity = source_of(f"hf:{folder}", system="Be brief.", count=3)
    asked = list(source())
    assert [one.messages[1]["content"] for one in asked] == [f"What is {i} + 1?" for i in range(3)]
    assert asked[0].messages[0] == {"role": "system", "content": "Be brief."}
    assert asked[1].problem is not None and asked[1].problem["gold"] == "2" and asked[1].problem["task"] == "gsm8k"
    assert [one.messages for one in source()] == [one.messages for one in asked]  # begins anew
    source, other = source_of(f"hf:{folder}:test")
    assert [one.messages[0]["content"] for one in source()] == ["What is left?"] and other != identity
    source, _ = source_of(f"hf:{folder}:train:answer", count=1)
    assert next(source()).messages[0]["content"] == "it is #### 1"


def test_a_data_set_without_questions_or_that_is_not_there(folder: Path) -> None:
    for name, told in (
        (f"hf:{folder}:train:nosuch", 'no column "nosuch"'), (f"hf:{folder}:nosuch", "cannot be read"),
        (f"hf:{folder}x", "cannot be read"),
    ):  # fmt: skip
        source, _ = source_of(name)
        with pytest.raises(UserError, match=told):
            list(source())
    (folder / "train.jsonl").write_text('{"left": 1}\n')
    with pytest.raises(UserError, match="row 1 has no messages, question or prompt"):
        list(source_of(f"hf:{folder}")[0]())


def test_a_card_with_its_plots(tmp_path: Path) -> None:
    traces = [
        replace(example(id=f"{i}"), usage={"prompt_tokens": 5, "completion_tokens": 2**i}, cost_usd=i / 1000,
                date=f"2026-01-0{1 + i % 3}T00:00:00+00:00") for i in range(9)
    ]  # fmt: skip
    funnel = [
        {"filter": "finished", "options": {}, "seen": 12, "kept": 10, "dropped": {"cut off": 2}},
        {"filter": "dedup", "options": {}, "seen": 10, "kept": 9, "dropped": {"repeat": 1}},
    ]
    text = write_card(traces, tmp_path / "CARD.md", funnel=funnel).read_text()
    for name, counts in (("tokens", [1, 0] * 8 + [1]), ("days", [3, 3, 3]), ("funnel", [12, 10, 9])):
        assert f"(CARD.{name}.svg)" in text
        root = ElementTree.parse(tmp_path / f"CARD.{name}.svg").getroot()
        bars = [one for one in root.iter("{http://www.w3.org/2000/svg}title") if ": " in (one.text or "")]
        assert [int(one.text.rpartition(": ")[2]) for one in bars if one.text] == counts
    assert (tmp_path / "CARD.dollars.svg").is_file()
    assert "Plots" not in write_card([], tmp_path / "EMPTY.md").read_text()


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jsonl", b'{"question": "\\ud800"}', "line 1 holds half a character"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x", "n": NaN}]}', "line 1 holds a number that cannot"),
        ("a.jsonl", b'{"question": "a"}\n{"x":' + b"[" * 100_000, "line 2 is nested too deeply"),
        ("a.jsonl", b'{"question": "a", "system": 5}', "line 1 has a system prompt that is no text"),
        ("a.jsonl", b'{"question": "a", "gold": 1, "task": 5}', "line 1 names its task by 5"),
        ("a.jsonl", b'{"question": "a", "gold": 1, "task": "CODE.py"}', "line 1 names its task by"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "a"}\n' * 3000)[:-20], "cannot be read beyond line"),
        ("a.jsonl.gz", b"no archive", "cannot be read beyond line 0"),
    ],
    ids=["surrogate", "nan", "deep", "system", "task", "code", "torn archive", "no archive"],
)
def test_files_of_questions_in_odd_forms(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    """One sentence with the line; a file of data that names a file of code does not get it run."""
    code = tmp_path / "code.py"
    code.write_text(f"raise SystemExit({str(tmp_path)!r})")
    file = tmp_path / name
    file.write_bytes(data.replace(b"CODE.py", str(code).encode()))
    with pytest.raises(UserError, match=sentence):
        list(source_of(str(file))[0]())


def test_a_byte_order_mark_is_no_part_of_a_question(tmp_path: Path) -> None:
    for name, line in (("a.txt", "a?"), ("a.jsonl", '{"question": "a?"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line.replace('a?', 'b')}".encode())
        found = list(source_of(str(tmp_path / name))[0]())
        assert [one.messages[0]["content"] for one in found] == ["a?", "b"]
