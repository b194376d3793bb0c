"""Attention in C: any shape and mask against the truth in fp64, the same bits always, where it is left out."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoestring.core.errors import UserError
from shoestring.data.batch import BRANCH
from shoestring.nn import native
from shoestring.nn.attention import attend_plain, segment_bias
from shoestring.nn.attention_native import attend_native, is_fast, seen_in

REASON = native.why_not()
needs_native = pytest.mark.skipif(REASON is not None, reason=f"no native attention: {REASON}")
Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
SCALE = 0.3


def bits(bias_B1TT: Tensor) -> Tensor:
    """What `seen_in` says of segments, of any mask: written anew, bit by bit."""
    B, _, T, _ = bias_B1TT.shape
    seen_BTS = np.zeros((B, -(-T // 16) * 16, -(-T // 16) * 16), bool)
    seen_BTS[:, :T, :T] = (bias_B1TT[:, 0] == 0).numpy()
    found = []
    for t in range(0, T, 16):
        queries_BIS = seen_BTS[:, t : t + 16]
        words_BS = (queries_BIS * (1 << np.arange(16))[:, None]).sum(1)
        meets = [words_BS[:, s : s + 16][:, : T - s] for s in range(0, T, 16)]
        summary = [np.where((w == 0).all(1), 0, np.where((w == 0xFFFF).all(1), 2, 1)) for w in meets]
        found.append(np.concatenate([words_BS, np.stack(summary, 1)], 1))
    return torch.from_numpy(np.stack(found, 1).astype(np.uint16).view(np.int16))


def ours(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    return attend_native(q, k, v, scale, None if bias is None else bits(bias))


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=True)


def tensors(seed: int, B: int, H: int, G: int, T: int, K: int, W: int) -> list[Tensor]:
    """Queries, keys, values and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in [(B, H, T, K), (B, G, T, K), (B, G, T, W), (B, H, T, W)]]


def mask(kind: str, seed: int, B: int, T: int) -> Tensor | None:
    """Causal (None), runs of documents, or every query with a random set of keys, later ones too."""
    if kind == "causal":
        return None
    generator = torch.Generator().manual_seed(seed)
    if kind == "documents":
        ends_BT = torch.rand(B, T, generator=generator) < 3 / T
        return segment_bias(ends_BT.cumsum(1), torch.float32)
    seen_BTT = (torch.rand(B, T, T, generator=generator) < 0.3) | torch.eye(T, dtype=torch.bool)
    return torch.zeros(B, 1, T, T).masked_fill(~seen_BTT[:, None], float("-inf"))


def results(attend: Attend, given: list[Tensor], bias: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    q, k, v, dout = (x.to(dtype) for x in given)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, SCALE, None if bias is None else bias.to(dtype))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def relative(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error of the four, relative to the largest number of its tensor (one key has no gradient: to 1)."""
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in zip(found, truth, strict=True))


shapes = st.tuples(
    st.integers(1, 3), st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]), st.integers(1, 150), st.integers(1, 70),
    st.integers(1, 70),
)  # fmt: skip


@needs_native
@settings(max_examples=60, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 90), run=st.integers(1, 40), seed=st.integers(0, 1 << 20))
def test_segments_say_who_sees_whom(B: int, T: int, run: int, seed: int) -> None:
    """Segments, branches of them and padding, in runs or not, as `segment_bias` does with torch's operations."""
    generator = torch.Generator().manual_seed(seed)
    segment_BT, branch_BT = (torch.randint(*ends, (B, T), generator=generator) for ends in ((-2, 4), (0, 3)))
    segments_BT = (segment_BT + branch_BT * BRANCH * (segment_BT >= 0)).repeat_interleave(run, 1)[:, :T]
    assert torch.equal(seen_in(segments_BT), bits(segment_bias(segments_BT, torch.float32)))


@needs_native
@settings(max_examples=60, deadline=None)
@given(shape=shapes, kind=st.sampled_from(["causal", "documents", "random"]), seed=st.integers(0, 1 << 20))
def test_any_shape_and_mask(shape: tuple[int, tuple[int, int], int, int, int], kind: str, seed: int) -> None:
    B, (H, G), T, K, W = shape
    given, bias = tensors(seed, B, H, G, T, K, W), mask(kind, seed, B, T)
    truth = results(attend_plain, given, bias, torch.float64)
    assert relative(results(ours, given, bias, torch.float32), truth) < 1e-5
    assert relative(results(ours, given, bias, torch.bfloat16), truth) < 0.05


@needs_native
@pytest.mark.parametrize("kind", ["causal", "documents"])
@pytest.mark.parametrize(("H", "G", "T", "K", "W"), [(8, 8, 300, 48, 32), (4, 2, 129, 12, 12), (2, 2, 64, 128, 128)])
def test_as_torch_s_kernel(kind: str, H: int, G: int, T: int, K: int, W: int) -> None:
    """In fp32 the same to 1e-5; in bf16 no further from the truth than 1.2 times what it is, on the average."""
    given, bias = tensors(0, 2, H, G, T, K, W), mask(kind, 0, 2, T)
    truth = results(sdpa, given, bias, torch.float64)
    assert relative(results(ours, given, bias, torch.float32), results(sdpa, given, bias, torch.float32)) < 1e-5
    for mine, theirs, exact in zip(
        results(ours, given, bias, torch.bfloat16), results(sdpa, given, bias, torch.bfloat16), truth, strict=True
    ):
        assert 0 < (mine - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()


@needs_native
def test_gradients_are_those_of_small_steps() -> None:
    """Along random directions, as gradcheck does with all of them; in fp32 by steps of the truth in fp64."""
    given = tensors(3, 1, 2, 1, 70, 6, 5)
    _, *gradients = results(ours, given, None, torch.float32)
    *leaves, dout = (x.double() for x in given)
    for i, gradient in enumerate(gradients):
        direction = torch.randn(leaves[i].shape, generator=torch.Generator().manual_seed(i)).double()
        moved = [
            [x + step * direction if j == i else x for j, x in enumerate(leaves)] for step in (1e-5, -1e-5)
        ]  # fmt: skip
        up, down = ((attend_plain(*x, SCALE, None) * dout).sum() for x in moved)
        assert float((gradient.double() * direction).sum()) == pytest.approx(float((up - down) / 2e-5), rel=1e-4)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_the_same_bits_with_any_number_of_threads(kind: str, dtype: torch.dtype) -> None:
    given, bias = tensors(1, 3, 6, 2, 150, 20, 12), mask(kind, 1, 3, 150)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(results(ours, given, bias, dtype))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_native
def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    given = tensors(2, 3, 2, 2, 100, 8, 8)
    alone = results(ours, [x[1:2] for x in given], None, torch.bfloat16)
    for a, b in zip(alone, results(ours, given, None, torch.bfloat16), strict=True):
        assert torch.equal(a[0], b[1])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_may_lie_anyhow(dtype: torch.dtype) -> None:
    """Slices of one projection [B, T, 2 H + G, 9], as GQA gives them, and a gradient that is one number everywhere."""
    B, H, G, T, K = 2, 4, 2, 37, 9
    joined = torch.randn(B, T, H + 2 * G, K, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found = []
    for contiguous in (False, True):
        parts = [y.transpose(1, 2) for y in joined.split([H, G, G], dim=2)]
        out = ours(*((y.contiguous() for y in parts) if contiguous else parts), SCALE, None)
        assert out.transpose(1, 2).is_contiguous()
        found.append((out, *torch.autograd.grad(out.sum(), joined)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_native
def test_what_is_hidden_does_not_leak() -> None:
    """To the last bit, though blocks hold keys and queries of both documents."""
    given, T = tensors(4, 1, 1, 1, 80, 8, 8), 80
    bias = segment_bias((torch.arange(T) >= 50).long()[None], torch.float32)
    base = results(ours, given, bias, torch.float32)
    for x in given[:3]:
        x[:, :, :50] = 1e3
    moved = results(ours, given, bias, torch.float32)
    assert all(torch.equal(a[:, :, 50:], b[:, :, 50:]) for a, b in zip(base, moved, strict=True))


@needs_native
def test_no_nan_is_lost() -> None:
    given = tensors(5, 1, 1, 1, 70, 8, 8)
    given[1][0, 0, 30, 3] = float("nan")
    out, *gradients = results(ours, given, None, torch.float32)
    assert bool(out[0, 0, 30:].isnan().all()) and bool(out[0, 0, :30].isfinite().all())
    assert all(bool(gradient.isnan().any()) for gradient in gradients)


@needs_native
def test_memory_grows_with_the_length_alone() -> None:
    """A process of its own: 8 heads over 4096 positions would be 256 MB of bf16 probabilities, 1 GB of a mask each."""
    code = """if True:
        import resource, torch
        from shoestring.nn.attention_native import attend_native
        def step(T):
            q, k, v = (torch.randn(1, 8, T, 32, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
            attend_native(q, k, v, 0.2, None).sum().backward()
        step(64)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(4096)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(said.stdout) * unit < 64e6  # eight tensors of 2 MB, and room to work for each thread


@pytest.mark.skipif(REASON is not None or platform.machine() != "x86_64", reason="needs a compiler for x86")
@pytest.mark.parametrize("without", ["-mno-avx512f", pytest.param("-mno-avx", marks=pytest.mark.slow)])
def test_with_narrower_vectors(
    without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:  # fmt: skip
    """What machines without AVX-512, or without AVX, would build; bf16 is widened there."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("cc") or shutil.which("gcc")} "$@" {without}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert is_fast() == (without == "-mno-avx512f")
    for kind, shape in (("causal", (2, 4, 2, 100, 9, 13)), ("documents", (1, 2, 2, 80, 32, 24))):
        given, bias = tensors(6, *shape), mask(kind, 6, shape[0], shape[3])
        truth = results(attend_plain, given, bias, torch.float64)
        assert relative(results(ours, given, bias, torch.float32), truth) < 1e-5
        assert relative(results(ours, given, bias, torch.bfloat16), truth) < 0.02


# ---- where it is left out
def test_without_a_library_it_says_so(monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    monkeypatch.setenv("SHOESTRING_NATIVE", "0")
    q, k, v, _ = tensors(0, 1, 1, 1, 4, 4, 4)
    with pytest.raises(UserError, match='SHOESTRING_NATIVE is 0; mend that, or take "blocks"'):
        attend_native(q, k, v, SCALE, None)
    with pytest.raises(UserError, match=r"none for torch\.float64 on cpu"):
        attend_native(q.double(), k.double(), v.double(), SCALE, None)
    with pytest.raises(UserError, match=r"none for torch\.float32 on meta"):
        attend_native(q.to("meta"), k.to("meta"), v.to("meta"), SCALE, None)
    with pytest.raises(UserError, match="SHOESTRING_NATIVE is 0"):
        seen_in(torch.zeros(1, 4, dtype=torch.int64))
