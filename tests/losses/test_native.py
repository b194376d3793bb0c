"""Divergences in C: the numbers of the plain forms, whatever the widths; left out where they must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoestring.losses import forward_kl, reverse_kl, total_variation
from shoestring.losses._native import native_form
from shoestring.losses._teacher import Hidden, TopK
from shoestring.losses._tokens import Tokens
from shoestring.nn import native

REASON = native.why_not()
needs_native = pytest.mark.skipif(REASON is not None, reason=f"no C here: {REASON}")
PARTS = pytest.mark.parametrize("part", [forward_kl, reverse_kl])
D, C, N = 24, 40, 9


def _case(V: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tokens]:
    torch.manual_seed(7)
    hidden, table = torch.randn(N, D).to(dtype), torch.randn(V, D) * scale
    teacher = Hidden(torch.randn(N, C).to(dtype), (torch.randn(V, C) * scale).to(dtype))
    return (
        hidden.requires_grad_(),
        table.requires_grad_(),
        Tokens(torch.zeros(N).long(), torch.rand(N), teacher=teacher),
    )


def _found(part, case: tuple[Tensor, Tensor, Tokens], **how) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    hidden, table, tokens = case
    total, _ = part.loss(hidden, table, tokens, **how)
    return (total.detach(), *torch.autograd.grad(total, (hidden, table)))


@needs_native
@PARTS
@pytest.mark.parametrize("V", [1, 19, 2_048, 5_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_plain_ones(part, V: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """Across strips and odd ends; what differs is the rounding of fp32 sums (and of bf16 gradients)."""
    case = _case(V, dtype)
    assert native_form(part.form, case[0], V, case[2].teacher) is not None  # type: ignore[arg-type]
    quick = _found(part, case, temperature=1.3)
    case[2].native = False
    plain = _found(part, case, temperature=1.3)
    near = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-2}
    torch.testing.assert_close(quick[0], plain[0], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(quick[1:], plain[1:], strict=True):
        torch.testing.assert_close(mine, theirs, **near)


@needs_native
@PARTS
def test_in_fp32_it_is_as_near_to_fp64_as_the_plain_form(part) -> None:  # type: ignore[no-untyped-def]
    """Logits hundreds apart included."""
    for scale in (0.3, 10.0):
        case = _case(4_099, torch.float32, scale)
        hidden, table = (x.detach().double().requires_grad_() for x in case[:2])
        exact = _found(part, (hidden, table, _wide(case[2])))
        errors = []
        for case[2].native in (True, False):
            found = _found(part, case)
            errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)])
        for quick, plain in zip(*errors, strict=True):
            assert quick < max(1.5 * plain, 2e-6)


def _wide(tokens: Tokens) -> Tokens:
    assert isinstance(tokens.teacher, Hidden)
    teacher = Hidden(tokens.teacher.hidden_NC.double(), tokens.teacher.head_VC.double())
    return Tokens(tokens.ids_N, tokens.weight_N.double(), teacher=teacher)


@needs_native
@PARTS
def test_a_number_that_is_none_is_seen(part) -> None:  # type: ignore[no-untyped-def]
    for side in ("student", "teacher"):
        hidden, table, tokens = _case(300, torch.float32)
        assert isinstance(tokens.teacher, Hidden)
        with torch.no_grad():
            (table if side == "student" else tokens.teacher.head_VC)[17, 3] = float("nan")
        total, _ = part.loss(hidden, table, tokens)
        assert total.isnan()


@needs_native
def test_where_it_is_left_out() -> None:
    hidden, _, tokens = _case(50, torch.float32)
    teacher = tokens.teacher
    assert isinstance(teacher, Hidden)
    assert native_form(forward_kl.form, hidden, 50, teacher) is not None
    assert native_form(total_variation.form, hidden, 50, teacher) is None  # has no C
    assert native_form(forward_kl.form, hidden.double(), 50, teacher) is None
    assert native_form(forward_kl.form, hidden.bfloat16(), 50, teacher) is None  # the teacher's are fp32
    assert native_form(forward_kl.form, hidden, 49, teacher) is None
    kept = TopK(torch.zeros(N, 1).long(), torch.zeros(N, 1), torch.zeros(N))
    assert native_form(forward_kl.form, hidden, 50, kept) is None
