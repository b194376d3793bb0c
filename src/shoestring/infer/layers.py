"""The decoder's layers prepared for inference: the same numbers as nn/, fewer and larger products.

A step's tokens lie flat, [N, D]: first the rows that decode one token each, then chunks of prompts. Everything but
attention runs on all of them at once. MLA decodes absorbed ("MQA mode"), and where it costs little more weights,
W_UK is multiplied into the query's projection and W_UV into the output's once, when the weights are prepared:

    q̃ = U_kᵀ (W_qb c_q)_nope = (U_kᵀ W_qb,nope) c_q          out = W_o (U_v õ) = (W_o U_v) õ

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1 and appendix C. The plain twin is the model's own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.infer.attend import FixedPlan, Plan, attend_blocks
from shoestring.infer.chunks import Chunk, attend_absorbed, attend_expanded, attend_fresh, expands, together
from shoestring.infer.products import Product, through_int8
from shoestring.infer.store import Store
from shoestring.nn.gqa import GQA
from shoestring.nn.linear import SwiGLU
from shoestring.nn.mla import MLA
from shoestring.nn.norm import RMSNorm
from shoestring.nn.rope import rotate

FUSE = 2.5  # fused projections may have so many times the weights of those they replace


@dataclass(slots=True)
class Step:
    """What the layers of one pass share. Rows [0, R) decode, the rest are `chunks`."""

    R: int
    cis_N: Tensor  # RoPE's table [N, 1, Rope/2]
    slot_M: Tensor  # where each token's heads go in the flat arena
    store: Store
    plan: Plan | FixedPlan | None
    bias_R1S: Tensor | None
    chunks: list[Chunk]

    def attend(self, q_RHK: Tensor, layer: int, scale: float) -> Tensor:
        """The decoding rows against their blocks."""
        keys, values = self.store.keys[layer], self.store.values[layer]
        if isinstance(self.plan, FixedPlan):
            return self.plan.attend(q_RHK, keys, values, scale)
        assert self.plan is not None and self.bias_R1S is not None
        return attend_blocks(q_RHK, keys, values, self.plan, self.bias_R1S, scale)


class Norm:
    """As nn/norm.py, by torch's kernel; statistics in fp32."""

    def __init__(self, layer: RMSNorm, dtype: torch.dtype):
        self.weight_D, self.eps = layer.weight.detach().to(dtype), layer.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight_D.shape, self.weight_D, self.eps)


@dataclass(slots=True)
class Making:
    """How products are made: their dtype, their tile (0: as many rows as come), and the class that makes them.

    `absorb`: multiply MLA's weights together where that pays for rows that decode. `int8`: with the weights that int8
    leaves, so that prompts are read by the same model as native rows.
    """

    dtype: torch.dtype
    tile: int = 0
    absorb: bool = True
    int8: bool = False

    def __call__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Product:
        weight_OI = through_int8(weight_OI) if self.int8 else weight_OI
        return Product(weight_OI, bias_O, dtype=self.dtype, tile=self.tile)

    def exactly(self, weight_OI: Tensor) -> Product:
        """Of weights that are never rounded to int8: the head's, and MLA's from the latent to keys and values."""
        return Product(weight_OI, None, dtype=self.dtype, tile=self.tile)

    def join(self, *layers: Any) -> Product:
        """Several linears of one input as one product."""
        bias = None
        if any(layer.bias is not None for layer in layers):
            zero = [torch.zeros_like(layer.weight[:, 0]) for layer in layers]
            bias = torch.cat([z if layer.bias is None else layer.bias for layer, z in zip(layers, zero, strict=True)])
        return self(torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight, bias)


class PreparedMLA:
    """Absorbed for rows that decode; expanded or absorbed for chunks."""

    def __init__(self, mla: MLA, make: Making):
        self.mla, self.scale = mla, mla.scale
        self.kv_norm = Norm(mla.kv_a_layernorm, make.dtype)
        self.q_norm = None if mla.q_lora is None else Norm(mla.q_a_layernorm, make.dtype)
        H, C, R, nope = mla.heads, mla.kv_lora, mla.rope, mla.nope
        q_source = mla.q_proj if mla.q_lora is None else mla.q_b_proj
        wq_HKX = q_source.weight.detach().view(H, nope + R, -1)
        kv_HXC = mla.kv_b_proj.weight.detach().view(H, nope + mla.v, C)
        uk_HNC, uv_HVC = kv_HXC.split([nope, mla.v], dim=1)
        self.uk_HNC, self.uv_HCV = uk_HNC.to(make.dtype), uv_HVC.transpose(1, 2).to(make.dtype).contiguous()
        self.o_proj = make(mla.o_proj.weight, mla.o_proj.bias)
        self.kv_b = make.exactly(mla.kv_b_proj.weight)
        self.q_widths = [H * C, H * R]
        absorbed = wq_HKX.shape[-1] * H * (C + R)
        self.fused_q = make.absorb and absorbed <= FUSE * (wq_HKX.numel() + uk_HNC.numel())
        wq_absorbed = None
        if self.fused_q:
            latent_HCX = torch.bmm(uk_HNC.transpose(1, 2).double(), wq_HKX[:, :nope].double()).to(wq_HKX.dtype)
            wq_absorbed = torch.cat([latent_HCX.flatten(0, 1), wq_HKX[:, nope:].flatten(0, 1)])
        kv_a = mla.kv_a_proj_with_mqa
        if mla.q_lora is None:
            self.first = make.join(mla.q_proj, kv_a)
            self.q_absorbed = None if wq_absorbed is None else make(torch.cat([wq_absorbed, kv_a.weight]), _after(
                wq_absorbed, kv_a.bias))  # fmt: skip
            self.q_b: Product | None = None
        else:
            self.first = make.join(mla.q_a_proj, kv_a)
            self.q_absorbed = None if wq_absorbed is None else make(wq_absorbed)
            self.q_b = make(mla.q_b_proj.weight)
        self.o_absorbed: Product | None = None
        wo_DHV = mla.o_proj.weight.detach().view(-1, H, mla.v)
        if make.absorb and wo_DHV.shape[0] * H * (C + R) <= FUSE * (wo_DHV.numel() + uv_HVC.numel()):
            wo_HDC = torch.bmm(wo_DHV.transpose(0, 1).double(), uv_HVC.double()).to(wo_DHV.dtype)
            # the cached entry is [c | k_pe]: zeros meet its last part, so that the product needs no slice
            self.o_absorbed = make(F.pad(wo_HDC, (0, R)).transpose(0, 1).flatten(1), mla.o_proj.bias)

    def __call__(self, h_ND: Tensor, x_ND: Tensor, step: Step, layer: int) -> Tensor:
        """Attention(h) + x; the new entries go into the cache first."""
        R = step.R
        parts = []
        if len(h_ND) == R:
            return self._decode(h_ND, x_ND, step, layer, slice(0, R))
        if R:
            parts.append(self._decode(h_ND[:R], x_ND[:R], step, layer, slice(0, R)))
        parts.append(self._chunks(h_ND[R:], x_ND[R:], step, layer))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _entry(self, c_NC: Tensor, k_pe_NR: Tensor, q_pe_NHR: Tensor, step: Step, rows: slice) -> tuple[Tensor, Tensor]:
        """The cached entry [N, C+R] and the turned q_pe: query and key heads turn together."""
        pe = torch.cat([q_pe_NHR, k_pe_NR.unsqueeze(1)], dim=1)
        pe = rotate(pe, step.cis_N[rows], interleaved=self.mla.interleaved)
        return torch.cat([self.kv_norm(c_NC), pe[:, -1]], dim=-1), pe[:, :-1]

    def _write(self, entry_NW: Tensor, step: Step, layer: int, rows: slice) -> None:
        step.store.write(step.store.keys[layer], step.slot_M[rows], entry_NW)

    def _decode(self, h_RD: Tensor, x_RD: Tensor, step: Step, layer: int, rows: slice) -> Tensor:
        mla, H, C, rope = self.mla, self.mla.heads, self.mla.kv_lora, self.mla.rope
        q_RHW, entry_RW = self._absorbed_queries(h_RD, step, rows)
        self._write(entry_RW, step, layer, rows)
        o_RHW = step.attend(q_RHW, layer, self.scale)
        if self.o_absorbed is not None:
            return self.o_absorbed(o_RHW.reshape(-1, H * (C + rope)), x_RD)
        return self.o_proj(self._expand_values(o_RHW[..., :C]).reshape(-1, H * mla.v), x_RD)

    def _expand_values(self, o_NHC: Tensor) -> Tensor:
        return torch.bmm(o_NHC.transpose(0, 1), self.uv_HCV).transpose(0, 1)

    def _absorbed_queries(self, h_ND: Tensor, step: Step, rows: slice) -> tuple[Tensor, Tensor]:
        """Queries [N, H, C+R] against the latent, and the entries [N, C+R]."""
        mla, H = self.mla, self.mla.heads
        if self.q_absorbed is None:
            q_NHK, c_NC, k_pe_NR = self._plain_queries(h_ND)
            q_nope, q_pe = q_NHK.split([mla.nope, mla.rope], dim=-1)
            q_NHC = torch.bmm(q_nope.transpose(0, 1), self.uk_HNC).transpose(0, 1)
        elif self.q_b is None:
            q_NX, q_pe, c_NC, k_pe_NR = self.q_absorbed(h_ND).split([*self.q_widths, mla.kv_lora, mla.rope], dim=-1)
            q_NHC, q_pe = q_NX.unflatten(-1, (H, -1)), q_pe.unflatten(-1, (H, -1))
        else:
            q_NQ, c_NC, k_pe_NR = self.first(h_ND).split([self.q_b.in_features, mla.kv_lora, mla.rope], dim=-1)
            assert self.q_norm is not None
            q_NX, q_pe = self.q_absorbed(self.q_norm(q_NQ)).split(self.q_widths, dim=-1)
            q_NHC, q_pe = q_NX.unflatten(-1, (H, -1)), q_pe.unflatten(-1, (H, -1))
        entry_NW, q_pe = self._entry(c_NC, k_pe_NR, q_pe, step, rows)
        return torch.cat([q_NHC, q_pe], dim=-1), entry_NW

    def _plain_queries(self, h_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mla = self.mla
        width = self.first.out_features - mla.kv_lora - mla.rope
        q, c_NC, k_pe_NR = self.first(h_ND).split([width, mla.kv_lora, mla.rope], dim=-1)
        if self.q_b is not None and self.q_norm is not None:
            q = self.q_b(self.q_norm(q))
        return q.unflatten(-1, (mla.heads, -1)), c_NC, k_pe_NR

    def _chunks(self, h_ND: Tensor, x_ND: Tensor, step: Step, layer: int) -> Tensor:
        mla, rows = self.mla, slice(step.R, None)
        q_NHK, c_NC, k_pe_NR = self._plain_queries(h_ND)
        q_nope, q_pe = q_NHK.split([mla.nope, mla.rope], dim=-1)
        entry_NW, q_pe = self._entry(c_NC, k_pe_NR, q_pe, step, rows)
        self._write(entry_NW, step, layer, rows)
        out_NHV = h_ND.new_empty(len(h_ND), mla.heads, mla.v)
        cost, saved = mla.kv_lora * (mla.nope + mla.v), 2 * mla.kv_lora - mla.nope - mla.v
        fresh, later = together(step.chunks)
        if fresh:  # nothing before them: the new entries are all the keys
            k_nope, v_NHV = self.kv_b(entry_NW[:, : mla.kv_lora]).unflatten(-1, (mla.heads, -1)).split(
                [mla.nope, mla.v], dim=-1
            )  # fmt: skip
            k_pe = entry_NW[:, None, mla.kv_lora :]
            attend_fresh((q_nope, q_pe), (k_nope, k_pe), (v_NHV,), fresh, self.scale, out_NHV)
        for chunk in later:
            here = chunk.rows
            history_SW = chunk.history(step.store, step.store.keys[layer], entry_NW[here].unsqueeze(1))[0]
            if expands(chunk, cost, saved):
                kv_SHX = self.kv_b(history_SW[:, : mla.kv_lora]).unflatten(-1, (mla.heads, -1))
                k_nope, v_SHV = kv_SHX.split([mla.nope, mla.v], dim=-1)
                k_pe = history_SW[:, None, mla.kv_lora :].expand(-1, mla.heads, -1)
                q_THK, k_SHK = torch.cat([q_nope[here], q_pe[here]], -1), torch.cat([k_nope, k_pe], -1)
                out_NHV[here] = attend_expanded(q_THK, k_SHK, v_SHV, chunk, self.scale)
            else:
                q_THC = torch.bmm(q_nope[here].transpose(0, 1), self.uk_HNC).transpose(0, 1)
                q_THW = torch.cat([q_THC, q_pe[here]], dim=-1)
                o_THW = attend_absorbed(q_THW, history_SW, chunk, self.scale)
                out_NHV[here] = self._expand_values(o_THW[..., : mla.kv_lora])
        return self.o_proj(out_NHV.flatten(1), x_ND)


def _after(first: Tensor, bias: Tensor | None) -> Tensor | None:
    """A bias for the rows that come after `first`'s."""
    return None if bias is None else torch.cat([bias.new_zeros(len(first)), bias])


class PreparedGQA:
    """Keys and values of G heads; queries of H."""

    def __init__(self, gqa: GQA, make: Making):
        self.gqa, self.scale = gqa, gqa.head_dim**-0.5
        self.first = make.join(gqa.q_proj, gqa.k_proj, gqa.v_proj)
        self.q_norm = None if gqa.q_norm is None else Norm(gqa.q_norm, make.dtype)
        self.k_norm = None if gqa.k_norm is None else Norm(gqa.k_norm, make.dtype)
        self.o_proj = make(gqa.o_proj.weight, gqa.o_proj.bias)

    def __call__(self, h_ND: Tensor, x_ND: Tensor, step: Step, layer: int) -> Tensor:
        gqa, R, G = self.gqa, step.R, self.gqa.kv_heads
        qkv = self.first(h_ND).unflatten(-1, (-1, gqa.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(qkv[:, : gqa.heads]), self.k_norm(qkv[:, gqa.heads : -G])
            turned = rotate(torch.cat([q, k], dim=1), step.cis_N, interleaved=False)
        else:
            turned = rotate(qkv[:, :-G], step.cis_N, interleaved=False)
        q_NHK, k_NGK, v_NGK = turned[:, : gqa.heads], turned[:, gqa.heads :], qkv[:, -G:]
        keys, values = step.store.keys[layer], step.store.values[layer]
        step.store.write(keys, step.slot_M, k_NGK)
        step.store.write(values, step.slot_M, v_NGK)
        if len(h_ND) == R:
            return self.o_proj(step.attend(q_NHK.contiguous(), layer, self.scale).flatten(1), x_ND)
        out_NHK = torch.empty_like(q_NHK)
        if R:
            out_NHK[:R] = step.attend(q_NHK[:R].contiguous(), layer, self.scale)
        fresh, later = together(step.chunks)
        if fresh:
            attend_fresh((q_NHK[R:],), (k_NGK[R:],), (v_NGK[R:],), fresh, self.scale, out_NHK[R:])
        for chunk in later:
            here = slice(R + chunk.rows.start, R + chunk.rows.stop)
            k_GSK = chunk.history(step.store, keys, k_NGK[here])
            v_GSK = chunk.history(step.store, values, v_NGK[here])
            k, v = k_GSK.transpose(0, 1), v_GSK.transpose(0, 1)
            out_NHK[here] = attend_expanded(q_NHK[here], k, v, chunk, self.scale)
        return self.o_proj(out_NHK.flatten(1), x_ND)


class PreparedSwiGLU:
    """x + down(silu(gate) · up)."""

    def __init__(self, mlp: SwiGLU, make: Making):
        self.gate_up = make.join(mlp.gate_proj, mlp.up_proj)
        self.down = make(mlp.down_proj.weight, mlp.down_proj.bias)

    def __call__(self, h_ND: Tensor, x_ND: Tensor) -> Tensor:
        return self.down(silu_gate(self.gate_up(h_ND)), x_ND)


def silu_gate(h_N2F: Tensor) -> Tensor:
    """silu(gate) · up for [gate | up]."""
    gate, up = h_N2F.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
