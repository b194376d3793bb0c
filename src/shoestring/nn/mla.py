"""Multi-head latent attention (V3 section 2.1.1; V2 section 2.1 and appendix C).

    c_q = RMSNorm(W_qa h)            q = W_qb c_q = per head [q_nope | q_pe]     (without q_lora_rank: q = W_q h)
    [c_kv | k_pe] = W_kva h          c = RMSNorm(c_kv); k_pe is one head shared by all, and is not normed
    [k_nope | v] per head = W_kvb c  RoPE on q_pe and k_pe
    o = softmax((q_nope·k_nope + q_pe·k_pe) · scale) v                           out = W_o o

Only c and k_pe are cached. Two ways to attend: `naive` expands keys and values per head (training, prefill);
`absorbed` moves W_kvb to the query and the output and attends in the latent space (decoding). Same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shoestring.nn import elements
from shoestring.nn.attention import Pass
from shoestring.nn.linear import Linear, together
from shoestring.nn.norm import RMSNorm
from shoestring.nn.rope import angles, rotate, rotate_ends


def heads_plain(
    q_BTHK: Tensor, kv_BTHX: Tensor, k_pe_BTR: Tensor, cis: Tensor, nope: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, T, *] of every head, rotated: the readable twin."""
    q_nope, q_pe = q_BTHK.split([nope, q_BTHK.shape[-1] - nope], dim=-1)
    k_nope, v_BTHV = kv_BTHX.split([nope, kv_BTHX.shape[-1] - nope], dim=-1)
    q_pe = rotate(q_pe, cis, interleaved=interleaved)
    k_pe = rotate(k_pe_BTR.unsqueeze(2), cis, interleaved=interleaved).expand_as(q_pe)
    q, k = torch.cat([q_nope, q_pe], dim=-1), torch.cat([k_nope, k_pe], dim=-1)
    return q.transpose(1, 2), k.transpose(1, 2), v_BTHV.transpose(1, 2)


class _Heads(torch.autograd.Function):
    """Each part is written once to where it belongs, in the layout attention reads; backward the same way."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, kv_BTHX: Tensor, k_pe_BTR: Tensor, cis: Tensor, nope: int, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, H, K = q_BTHK.shape
        ctx.cis, ctx.nope, ctx.interleaved = cis, nope, interleaved
        q, k = q_BTHK.new_empty(B, H, T, K), q_BTHK.new_empty(B, H, T, K)
        q.transpose(1, 2)[..., :nope] = q_BTHK[..., :nope]
        q.transpose(1, 2)[..., nope:] = rotate(q_BTHK[..., nope:], cis, interleaved=interleaved)
        k.transpose(1, 2)[..., :nope] = kv_BTHX[..., :nope]
        k.transpose(1, 2)[..., nope:] = rotate(k_pe_BTR.unsqueeze(2), cis, interleaved=interleaved)
        return q, k, kv_BTHX[..., nope:].transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        nope, back, interleaved = ctx.nope, ctx.cis.conj(), ctx.interleaved
        dq, dk, dv = (y.transpose(1, 2) for y in (dq, dk, dv))
        B, T, H, K = dq.shape
        dq_BTHK, dkv_BTHX = dq.new_empty(B, T, H, K), dv.new_empty(B, T, H, nope + dv.shape[-1])
        dq_BTHK[..., :nope] = dq[..., :nope]
        dq_BTHK[..., nope:] = rotate(dq[..., nope:], back, interleaved=interleaved)
        dkv_BTHX[..., :nope] = dk[..., :nope]
        dkv_BTHX[..., nope:] = dv
        dk_pe = dk[..., nope:].sum(2, keepdim=True, dtype=torch.promote_types(dk.dtype, torch.float32))
        dk_pe_BTR = rotate(dk_pe, back, interleaved=interleaved).squeeze(2).to(dk.dtype)
        return dq_BTHK, dkv_BTHX, dk_pe_BTR, None, None, None


class _NativeKeys(torch.autograd.Function):
    """Keys and values [B, T, H, *] in C, one pass each way."""

    @staticmethod
    def forward(
        ctx: Any, kv_BTHX: Tensor, k_pe_BTR: Tensor, cis: Tensor, nope: int, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        kv_BTHX, pe_NR, cis_SR = kv_BTHX.contiguous(), elements.rows(k_pe_BTR), angles(cis)
        (*BTH, X), R = kv_BTHX.shape, pe_NR.shape[1]
        k, v = kv_BTHX.new_empty(*BTH, nope + R), kv_BTHX.new_empty(*BTH, X - nope)
        ctx.cis_SR, ctx.sizes = cis_SR, (len(cis_SR), len(pe_NR), BTH[2], nope, R, X - nope, interleaved)
        elements.call("mla_keys", k.dtype, kv_BTHX, pe_NR, pe_NR.stride(0), cis_SR, *ctx.sizes, k, v)
        return k, v

    @staticmethod
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        B, T, H, _ = dk.shape
        dkv_BTHX = dk.new_empty(B, T, H, ctx.sizes[3] + dv.shape[-1])
        dpe_BTR = dk.new_empty(B, T, ctx.sizes[4])
        dk, dv = dk.contiguous(), dv.contiguous()
        elements.call("mla_keys_backward", dk.dtype, dk, dv, ctx.cis_SR, *ctx.sizes, dkv_BTHX, dpe_BTR)
        return dkv_BTHX, dpe_BTR, None, None, None


def heads(
    q_BTHK: Tensor, kv_BTHX: Tensor, k_pe_BTR: Tensor, cis: Tensor, nope: int, interleaved: bool, *,
    native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The fast twins of `heads_plain`."""
    if elements.usable(native, q_BTHK, kv_BTHX, k_pe_BTR):
        k, v = _NativeKeys.apply(kv_BTHX, k_pe_BTR, cis, nope, interleaved)
        q = rotate_ends(q_BTHK, cis, interleaved=interleaved)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    q, k, v = _Heads.apply(q_BTHK, kv_BTHX, k_pe_BTR, cis, nope, interleaved)
    return q, k, v


class MLA(nn.Module):
    """`bias` is on q_a_proj, kv_a_proj_with_mqa and o_proj only; the latent norms have eps 1e-6 in every family."""

    def __init__(
        self, d_model: int, heads: int, *, q_lora: int | None, kv_lora: int, nope: int, rope: int, v: int,
        scale: float, interleaved: bool = True, bias: bool = False, device: torch.device | None = None,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.kv_lora, self.nope, self.rope, self.v = heads, kv_lora, nope, rope, v
        self.scale, self.interleaved = scale, interleaved
        if q_lora is None:
            self.q_proj = Linear(d_model, heads * (nope + rope), device=device)
        else:
            self.q_a_proj = Linear(d_model, q_lora, bias=bias, device=device)
            self.q_a_layernorm = RMSNorm(q_lora, device=device)
            self.q_b_proj = Linear(q_lora, heads * (nope + rope), device=device)
        self.kv_a_proj_with_mqa = Linear(d_model, kv_lora + rope, bias=bias, device=device)
        self.kv_a_layernorm = RMSNorm(kv_lora, device=device)
        self.kv_b_proj = Linear(kv_lora, heads * (nope + v), device=device)
        self.o_proj = Linear(heads * v, d_model, bias=bias, device=device)
        self.q_lora = q_lora

    def project(self, x_BTD: Tensor, native: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The products before attention: q [B, T, H, nope+R], latent c [B, T, C] (normed) and k_pe [B, T, R]."""
        first = self.q_proj if self.q_lora is None else self.q_a_proj
        widths = [first.weight.shape[0], self.kv_lora, self.rope]
        q, c_kv, k_pe = together(x_BTD, (first, self.kv_a_proj_with_mqa), native).split(widths, dim=-1)
        if self.q_lora is not None:
            q = self.q_b_proj(self.q_a_layernorm(q, native), native)
        return q.unflatten(-1, (self.heads, -1)), self.kv_a_layernorm(c_kv, native), k_pe

    def naive(self, q_BTHK: Tensor, c_BTC: Tensor, k_pe_BTR: Tensor, step: Pass) -> Tensor:
        """Keys and values of every head written out: heads of width nope + rope and v ("MHA mode")."""
        kv = self.kv_b_proj(c_BTC, step.kernels.native).unflatten(-1, (self.heads, -1))
        q_BHTK, k_BHTK, v_BHTV = heads(
            q_BTHK, kv, k_pe_BTR, step.cis, self.nope, self.interleaved, native=step.kernels.native
        )
        return step.attend(q_BHTK, k_BHTK, v_BHTV, self.scale).transpose(1, 2)

    def absorbed(self, q_BTHK: Tensor, latent_BSW: Tensor, step: Pass) -> Tensor:
        """One shared key of width C + R and one shared value of width C, the latent itself ("MQA mode")."""
        B, T, H, _ = q_BTHK.shape
        q_nope, q_pe = q_BTHK.split([self.nope, self.rope], dim=-1)
        w_HXC = self.kv_b_proj.weight.to(q_BTHK.dtype).view(H, self.nope + self.v, self.kv_lora)
        uk_HNC, uv_HVC = w_HXC.split([self.nope, self.v], dim=1)
        q_HMC = torch.bmm(q_nope.reshape(B * T, H, self.nope).transpose(0, 1), uk_HNC)
        q_pe = rotate(q_pe, step.cis, interleaved=self.interleaved).reshape(B * T, H, self.rope)
        q_BXW = torch.cat([q_HMC.transpose(0, 1), q_pe], dim=-1).view(B, T * H, -1)
        score_BTHS = torch.bmm(q_BXW, latent_BSW.transpose(1, 2)).view(B, T, H, -1).float() * self.scale
        assert step.bias is not None
        p_BTHS = (score_BTHS + step.bias.transpose(1, 2)).softmax(-1).to(q_BTHK.dtype)
        o_BXC = torch.bmm(p_BTHS.view(B, T * H, -1), latent_BSW[..., : self.kv_lora])
        o_HMV = torch.bmm(o_BXC.view(B * T, H, self.kv_lora).transpose(0, 1), uv_HVC.transpose(1, 2))
        return o_HMV.transpose(0, 1).reshape(B, T, H, self.v)

    def forward(self, x_BTD: Tensor, step: Pass, layer: int) -> Tensor:
        q_BTHK, c_BTC, k_pe_BTR = self.project(x_BTD, step.kernels.native)
        if step.cache is not None:
            turned = rotate(k_pe_BTR.unsqueeze(2), step.cis, interleaved=self.interleaved).squeeze(2)
            step.cache.write(layer, step.positions_BT, torch.cat([c_BTC, turned], dim=-1))
        if step.n_keys:
            assert step.cache is not None
            out = self.absorbed(q_BTHK, step.cache.read(layer, step.n_keys), step)
        else:
            out = self.naive(q_BTHK, c_BTC, k_pe_BTR, step)
        return self.o_proj(out.flatten(2), step.kernels.native)
