"""The decoding step in C: built with the machine's own compiler when there is one, left out when there is none.

At a few rows a step the plain twin (infer/layers.py) spends its time between the products: about a hundred small
operations a layer. csrc/decode.c does a whole step in one call, with torch's own threads (the same OpenMP library).
A row's result does not depend on the other rows of the step, to the bit. core/build_c.py builds the library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.core.build_c import Missing, load, once
from shoestring.infer.pages import Pages
from shoestring.infer.products import to_int8
from shoestring.infer.store import Store
from shoestring.nn import native as training
from shoestring.nn.gqa import GQA
from shoestring.nn.linear import Linear, SwiGLU
from shoestring.nn.mla import MLA
from shoestring.nn.moe import MoE
from shoestring.nn.norm import RMSNorm
from shoestring.nn.room import Room

SOURCES = Path(__file__).parent / "csrc"
TILE = 16  # outputs of a packed tile
KEPT = 1 << 23  # logits whose place is kept from step to step: 32 MB, what glibc would keep
WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32}
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


# ---- the library
@once
def library() -> ctypes.CDLL:
    """Built or found in the cache. Raises Missing (core/build_c.py)."""
    made = load(SOURCES, "decode", headers=training.SOURCES)
    for suffix in SUFFIX.values():
        getattr(made, f"shoestring_workspace_{suffix}").restype = c_int64
    return made


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """None when steps of this dtype can run natively here, else the reason."""
    if device.type != "cpu" or dtype not in SUFFIX:
        return f"{dtype} on {device.type} has no native step"
    try:
        library()
    except Missing as missing:
        return str(missing)
    return None


# ---- the structs of csrc/decode.c
class Matrix(Structure):
    """A product's weights: [out, in], or packed."""

    _fields_ = [
        ("weight", c_void_p), ("bias", c_void_p), ("scale", c_void_p), ("out", c_int64), ("in", c_int64),
        ("packed", c_int64),
    ]  # fmt: skip


class Layer(Structure):
    """One layer: where its weights and its part of the cache lie."""

    _fields_ = [
        *((name, c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        *((name, c_float) for name in ("eps1", "eps2", "q_eps", "k_eps")),
        ("first", Matrix * 3),
        *((name, Matrix) for name in ("q_b", "o", "gate_proj", "up_proj", "down_proj", "uk", "uv")),
        *((name, c_void_p) for name in ("keys", "values")),
        ("gate", Matrix), ("gate_bias", c_void_p), ("gate_up", Matrix), ("down", Matrix),
    ]  # fmt: skip


class Model(Structure):
    """The layers and what they have in common."""

    _fields_ = [
        *((name, c_int64) for name in (
            "layers", "D", "H", "G", "latent", "C", "nope", "rope", "v", "q_lora", "interleaved", "size",
            "E", "A", "F", "groups", "kept_groups", "sigmoid", "normalise",
        )),
        *((name, c_float) for name in ("scale", "route_scale", "eps")),
        ("layer", POINTER(Layer)), ("norm", c_void_p),
    ]  # fmt: skip


class Batch(Structure):
    """The rows of one call, and where results go."""

    _fields_ = [
        *((name, c_int64) for name in ("R", "J", "longest", "threads", "kept")),
        *((name, c_void_p) for name in ("length", "table", "turn", "x", "hidden")),
        *((name, c_void_p) for name in ("keep", "kept_length", "kept_table", "chosen", "work")),
    ]  # fmt: skip


# ---- a model's layers, ready to run
def packed(weight: Tensor, pair: int) -> Tensor:
    """Weights [..., out, in] as csrc/products.h reads them fastest: [..., tiles, in / pair, 16], zeros added.

    A pair is one integer here: numbers of 4 bytes are transposed six times as fast as two of 2 bytes.
    """
    out, inputs = weight.shape[-2:]
    padded = F.pad(weight, (0, -inputs % pair, 0, -out % TILE)).contiguous()
    return padded.view(WORD[weight.itemsize * pair]).unflatten(-2, (-1, TILE)).transpose(-2, -1)


def pack_bf16(weight: Tensor, pages: Pages) -> Tensor:
    """`packed(weight.to(bfloat16), 2)` of fp32 weights in one pass in C: a policy's are packed anew at every step."""
    out, inputs = weight.shape[-2:]
    words = pages.take((*weight.shape[:-2], -(-out // TILE), -(-inputs // 2), TILE), torch.int32)
    for part, made in zip(weight.view(-1, out, inputs), words.view(-1, *words.shape[-3:]), strict=True):
        library().shoestring_pack_bf16(
            c_void_p(part.data_ptr()), c_int64(out), c_int64(inputs), c_void_p(made.data_ptr()),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
    return words


class Rows:
    """R rows of one token each: `length_R` positions with the new one (`longest` at most), `table_RJ` their blocks."""

    def __init__(self, length_R: np.ndarray, table_RJ: np.ndarray, longest: int):
        self.length_R, self.table_RJ, self.longest = length_R, table_RJ, longest

    def __len__(self) -> int:
        return len(self.length_R)


def make_rows(positions: Sequence[int], tables: Sequence[Sequence[int]], known: np.ndarray | None = None) -> Rows:
    """Of the rows' positions and block tables; `known`: the table of an earlier step that still holds."""
    length_R = np.asarray(positions, dtype=np.int64) + 1
    if known is None:
        known = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        for row, table in enumerate(tables):
            known[row, : len(table)] = table
    return Rows(length_R, known, max(positions) + 1)


class Weights:
    """Weights as csrc reads them: in the model's dtype or int8, in huge pages, packed."""

    def __init__(self, dtype: torch.dtype, *, int8: bool = False, room: Room | None = None):
        self.dtype, self._int8 = dtype, int8
        self._kept: list[Tensor] = []
        self._pages = Pages(room)

    def at(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """Where it lies, in this dtype and in huge pages; it is kept alive."""
        if tensor is None:
            return None
        ready = self._pages.copy(tensor.detach(), dtype or self.dtype)
        self._kept.append(ready)
        return ready.data_ptr()

    def matrix(self, weight: Tensor, bias_O: Tensor | None = None, *, exact: bool = False) -> Matrix:
        """Of a linear's weights [out, in] or several [parts, out, in]; in int8 where asked for, unless `exact`."""
        weight = weight.detach()
        dtype, scale = self.dtype, None
        if self._int8 and not exact:
            weight_OI, scale_O = to_int8(weight.flatten(0, -2))
            weight, dtype, scale = weight_OI.view_as(weight), torch.int8, self.at(scale_O, torch.float32)
        return self.placed(weight, dtype, self.at(bias_O), scale, pair=2 if self.dtype == torch.bfloat16 else 1)

    def placed(
        self, weight: Tensor, dtype: torch.dtype, bias: int | None = None, scale: int | None = None, *, pair: int = 1
    ) -> Matrix:
        """Packed, unless it is so large that it stays where it lies (int8 has only just been made)."""
        shape = weight.shape[-2:]
        if dtype != torch.int8 and self._pages.keeps(weight, dtype):
            return Matrix(self.at(weight, dtype), bias, scale, *shape, 0)
        if weight.dtype == torch.float32 and dtype == torch.bfloat16 and weight.is_contiguous():
            words = pack_bf16(weight, self._pages)
            self._kept.append(words)
            return Matrix(words.data_ptr(), bias, scale, *shape, 1)
        words = packed(weight.to(dtype), pair)
        return Matrix(self.at(words, words.dtype), bias, scale, *shape, 1)


class NativeHead:
    """hidden [R, D] -> logits fp32 [R, V], there until the next ones; a row does not depend on the others."""

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype, room: Room | None = None):
        self._weights = Weights(dtype, room=room)
        self._matrix = self._weights.matrix(weight_VD)
        self._product = getattr(library(), f"shoestring_product_{SUFFIX[dtype]}")
        self._logits = torch.empty(0)

    def __call__(self, hidden_RD: Tensor) -> Tensor:
        """They lie where the last ones lay, up to KEPT numbers: new ones at every step tear holes into the heap, 18 MB
        for 4 rows of 151,936."""
        hidden_RD, size = hidden_RD.contiguous(), len(hidden_RD) * self._matrix.out
        if len(self._logits) < size <= KEPT:
            self._logits = torch.empty(size)
        room = self._logits[:size] if size <= KEPT else torch.empty(size)
        logits_RV = room.view(len(hidden_RD), self._matrix.out)
        self._product(
            ctypes.byref(self._matrix), c_void_p(hidden_RD.data_ptr()), c_int64(len(hidden_RD)),
            c_void_p(logits_RV.data_ptr()), c_int64(torch.get_num_threads()),
        )  # fmt: skip
        return logits_RV


class NativeLayers:
    """Some blocks over some layers of the cache, and the norm behind them: x [R, D] -> hidden [R, D]."""

    def __init__(
        self, blocks: Sequence[Any], norm: RMSNorm, store: Store, first: int, rope: Any, dtype: torch.dtype, *,
        int8: bool = False,
    ):  # fmt: skip
        self._rope, self._weights = rope, Weights(dtype, int8=int8)
        self._decode = getattr(library(), f"shoestring_decode_{SUFFIX[dtype]}")
        self._size = getattr(library(), f"shoestring_workspace_{SUFFIX[dtype]}")
        self._layers = (Layer * len(blocks))(
            *(self._layer(block, store, first + index) for index, block in enumerate(blocks))
        )
        self._model = self._shape(blocks, norm, store)
        self.moe_layers, self.top_k = sum(isinstance(block.mlp, MoE) for block in blocks), self._model.A
        self._work, self._fits = torch.empty(0, dtype=torch.uint8), (0, 0, 0)  # rows, threads, positions
        self._turn = torch.empty(0)

    # ---- weights
    def _linear(self, layer: Linear) -> Matrix:
        return self._weights.matrix(layer.weight, layer.bias)

    def _layer(self, block: Any, store: Store, index: int) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        made = Layer(
            norm1=self._weights.at(block.input_layernorm.weight), eps1=block.input_layernorm.eps,
            norm2=self._weights.at(block.post_attention_layernorm.weight), eps2=block.post_attention_layernorm.eps,
            keys=store.keys[index].data_ptr(), values=store.values[index].data_ptr(),
            o=self._linear(attention.o_proj),
        )  # fmt: skip
        firsts, q_norm, k_norm = self._latent(made, attention) if isinstance(attention, MLA) else _plain(attention)
        for place, linear in enumerate(firsts):
            made.first[place] = self._linear(linear)
        if q_norm is not None:
            made.q_norm, made.q_eps = self._weights.at(q_norm.weight), q_norm.eps
        if k_norm is not None:
            made.k_norm, made.k_eps = self._weights.at(k_norm.weight), k_norm.eps
        dense: SwiGLU | None = mlp.shared_experts if isinstance(mlp, MoE) else mlp
        if dense is not None:
            made.gate_proj, made.up_proj = self._linear(dense.gate_proj), self._linear(dense.up_proj)
            made.down_proj = self._linear(dense.down_proj)
        if isinstance(mlp, MoE):
            gate = mlp.gate
            made.gate = self._weights.placed(gate.weight.detach(), torch.float32)
            made.gate_bias = self._weights.at(gate.e_score_correction_bias, torch.float32)
            made.gate_up = self._weights.matrix(mlp.experts.gate_up_proj.unflatten(1, (2, -1)).flatten(0, 1))
            made.down = self._weights.matrix(mlp.experts.down_proj)
        return made

    def _latent(self, made: Layer, mla: MLA) -> tuple[list[Linear], RMSNorm | None, RMSNorm]:
        kv_HXC = mla.kv_b_proj.weight.detach().view(mla.heads, mla.nope + mla.v, mla.kv_lora)
        uk_HNC, uv_HVC = kv_HXC.split([mla.nope, mla.v], dim=1)
        made.uk, made.uv = (
            self._weights.matrix(uk_HNC.transpose(1, 2), exact=True),
            self._weights.matrix(uv_HVC, exact=True),
        )
        if mla.q_lora is None:
            return [mla.q_proj, mla.kv_a_proj_with_mqa], None, mla.kv_a_layernorm
        made.q_b = self._linear(mla.q_b_proj)
        return [mla.q_a_proj, mla.kv_a_proj_with_mqa], mla.q_a_layernorm, mla.kv_a_layernorm

    def _shape(self, blocks: Sequence[Any], norm: RMSNorm, store: Store) -> Model:
        attention = blocks[0].self_attn
        made = Model(
            layers=len(blocks), D=len(norm.weight), size=store.size, layer=self._layers,
            norm=self._weights.at(norm.weight), eps=norm.eps, groups=1, kept_groups=1,
        )  # fmt: skip
        if isinstance(attention, MLA):
            made.latent, made.H, made.G, made.C = 1, attention.heads, 1, attention.kv_lora
            made.nope, made.rope, made.v, made.q_lora = (
                attention.nope,
                attention.rope,
                attention.v,
                attention.q_lora or 0,
            )
            made.interleaved, made.scale = attention.interleaved, attention.scale
        else:
            made.H, made.G, made.v, made.rope = (
                attention.heads,
                attention.kv_heads,
                attention.head_dim,
                attention.head_dim,
            )
            made.scale = attention.head_dim**-0.5
        moe = next((block.mlp for block in blocks if isinstance(block.mlp, MoE)), None)
        if moe is not None:
            routing = moe.gate.routing
            made.E, made.A, made.F = routing.n_experts, routing.top_k, moe.experts.down_proj.shape[2]
            made.groups, made.kept_groups, made.sigmoid = (
                routing.n_group,
                routing.topk_group,
                routing.scoring == "sigmoid",
            )
            made.normalise, made.route_scale = routing.normalise, routing.scale
        return made

    # ---- a step
    def run(
        self, x_RD: Tensor, rows: Rows, *, routed: bool = False, ahead: int = 0, keep: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [R, D] after the norm, and the chosen experts [MoE layers, R, A] when asked for.

        Entries of the cache are written first, so rows may be consecutive tokens of one sequence. `ahead`: how many
        positions later RoPE counts (the MTP module's tokens). `keep`: the rows, ascending, whose hidden states somebody
        wants; of the others the last layer computes keys and values alone, and their states are NaN.
        """
        assert keep is None or not routed
        R, J = rows.table_RJ.shape
        longest, threads = rows.longest, torch.get_num_threads()
        if (R, threads) != self._fits[:2] or longest > self._fits[2]:
            self._grow(R, longest, threads)
        if longest + ahead > len(self._turn):
            positions_S = torch.arange(max(256, 2 * (longest + ahead)))
            self._turn = torch.view_as_real(self._rope.table(positions_S)).flatten(1).contiguous()
        x_RD = x_RD.contiguous()
        hidden_RD = torch.empty_like(x_RD) if keep is None else torch.full_like(x_RD, torch.nan)
        chosen = torch.empty(self.moe_layers, R, self.top_k, dtype=torch.int64) if routed and self.moe_layers else None
        keep_r = None if keep is None else np.asarray(keep, dtype=np.int64)
        kept = None if keep_r is None else (keep_r, rows.length_R[keep_r], rows.table_RJ[keep_r])
        batch = Batch(
            R, J, longest, threads, R if keep is None else len(keep), rows.length_R.ctypes.data,
            rows.table_RJ.ctypes.data, self._turn[ahead:].data_ptr(), x_RD.data_ptr(), hidden_RD.data_ptr(),
            *((None, None, None) if kept is None else (array.ctypes.data for array in kept)),
            None if chosen is None else chosen.data_ptr(), self._work.data_ptr(),
        )  # fmt: skip
        self._decode(ctypes.byref(self._model), ctypes.byref(batch))
        return hidden_RD, chosen

    def _grow(self, R: int, longest: int, threads: int) -> None:
        """Work space, if it is too small, for these and some longer rows."""
        self._fits = (R, threads, longest + 64)
        size = self._size(ctypes.byref(self._model), c_int64(R), c_int64(self._fits[2]), c_int64(threads))
        if size > len(self._work):
            self._work = torch.empty(size + size // 4, dtype=torch.uint8)


def _plain(gqa: GQA) -> tuple[list[Linear], RMSNorm | None, RMSNorm | None]:
    return [gqa.q_proj, gqa.k_proj, gqa.v_proj], gqa.q_norm, gqa.k_norm
