"""The divergences: golden values; fused == plain in float64 for any chunking and teacher; no drift at rest."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from shoestring.losses import adaptive, forward_kl, jsd, reverse_kl, skew_kl, total_variation
from shoestring.losses._fused import chunk_rows, divergence_sum, plain_divergence_sum
from shoestring.losses._teacher import Hidden, Sampled, TopK
from shoestring.losses._tokens import Tokens

P, Q = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double(), torch.tensor([[0.4, 0.1, 0.3, 0.2]]).double()
# part, options, value, gradient: facts computed by hand and checked by finite differences elsewhere
GOLDEN = [
    (forward_kl, {}, 0.2678687, [-0.1, -0.2, 0.15, 0.15]),
    (reverse_kl, {}, 0.2860844, [-0.2036912, -0.1384697, 0.1221188, 0.2200420]),
    (jsd, {"beta": 0.5}, 0.0657815, [-0.0363321, -0.0378512, 0.0335707, 0.0406126]),
    (jsd, {"beta": 0.1}, 0.0238258, [-0.0099229, -0.0166673, 0.0130740, 0.0135163]),
    (jsd, {"beta": 0.9}, 0.0250459, [-0.0169176, -0.0124962, 0.0113351, 0.0180786]),
    (skew_kl, {"alpha": 0.1}, 0.2124180, [-0.0971131, -0.1395222, 0.1143282, 0.1223070]),
    (skew_kl, {"alpha": 0.1, "reverse": True}, 0.2199988, [-0.1409056, -0.1133024, 0.1044985, 0.1497095]),
    (total_variation, {}, 0.3, [-0.2, -0.05, 0.15, 0.1]),
    (adaptive, {}, 0.2830484, None),
]
FORMS = [(part, options) for part, options, *_ in GOLDEN]
NAMES = [part.__name__.rpartition(".")[2] + "".join(f" {v}" for v in options.values()) for part, options in FORMS]


def _at(part, options, teacher, weight: float = 1.0, temperature: float = 1.0) -> tuple[float, Tensor]:  # type: ignore[no-untyped-def]
    """(value, d value / d logits) at the golden q: hidden states of width 1 x V with the identity as head."""
    z = Q.log().requires_grad_()
    tokens = Tokens(torch.tensor([0]), torch.full((1,), weight).double(), teacher=teacher)
    total, metrics = part.loss(z, torch.eye(4).double(), tokens, temperature=temperature, **options)
    assert metrics["divergence"].item() == total.item()
    return total.item(), torch.autograd.grad(total, z)[0][0]


@pytest.mark.parametrize(("part", "options", "value", "gradient"), GOLDEN, ids=NAMES)
def test_golden(part, options, value, gradient) -> None:  # type: ignore[no-untyped-def]
    found, slope = _at(part, options, Hidden(P.log(), torch.eye(4).double()))
    assert found == pytest.approx(value, abs=5e-8)
    if gradient is not None:
        assert slope.tolist() == pytest.approx(gradient, abs=5e-8)


def test_golden_at_temperature_two() -> None:
    value, slope = _at(forward_kl, {}, Hidden(P.log(), torch.eye(4).double()), temperature=2.0)
    assert value == pytest.approx(0.0894253, abs=5e-8)
    p, q = (P.log() / 2).softmax(-1), (Q.log() / 2).softmax(-1)
    torch.testing.assert_close(slope, ((q - p) / 2)[0])


TOP2 = TopK(torch.tensor([[0, 1]]), P[:, :2].log(), torch.tensor([0.2]).double().log())


def test_golden_top_k_with_its_tail() -> None:
    value, slope = _at(forward_kl, {}, TOP2)
    assert value == pytest.approx(0.2578973, abs=5e-8) and slope.tolist() == pytest.approx([-0.1, -0.2, 0.18, 0.12])
    full, _ = _at(forward_kl, {}, Hidden(P.log(), torch.eye(4).double()))
    assert full - value == pytest.approx(0.0099714, abs=1e-7)  # (1-Z) KL of the tails
    assert _at(reverse_kl, {}, TOP2)[0] == pytest.approx(0.2590267, abs=5e-8)


def test_sampling_is_unbiased_with_the_known_covariance() -> None:
    torch.manual_seed(0)
    draws, n = 40_000, 4
    ids = torch.multinomial(P[0], draws * n, replacement=True).view(draws, n)
    z = Q.log().repeat(draws, 1).requires_grad_()
    tokens = Tokens(
        torch.zeros(draws).long(), torch.ones(draws).double(), teacher=Sampled(ids, torch.full((draws, n), 1 / n))
    )
    total, _ = forward_kl.loss(z, torch.eye(4).double(), tokens)
    slope = torch.autograd.grad(total, z)[0]
    assert slope.mean(0).tolist() == pytest.approx((Q - P)[0].tolist(), abs=3e-3)
    assert slope.var(0).sum().item() == pytest.approx(0.635 / n, rel=0.02)
    assert total.item() / draws == pytest.approx(1.4099887, abs=5e-3)  # the value is the cross-entropy


def test_sampled_tokens_are_refused_where_they_would_be_biased() -> None:
    teacher = Sampled(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    with pytest.raises(ValueError, match="forward_kl only"):
        _at(reverse_kl, {}, teacher)


# ---- fused against plain

N, V, D = 11, 19, 5


def _teachers() -> dict[str, object]:
    torch.manual_seed(3)
    hidden, head = torch.randn(N, 4).double(), torch.randn(V, 4).double()
    logp = torch.log_softmax(hidden @ head.T / 1.5, -1)
    top = logp.topk(6, dim=1)
    ids = torch.multinomial(logp.exp(), 9, replacement=True)
    return {
        "hidden": Hidden(hidden, head),
        "topk": TopK(top.indices, top.values, torch.log1p(-top.values.exp().sum(1))),
        "sampled": Sampled(ids, torch.full((N, 9), 1 / 9)),
    }


def _case() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    weight = torch.rand(N).double()
    weight[3] = 0
    return torch.randn(N, D).double().requires_grad_(), torch.randn(V, D).double().requires_grad_(), weight


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
@pytest.mark.parametrize(
    ("part", "options", "kind"), [(*f, k) for f in FORMS for k in ("hidden", "topk")] + [(forward_kl, {}, "sampled")]
)
def test_fused_is_plain_for_any_chunking(part, options, kind: str, chunk: int) -> None:  # type: ignore[no-untyped-def]
    hidden, table, weight = _case()
    tokens = Tokens(torch.zeros(N).long(), weight, teacher=_teachers()[kind])  # type: ignore[arg-type]
    fused, _ = part.loss(hidden, table, tokens, temperature=1.5, chunk=chunk, **options)
    plain = plain_divergence_sum(hidden, table, tokens, partial(part.plain, **options), temperature=1.5)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(fused, (hidden, table)), torch.autograd.grad(plain, (hidden, table)))


@pytest.mark.parametrize(("ours", "theirs"), [(0.8, 0.0), (0.0, 0.8), (2.0, 0.8)])
@pytest.mark.parametrize(("part", "options"), FORMS, ids=NAMES)
def test_fused_is_plain_behind_softcaps(part, options, ours: float, theirs: float) -> None:  # type: ignore[no-untyped-def]
    hidden, table, weight = _case()
    teacher = replace(_teachers()["hidden"], softcap=theirs)  # type: ignore[type-var]
    tokens = Tokens(torch.zeros(N).long(), weight, teacher=teacher, softcap=ours)
    fused, _ = part.loss(hidden, table, tokens, temperature=1.5, chunk=4, **options)
    plain = plain_divergence_sum(hidden, table, tokens, partial(part.plain, **options), temperature=1.5)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(fused, (hidden, table)), torch.autograd.grad(plain, (hidden, table)))
    bare = replace(tokens, softcap=0.0, teacher=_teachers()["hidden"])
    assert not torch.allclose(fused, part.loss(hidden, table, bare, temperature=1.5, **options)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("part", "options"), FORMS, ids=NAMES)
def test_no_gradient_where_the_student_is_the_teacher(part, options, dtype) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(5)
    hidden, table = torch.randn(9, 8).to(dtype).requires_grad_(), (3 * torch.randn(50, 8)).to(dtype).requires_grad_()
    tokens = Tokens(torch.zeros(9).long(), torch.ones(9), teacher=Hidden(hidden.detach(), table.detach()))
    total, _ = part.loss(hidden, table, tokens, temperature=0.7, **options)
    for grad in torch.autograd.grad(total, (hidden, table)):
        assert grad.abs().max() < 1e-5  # rounding of softmaxes that sum to 1 within fp32
    assert abs(total.item()) < 1e-5


@pytest.mark.parametrize(("part", "options"), FORMS, ids=NAMES)
def test_padded_rows_of_either_head_take_no_part(part, options) -> None:  # type: ignore[no-untyped-def]
    hidden, table, weight = _case()
    teacher = _teachers()["hidden"]
    assert isinstance(teacher, Hidden)
    loud = torch.full((3, D), 50.0).double()
    padded = torch.cat([table.detach(), loud]).requires_grad_()
    wide = Hidden(teacher.hidden_NC, torch.cat([teacher.head_VC, loud[:2, :4]]), vocab=V)
    ids = torch.zeros(N).long()
    want, _ = part.loss(hidden, table, Tokens(ids, weight, teacher=teacher), **options)
    got, _ = part.loss(hidden, padded, Tokens(ids, weight, teacher=wide), vocab=V, **options)
    torch.testing.assert_close(got, want)
    assert (torch.autograd.grad(got, padded)[0][V:] == 0).all()


@pytest.mark.parametrize(("part", "options"), FORMS, ids=NAMES)
@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_far_apart_in_fp32_stays_finite_and_right(part, options, scale: float) -> None:  # type: ignore[no-untyped-def]
    """Logits hundreds apart: probabilities underflow, values and gradients must not."""
    torch.manual_seed(6)
    hidden, head = torch.randn(6, 4), torch.randn(40, 4) * scale / 4
    student = (torch.randn(40, 4) * scale / 4).requires_grad_()
    tokens = Tokens(torch.zeros(6).long(), torch.ones(6), teacher=Hidden(hidden, head))
    total, _ = part.loss(hidden, student, tokens, **options)
    (grad,) = torch.autograd.grad(total, student)
    assert torch.isfinite(total) and torch.isfinite(grad).all()
    if part in (forward_kl, reverse_kl, total_variation, jsd):
        exact = Tokens(torch.zeros(6).long(), torch.ones(6), teacher=Hidden(hidden.double(), head.double()))
        right, _ = part.loss(hidden.double(), student.double(), exact, **options)
        assert total.item() == pytest.approx(right.item(), rel=2e-4)


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
def test_jsd_at_half_and_half_by_the_formula(gap: float) -> None:
    """b KL(p, m) + (1-b) KL(q, m) in float64 where one is sure and the other is not, beta as in GKD unless said."""
    p, q = torch.tensor([0.0, gap]).double().softmax(-1), torch.tensor([0.5, 0.5]).double()
    m = (p + q) / 2
    want = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    tokens = Tokens(torch.zeros(1).long(), torch.ones(1).double(), teacher=Hidden(p.log()[None], torch.eye(2).double()))
    value, _ = jsd.loss(q.log()[None], torch.eye(2).double(), tokens)
    assert value.item() == pytest.approx(want.item(), rel=1e-9)


def test_memory_is_a_chunk_not_the_batch() -> None:
    """The largest tensor alive is a chunk of logits, far below N x V, in forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self.seen = max(self.seen, x.numel())
            return out

    n, v = 1400, 9_000
    hidden, table = torch.randn(n, 8).requires_grad_(), torch.randn(v, 8).requires_grad_()
    tokens = Tokens(torch.zeros(n).long(), torch.ones(n), teacher=Hidden(torch.randn(n, 4), torch.randn(v, 4)))
    with Largest() as largest:
        divergence_sum(hidden, table, tokens, reverse_kl.form)[0].backward()
    assert largest.seen <= chunk_rows(v) * v < n * v // 2


@pytest.mark.parametrize(
    ("part", "options"),
    [(jsd, {"beta": 0.0}), (jsd, {"beta": 1.0}), (skew_kl, {"alpha": 1.0}), (adaptive, {"head_mass": 0.0})],
)
def test_options_out_of_range_are_refused(part, options) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="must"):
        _at(part, options, Hidden(P.log(), torch.eye(4).double()))


def test_a_missing_or_short_teacher_is_said() -> None:
    with pytest.raises(ValueError, match="teacher's side"):
        _at(forward_kl, {}, None)
    with pytest.raises(ValueError, match="covers 2 tokens of 1"):
        _at(forward_kl, {}, Hidden(torch.randn(2, 4).double(), torch.eye(4).double()))
