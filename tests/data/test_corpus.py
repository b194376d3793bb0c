"""The textbook and the token stream: functions of seed and step, made once, read in every order once an epoch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from shoestring.core.errors import UserError
from shoestring.data.corpus import documents_of, file_documents, make_stream, rows
from shoestring.data.textbook import problems, solved
from shoestring.train.configs import TaskMix

MIX = (TaskMix(task="questions", difficulty=(1, 3)), TaskMix(task="logic", difficulty=(2, 4), weight=3.0))


def test_problem_i_depends_on_seed_and_i_only() -> None:
    whole = list(islice(problems(MIX, 5), 20))
    assert list(islice(problems(MIX, 5, start=12), 8)) == whole[12:]
    assert list(islice(problems(MIX, 6), 20)) != whole
    assert {p.task for p in whole} == {"questions", "logic"}
    assert sum(p.task == "logic" for p in islice(problems(MIX, 1), 400)) == pytest.approx(300, abs=45)


def test_voices_come_at_their_rate_wherever_the_reading_starts() -> None:
    whole = list(islice(solved(MIX, 3, 0.3), 600))
    assert list(islice(solved(MIX, 3, 0.3, start=500), 100)) == whole[500:]
    assert sum(voice == "long" for _, voice in whole) == pytest.approx(180, abs=45)


def test_a_stream_is_made_once(tmp_path: Path) -> None:
    documents = [[1, 2, 0], [3, 0], [4, 5, 6, 0]]
    first = make_stream(tmp_path, {"corpus": "x"}, iter(documents), 8)
    assert first.tolist() == [1, 2, 0, 3, 0, 4, 5, 6]
    assert make_stream(tmp_path, {"corpus": "x"}, iter([]), 8).tolist() == first.tolist()
    assert documents_of(first, 0).tolist() == [[0, 3], [3, 5]]  # the cut one is left out


def test_every_row_is_read_once_an_epoch_in_a_new_order() -> None:
    stream = np.arange(60, dtype=np.int32)
    read = [rows(stream, step, rows_per_step=4, row_tokens=5, seed=1) for step in range(6)]
    first, second = np.concatenate(read[:3]), np.concatenate(read[3:])
    assert sorted(first[:, 0]) == sorted(second[:, 0]) == list(range(0, 60, 5))
    assert first.tolist() != second.tolist()
    again = rows(stream, 4, rows_per_step=4, row_tokens=5, seed=1)
    assert (again == read[4]).all()


def test_bad_corpora_are_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list(file_documents((str(tmp_path / "none.txt"),)))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txet": 1}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        list(file_documents((str(bad),)))
    with pytest.raises(UserError, match="holds no text"):
        make_stream(tmp_path, {"corpus": "empty"}, iter([]), 8)
    with pytest.raises(UserError, match="less than one row"):
        rows(np.arange(3, dtype=np.int32), 0, rows_per_step=1, row_tokens=5, seed=0)
