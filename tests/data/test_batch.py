"""Packing and the shifts: nothing is lost, nothing leaks between examples, the targets are the next tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.data.batch import BRANCH, PADDING, Example, pack, packed_batches, stream_batch, total_weight


@given(st.lists(st.integers(1, 30), max_size=60))
def test_every_example_is_in_exactly_one_row_and_rows_are_not_over_full(lengths: list[int]) -> None:
    rows = pack(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 32 for row in rows)
    # best fit decreasing: no two rows could have been one
    free = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(free) < 2 or free[0] + free[1] > 32


def test_packing_by_hand() -> None:
    """The longest first, each where it leaves the least room, equals in their order."""
    assert pack([5, 3, 7, 2, 1], 8) == [[2, 4], [0, 1], [3]]
    assert pack([4, 4, 4], 8) == [[0, 1], [2]]
    assert pack([8, 1], 8) == [[0], [1]]


def test_an_example_longer_than_a_row_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="40 tokens does not fit a row of 32"):
        pack([3, 40], 32)

    alike = [Example([1, 2, 3, *range(37)], [0.0] * 4 + [1.0] * 36, stem=3) for _ in range(2)]
    with pytest.raises(UserError, match="40 tokens does not fit a row of 32"):  # whole, though they share a beginning
        packed_batches(alike, row_tokens=32, tokens_per_microbatch=64, pad_id=0)


@pytest.mark.parametrize(
    ("lengths", "row_tokens", "shape"),
    [([3, 4], 64, (1, 8)), ([9], 64, (1, 16)), ([18], 20, (1, 20)), ([9, 9], 16, (2, 16))],
)
def test_rows_are_no_longer_than_they_need_to_be(lengths: list[int], row_tokens: int, shape: tuple[int, int]) -> None:
    """In steps of 8, and never longer than `row_tokens`."""
    examples = [Example(list(range(n)), [0.5] * n) for n in lengths]
    (batch,) = packed_batches(examples, row_tokens=row_tokens, tokens_per_microbatch=64, pad_id=7)
    assert batch.tokens_BT.shape == shape
    assert batch.weight == total_weight([batch]) == 0.5 * sum(n - 1 for n in lengths)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=20), st.integers(16, 64))
def test_targets_are_the_next_tokens_of_the_same_example(lengths: list[int], per: int) -> None:
    examples = [
        Example(list(range(100 * i, 100 * i + n)), [1.0] * n, advantage=float(i), old=[-float(i)] * n)
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


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(2, 12), min_size=1, max_size=5)), min_size=1,
             max_size=8),
    st.integers(24, 64), st.integers(16, 64), st.sampled_from([1, 2]),
)  # fmt: skip
def test_samples_of_one_prompt_share_it(
    groups: list[tuple[int, list[int]]], row_tokens: int, per: int, again: int
) -> None:
    """Every sampled token is a target once, told by the token before it; a stem stands once in a row."""
    examples = [
        Example(
            [*range(g * 1000, g * 1000 + prompt), *range(g * 1000 + 100 * (i + 1), g * 1000 + 100 * (i + 1) + own)],
            [0.0] * prompt + [1.0] * own, advantage=float(g), old=[0.0] * prompt + [float(i)] * own,
            stem=max(0, prompt - again),
        )
        for g, (prompt, owns) in enumerate(groups) for i, own in enumerate(owns)
    ]  # fmt: skip
    batches = packed_batches(examples, row_tokens=row_tokens, tokens_per_microbatch=per, pad_id=7)
    assert total_weight(batches) == sum(sum(owns) for _, owns in groups)
    told = []
    for batch in batches:
        assert batch.advantage_BT is not None and batch.old_BT is not None and batch.segments_BT is not None
        assert batch.positions_BT is not None
        for b, t in (batch.weight_BT > 0).nonzero().tolist():
            target, segment = int(batch.target_BT[b, t]), int(batch.segments_BT[b, t])
            group, i = target // 1000, target % 1000 // 100 - 1
            assert batch.advantage_BT[b, t] == group and batch.old_BT[b, t] == i
            seen = segments_seen(batch.segments_BT[b, : t + 1], segment)
            stem = groups[group][0]
            whole = [*range(group * 1000, group * 1000 + stem), *range(target - target % 100, target)]
            assert batch.tokens_BT[b, : t + 1][seen].tolist() == whole
            assert batch.positions_BT[b, : t + 1][seen].tolist() == list(range(len(whole)))
            told.append(target)
        two = batch.weight2_BT > 0
        assert again == 1 or float(batch.weight2_BT[two].sum()) == float(two.sum())
    assert sorted(told) == sorted(t for e in examples for t, w in zip(e.ids, e.weight, strict=True) if w)
    if again == 2:  # two ahead, each sampled token is told as well, but for the second of all
        further = sum(int((batch.weight2_BT > 0).sum()) for batch in batches)
        assert further == sum(own for prompt, owns in groups for own in owns) - sum(
            len(owns) for prompt, owns in groups if prompt == 1
        )
    alone = sum(len(e.ids) for e in examples)
    shared = sum(max(0, prompt - again) * (len(owns) - 1) for prompt, owns in groups)
    assert alone - shared <= sum(batch.tokens for batch in batches) <= alone
    if row_tokens >= alone:
        assert sum(batch.tokens for batch in batches) == alone - shared


def segments_seen(segments_T: Tensor, segment: int) -> Tensor:
    return (segments_T == segment) | (segments_T == segment % BRANCH)


def test_a_stream_predicts_everything_but_what_it_has_not_got() -> None:
    batch = stream_batch(np.arange(12).reshape(2, 6))
    assert batch.weight == 10 and float(batch.weight2_BT.sum()) == 8
    assert batch.target_BT[0].tolist()[:5] == [1, 2, 3, 4, 5]
