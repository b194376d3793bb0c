"""Multi-head latent attention (V3 section 2.1.1; V2 section 2.1 and appendix C).

    c_q = RMSNorm(W_qa h)            q = W_qb c_q = per head [q_nope | q_pe]     (without q_lora_rank: q = W_q h)
    [c_kv | k_pe] = W_kva h          c = RMSNorm(c_kv); k_pe is one head shared by all, and is not normed
    [k_nope | v] per head = W_kvb c  RoPE on q_pe and k_pe
    o = softmax((q_nope·k_nope + q_pe·k_pe) · scale) v                           out = W_o o

Only c and k_pe are cached. Two ways to attend: `naive` expands keys and values per head (training, prefill);
`absorbed` moves W_kvb to the query and the output and attends in the latent space (decoding). Same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoestring.nn.attention import Pass
from shoestring.nn.linear import Linear, together
from shoestring.nn.norm import RMSNorm
from shoestring.nn.rope import rotate


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

    def project(self, x_BTD: Tensor, step: Pass) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parts: q_nope [B,T,H,nope], q_pe [B,T,H,R] rotated, latent c [B,T,C], k_pe [B,T,R] rotated."""
        if self.q_lora is None:
            q, kv = together(x_BTD, (self.q_proj, self.kv_a_proj_with_mqa)).split(
                [self.heads * (self.nope + self.rope), self.kv_lora + self.rope], dim=-1
            )
        else:
            c_q, kv = together(x_BTD, (self.q_a_proj, self.kv_a_proj_with_mqa)).split(
                [self.q_lora, self.kv_lora + self.rope], dim=-1
            )
            q = self.q_b_proj(self.q_a_layernorm(c_q))
        q_nope, q_pe = q.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], dim=-1)
        c_kv, k_pe = kv.split([self.kv_lora, self.rope], dim=-1)
        q_pe = rotate(q_pe, step.cos, step.sin, interleaved=self.interleaved)
        k_pe = rotate(k_pe.unsqueeze(2), step.cos, step.sin, interleaved=self.interleaved).squeeze(2)
        return q_nope, q_pe, self.kv_a_layernorm(c_kv), k_pe

    def naive(self, q_nope: Tensor, q_pe: Tensor, c_BSC: Tensor, k_pe_BSR: Tensor, step: Pass) -> Tensor:
        """Keys and values of every head written out: heads of width nope + rope and v ("MHA mode")."""
        kv = self.kv_b_proj(c_BSC).unflatten(-1, (self.heads, self.nope + self.v))
        k_nope, v = kv.split([self.nope, self.v], dim=-1)
        k_pe = k_pe_BSR.unsqueeze(2).expand(-1, -1, self.heads, -1)
        return step.attend(torch.cat([q_nope, q_pe], dim=-1), torch.cat([k_nope, k_pe], dim=-1), v, self.scale)

    def absorbed(self, q_nope: Tensor, q_pe: Tensor, latent_BSW: Tensor, step: Pass) -> Tensor:
        """One shared key of width C + R and one shared value of width C, the latent itself ("MQA mode")."""
        B, T, H, _ = q_nope.shape
        w_HWC = self.kv_b_proj.weight.to(q_nope.dtype).view(H, self.nope + self.v, self.kv_lora)
        uk_HNC, uv_HVC = w_HWC.split([self.nope, self.v], dim=1)
        q_HMC = torch.bmm(q_nope.reshape(B * T, H, self.nope).transpose(0, 1), uk_HNC)
        q_BXW = torch.cat([q_HMC.transpose(0, 1), q_pe.reshape(B * T, H, self.rope)], dim=-1).view(B, T * H, -1)
        score_BTHS = torch.bmm(q_BXW, latent_BSW.transpose(1, 2)).view(B, T, H, -1).float() * self.scale
        assert step.mask is not None
        p_BTHS = score_BTHS.masked_fill(~step.mask.transpose(1, 2), float("-inf")).softmax(-1).to(q_nope.dtype)
        o_BXC = torch.bmm(p_BTHS.view(B, T * H, -1), latent_BSW[..., : self.kv_lora])
        o_HMV = torch.bmm(o_BXC.view(B * T, H, self.kv_lora).transpose(0, 1), uv_HVC.transpose(1, 2))
        return o_HMV.transpose(0, 1).reshape(B, T, H, self.v)

    def forward(self, x_BTD: Tensor, step: Pass, layer: int) -> Tensor:
        q_nope, q_pe, c_BTC, k_pe_BTR = self.project(x_BTD, step)
        if step.cache is not None:
            step.cache.write(layer, step.positions_BT, torch.cat([c_BTC, k_pe_BTR], dim=-1))
        if step.n_keys:
            assert step.cache is not None
            out = self.absorbed(q_nope, q_pe, step.cache.read(layer, step.n_keys), step)
        else:
            out = self.naive(q_nope, q_pe, c_BTC, k_pe_BTR, step)
        return self.o_proj(out.flatten(2))
