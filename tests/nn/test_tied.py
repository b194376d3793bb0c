"""A table at both ends: its gradient is that of lookups beside it; and memory that every step uses again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shoestring.models.dense import Dense, DenseConfig
from shoestring.nn import native, tied
from shoestring.nn.head import cross_entropy_sum
from shoestring.nn.kernels import Kernels
from shoestring.nn.room import LARGE, Room, cast, empty

CONFIG = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "model_type": "qwen2",
}  # fmt: skip


@pytest.mark.parametrize("used", ["both", "rows", "head"])
def test_the_gradient_is_that_of_lookups_beside_the_table(used: str) -> None:
    torch.manual_seed(0)
    tokens_BT = torch.randint(0, 7, (3, 5))  # some several times
    found = []
    for both in (tied.both_ends, lambda table, tokens: (F.embedding(tokens, table), table)):
        table_VD = torch.linspace(-1, 1, 44, dtype=torch.float64).view(11, 4).requires_grad_()
        rows_BTD, head_VD = both(table_VD, tokens_BT)
        total = rows_BTD.square().sum() if used != "head" else rows_BTD.new_zeros(())
        if used != "rows":
            total = total + (rows_BTD.detach()[0] @ head_VD.t()).exp().sum()
        found.append((total, *torch.autograd.grad(total, table_VD)))
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


def _gradients(large: int, tie: bool, monkeypatch: Any) -> tuple[list[torch.Tensor], bool]:
    """Of two micro-batches through a small model; and whether its head was given apart."""
    monkeypatch.setattr(tied, "LARGE", large)
    model = Dense(
        DenseConfig.from_dict(CONFIG | {"tie_word_embeddings": tie}), generator=torch.Generator().manual_seed(0)
    )
    model.kernels = Kernels(elements="native")
    generator, apart = torch.Generator().manual_seed(1), False
    for _ in range(2):
        tokens_BT = torch.randint(0, 61, (2, 9), generator=generator)
        out = model(tokens_BT[:, :-1], logits=False)
        apart = out.head_VD is not None
        head_VD = model.head_weight if out.head_VD is None else out.head_VD
        cross_entropy_sum(out.hidden_BTD.flatten(0, 1), head_VD, tokens_BT[:, 1:].flatten(), torch.ones(16))[
            0
        ].backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], apart


@pytest.mark.skipif(native.why_not() is not None, reason="no compiler here")
def test_a_tied_model_learns_the_same_and_an_untied_one_is_left_alone(monkeypatch: Any) -> None:
    (fast, apart), (plain, whole) = _gradients(1, True, monkeypatch), _gradients(1 << 20, True, monkeypatch)
    assert (apart, whole) == (True, False)
    torch.testing.assert_close(fast, plain)
    assert not _gradients(1, False, monkeypatch)[1]


def test_nothing_is_given_apart_without_gradients() -> None:
    table_VD = torch.empty(tied.LARGE, 1).requires_grad_()
    assert tied.worth_it(table_VD, True)
    assert not tied.worth_it(table_VD, False)
    assert not tied.worth_it(table_VD.detach(), True)
    with torch.no_grad():
        assert not tied.worth_it(table_VD, True)


def test_the_gradient_of_lookups_is_added_where_the_heads_lies() -> None:
    table_VD = torch.zeros(5, 3).requires_grad_()
    rows_BTD, head_VD = tied.both_ends(table_VD, torch.tensor([[1, 1, 4]]))
    seen: list[int] = []
    head_VD.register_hook(lambda grad: seen.append(grad.data_ptr()))
    (rows_BTD.sum() + (head_VD * 2).sum()).backward()
    assert table_VD.grad is not None
    assert table_VD.grad.data_ptr() == seen[0]
    assert table_VD.grad[:, 0].tolist() == [2, 4, 2, 2, 3]


def test_a_block_is_lent_to_one_tensor_at_a_time_and_again_when_that_is_gone() -> None:
    room = Room()
    shape = (LARGE // 4 + 1000, 1)
    first = room.empty(shape, torch.float32).fill_(1)
    second = empty(room, first).fill_(2)
    assert first.sum() == len(first)
    assert first.data_ptr() != second.data_ptr()
    assert len(room) == 0
    place, seen = first.data_ptr(), first[5:]
    del first
    assert len(room) == 0  # a view of it is still there
    del seen
    assert len(room) >= LARGE
    third = room.empty((LARGE // 2,), torch.bfloat16)
    assert third.data_ptr() == place
    assert len(room) == 0
    assert second.sum() == 2 * len(second)
    assert room.empty((LARGE * 2,), torch.uint8).data_ptr() not in (place, second.data_ptr())


def test_of_several_free_blocks_the_smallest_that_fits_is_lent() -> None:
    room = Room()
    shapes = [(n * LARGE,) for n in (6, 5, 4)]
    made = [room.empty(shape, torch.uint8) for shape in shapes]
    places = [tensor.data_ptr() for tensor in made]
    made.clear()
    assert [room.empty(shape, torch.uint8).data_ptr() for shape in shapes[::-1]] == places[::-1]
    assert len(room) == sum(n * LARGE for n in (6, 5, 4))


def test_what_is_too_small_goes_back_when_more_is_needed() -> None:
    room = Room()
    room.empty((2 * LARGE,), torch.uint8)
    room.empty((9 * LARGE,), torch.uint8)
    room.empty((3 * LARGE,), torch.uint8)
    assert len(room) == 12 * LARGE
    assert len(room.empty((4 * LARGE,), torch.uint8, 3.0)) == 4 * LARGE
    assert len(room) == 12 * LARGE  # it lay in the block of nine


def test_a_cast_is_torchs_with_and_without_room() -> None:
    wide = torch.linspace(-3, 3, LARGE // 2 + 7)
    for room in (None, Room()):
        assert torch.equal(cast(room, wide, torch.bfloat16), wide.to(torch.bfloat16))
        assert cast(room, wide, torch.float32) is wide


def test_a_gradient_in_a_room_is_let_go_with_it() -> None:
    room, table_VD = Room(), torch.zeros(LARGE // 8, 2).requires_grad_()
    for _ in range(2):
        cross_entropy_sum(torch.ones(3, 2), table_VD, torch.arange(3), torch.ones(3), room=room)[0].backward()
        assert table_VD.grad is not None
        held = table_VD.grad.data_ptr()
        free = len(room)
        table_VD.grad = None
        assert len(room) >= free + LARGE
    again = room.empty((LARGE // 8, 2), torch.float32)
    assert again.data_ptr() == held
