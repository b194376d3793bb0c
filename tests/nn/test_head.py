"""The head without its logits equals the plain one, in value and gradient, for any chunking."""

from __future__ import annotations

import pytest
import torch

from shoestring.nn import head, head_rows, native


def _case(dtype: torch.dtype = torch.float64, n: int = 37, d: int = 8, vocab: int = 23) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    table = torch.randn(vocab, d, dtype=dtype, requires_grad=True)
    weight = torch.rand(n, dtype=dtype)
    weight[::3] = 0
    return hidden, table, torch.randint(0, vocab, (n,)), weight


def _grads(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("chunk", [1, 5, 37, 100, None])
def test_cross_entropy_equals_its_plain_twin(chunk: int | None) -> None:
    hidden, table, ids, weight = _case()
    ours, logp = head.cross_entropy_sum(hidden, table, ids, weight, chunk=chunk)
    plain = head.plain_cross_entropy_sum(hidden, table, ids, weight)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(logp, head.plain_token_logprobs(hidden, table, ids).detach())
    torch.testing.assert_close(_grads(ours, hidden, table), _grads(plain, hidden, table))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 5, 37])
def test_token_logprobs_equal_their_plain_twin(chunk: int, temperature: float) -> None:
    hidden, table, ids, weight = _case()
    ours, entropy = head.token_logprobs(hidden, table, ids, temperature=temperature, chunk=chunk)
    plain = head.plain_token_logprobs(hidden, table, ids, temperature=temperature)
    torch.testing.assert_close(ours, plain)
    ours_grad, plain_grad = (_grads((logp * weight).sum(), hidden, table) for logp in (ours, plain))
    torch.testing.assert_close(ours_grad, plain_grad)
    p = torch.softmax(hidden @ table.T / temperature, -1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).detach())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behind_a_softcap_they_equal_their_plain_twins(temperature: float) -> None:
    hidden, table, ids, weight = _case()
    plain = head.plain_token_logprobs(hidden, table, ids, temperature=temperature, softcap=0.7)
    wanted = _grads((plain * weight).sum(), hidden, table)
    how = {"temperature": temperature, "chunk": 5, "softcap": 0.7}
    logp, _ = head.token_logprobs(hidden, table, ids, **how)
    torch.testing.assert_close((logp, _grads((logp * weight).sum(), hidden, table)), (plain, wanted))
    total, _, _ = head.terms_sum(hidden, table, ids, lambda logp_n, rows: logp_n * weight[rows], **how)
    torch.testing.assert_close((total, _grads(total, hidden, table)), ((plain * weight).sum(), wanted))
    if temperature == 1.0:
        nll, _ = head.cross_entropy_sum(hidden, table, ids, weight, chunk=5, softcap=0.7)
        torch.testing.assert_close((nll, _grads(-nll, hidden, table)), (-(plain * weight).sum(), wanted))


def test_logits_never_exist_for_all_tokens() -> None:
    """Nothing as large as [N, V] is ever allocated: the largest new tensor is one chunk of rows."""
    hidden, table, ids, weight = _case(torch.float32, n=512, d=16, vocab=4096)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        head.cross_entropy_sum(hidden, table, ids, weight, chunk=32)[0].backward()
        head.token_logprobs(hidden, table, ids, chunk=32)[0].sum().backward()
    assert largest < 512 * 4096 / 4


def test_gradients_made_in_the_forward_pass_hold_for_every_backward_that_follows() -> None:
    hidden, table = torch.randn(5, 4).requires_grad_(), torch.randn(7, 4).requires_grad_()
    loss, _ = head.cross_entropy_sum(hidden, table, torch.arange(5), torch.ones(5))
    plain = head.plain_cross_entropy_sum(hidden, table, torch.arange(5), torch.ones(5))
    once = _grads(plain, hidden, table)
    for count in (1, 2):  # .grad may be the very tensor: a second backward must not find it changed
        loss.backward(retain_graph=True)
        for leaf, wanted in zip((hidden, table), once, strict=True):
            torch.testing.assert_close(leaf.grad, count * wanted)
    (3 * loss).backward()
    torch.testing.assert_close(table.grad, 5 * once[1])


@pytest.mark.skipif(native.why_not() is not None, reason=f"no C here: {native.why_not()}")
@pytest.mark.parametrize("first", [True, False])
def test_products_in_bf16_are_added_as_torch_adds_them(first: bool) -> None:
    """To the bit; several slices of the table, the last a short one."""
    torch.manual_seed(1)
    dz_nV, hidden_nD = torch.randn(7, 9_001).bfloat16(), torch.randn(7, 300).bfloat16()
    found_VD, plain_VD = torch.randn(9_001, 300).repeat(2, 1, 1).unbind()
    before_VD = found_VD.clone()
    for sum_VD, in_c in ((found_VD, True), (plain_VD, False)):
        head_rows.add_outer(sum_VD, dz_nV, hidden_nD, first=first, native=in_c)
    assert torch.equal(found_VD, plain_VD)
    whole_VD = dz_nV.t().float() @ hidden_nD.float() + (0 if first else before_VD)
    torch.testing.assert_close(found_VD, whole_VD, atol=0.1, rtol=1e-2)


@pytest.mark.parametrize(
    "in_c", [False, pytest.param(True, marks=pytest.mark.skipif(native.why_not() is not None, reason="no library"))]
)
def test_terms_of_logprobs_in_one_pass(in_c: bool) -> None:
    """The sum, logprobs, entropies and gradients are those of the terms behind `token_logprobs`."""
    drawn = torch.Generator().manual_seed(0)
    hidden, table = torch.randn(50, 12, generator=drawn), torch.randn(70, 12, generator=drawn)
    ids, by = torch.arange(50), torch.randn(50, generator=drawn)
    found = []
    for one_pass in (True, False):
        h, w = hidden.clone().requires_grad_(), table.clone().requires_grad_()
        if one_pass:
            value, logp, entropy = head.terms_sum(
                h, w, ids, lambda logp_n, rows: by[rows] * logp_n.exp(), temperature=0.7, chunk=16, native=in_c
            )
        else:
            logp, entropy = head.token_logprobs(h, w, ids, temperature=0.7)
            value = (by * logp.exp()).sum()
        found.append((value, logp, entropy, *torch.autograd.grad(3 * value, [h, w])))
    for got, want in zip(*found, strict=True):
        assert want.any() and (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("rows", [20, 0])
@pytest.mark.parametrize("trained", [0, 1])
@pytest.mark.parametrize("name", ["cross_entropy", "terms", "logprobs"])
def test_one_side_may_be_frozen_and_tokens_may_be_none(name: str, trained: int, rows: int) -> None:
    """The table under adapters, the states under a table that learns alone; no token at all leaves a gradient of 0."""
    torch.manual_seed(0)
    leaves = [torch.randn(rows, 6).double(), torch.randn(9, 6).double()]
    ids, weight = torch.randint(0, 9, (rows,)), torch.rand(rows).double()
    ways = {
        "cross_entropy": lambda h, w: head.cross_entropy_sum(h, w, ids, weight, chunk=8)[0],
        "terms": lambda h, w: head.terms_sum(h, w, ids, lambda logp, part: -weight[part] * logp, chunk=8)[0],
        "logprobs": lambda h, w: -(head.token_logprobs(h, w, ids, chunk=8)[0] * weight).sum(),
    }
    found = []
    for way in (ways[name], lambda h, w: head.plain_cross_entropy_sum(h, w, ids, weight)):
        given = [x.clone().requires_grad_(i == trained) for i, x in enumerate(leaves)]
        found.append(torch.autograd.grad(way(*given), given[trained])[0])
    torch.testing.assert_close(*found)
