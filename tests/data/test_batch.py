"""Packing and the shifts: nothing is lost, nothing leaks between examples, the targets are the next tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.core.errors import UserError
from shoestring.data.batch import PADDING, Example, pack, packed_batches, stream_batch, total_weight


@given(st.lists(st.integers(1, 30), max_size=60))
def test_every_example_is_in_exactly_one_row_and_rows_are_not_over_full(lengths: list[int]) -> None:
    rows = pack(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 32 for row in rows)
    # best fit decreasing: no two rows could have been one
    free = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(free) < 2 or free[0] + free[1] > 32


def test_an_example_longer_than_a_row_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="40 tokens does not fit a row of 32"):
        pack([3, 40], 32)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=20), st.integers(16, 64))
def test_targets_are_the_next_tokens_of_the_same_example(lengths: list[int], per: int) -> None:
    examples = [
        Example(list(range(100 * i, 100 * i + n)), [0.0] + [1.0] * (n - 1), advantage=float(i), old=[-float(i)] * n)
        for i, n in enumerate(lengths)
    ]
    batches = packed_batches(examples, row_tokens=16, tokens_per_microbatch=per, pad_id=7)
    assert total_weight(batches) == sum(n - 1 for n in lengths)
    assert sum(batch.tokens for batch in batches) == sum(lengths)
    seen = []
    for batch in batches:
        on = batch.weight_BT > 0
        assert (batch.target_BT[on] == batch.tokens_BT[on] + 1).all()
        assert (batch.advantage_BT is not None) and (batch.advantage_BT[on] == batch.tokens_BT[on] // 100).all()
        assert (batch.old_BT is not None) and (batch.old_BT[on] == -(batch.tokens_BT[on] // 100)).all()
        two = batch.weight2_BT > 0
        assert (batch.target2_BT[two] == batch.tokens_BT[two] + 2).all()
        real = batch.segments_BT != PADDING
        assert (batch.positions_BT[real] == batch.tokens_BT[real] % 100).all()
        seen += batch.tokens_BT[real].tolist()
    assert sorted(seen) == sorted(t for e in examples for t in e.ids)


def test_a_stream_predicts_everything_but_what_it_has_not_got() -> None:
    batch = stream_batch(np.arange(12).reshape(2, 6))
    assert batch.weight == 10 and float(batch.weight2_BT.sum()) == 8
    assert batch.target_BT[0].tolist()[:5] == [1, 2, 3, 4, 5]
