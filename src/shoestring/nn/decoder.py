"""The decoder every family shares: embedding, pre-norm blocks, final norm, head; and what a forward pass returns.

    x += Attention(RMSNorm(x));  x += FFN(RMSNorm(x))

Module names are those of Hugging Face's checkpoints, so state-dict keys need no table (stacked experts and MTP
modules apart: models/checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.nn.attention import Pass, cache_bias, segment_bias
from shoestring.nn.attention_native import seen_in
from shoestring.nn.cache import Cache
from shoestring.nn.gqa import GQA
from shoestring.nn.kernels import Kernels
from shoestring.nn.linear import Linear, SwiGLU
from shoestring.nn.mla import MLA
from shoestring.nn.moe import MoE, balance_loss, expert_load
from shoestring.nn.norm import RMSNorm
from shoestring.nn.rope import Rope
from shoestring.nn.tied import both_ends, worth_it


@dataclass(slots=True)
class Output:
    """What a forward pass returns. `hidden_BTD` is after the final norm; it and each `mtp_hidden` feed the head."""

    hidden_BTD: Tensor
    logits_BTV: Tensor | None = None  # fp32
    mtp_hidden: list[Tensor] = field(default_factory=list)  # depth k: [B, T-k, D]; position i predicts t_{i+k+1}
    balance: Tensor | None = None  # Σ over MoE layers of the sequence-wise Σ f·P, without α
    routed: Tensor | None = None  # [L, B, T, A]: the experts each token went to, MoE layers of the main model
    expert_load_LE: Tensor | None = None  # tokens each expert received; the MTP modules' layers come last
    head_VD: Tensor | None = None  # the head as losses are to see it, where that spares a gradient (nn/tied.py)

    @property
    def logits(self) -> Tensor | None:
        return self.logits_BTV


@dataclass(slots=True)
class Routed:
    """What MoE layers leave behind in one pass."""

    n_experts: int = 0
    chosen: list[Tensor] = field(default_factory=list)  # per layer [B, T, A]
    mtp_chosen: list[Tensor] = field(default_factory=list)
    balance: list[Tensor] = field(default_factory=list)


class Block(nn.Module):
    """Attention, then a dense or an MoE feed-forward, each on the normed input and added to it."""

    def __init__(
        self, d_model: int, eps: float, attention: MLA | GQA, mlp: SwiGLU | MoE, *, device: torch.device | None = None
    ):
        super().__init__()
        self.input_layernorm = RMSNorm(d_model, eps, device=device)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(d_model, eps, device=device)
        self.mlp = mlp

    def forward(
        self, x_BTD: Tensor, step: Pass, layer: int, replay_BTA: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The block's output, and for an MoE block (scores [B, T, E], chosen experts [B, T, A])."""
        native = step.kernels.native
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD, native), step, layer)
        h_BTD = self.post_attention_layernorm(x_BTD, native)
        if isinstance(self.mlp, SwiGLU):
            return x_BTD + self.mlp(h_BTD, native), None
        y_BTD, score_BTE, chosen_BTA = self.mlp(h_BTD, step.kernels, replay_BTA)
        return x_BTD + y_BTD, (score_BTE, chosen_BTA)


class Embedding(nn.Module):
    """The input table."""

    def __init__(self, vocab: int, d_model: int, device: torch.device | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, d_model, device=device))


class Backbone(nn.Module):
    """What Hugging Face calls `model`: table, blocks and final norm."""

    def __init__(self, blocks: Iterable[Block], vocab: int, d_model: int, eps: float, device: torch.device | None):
        super().__init__()
        self.embed_tokens = Embedding(vocab, d_model, device)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(d_model, eps, device=device)


class Decoder(nn.Module):
    """A family builds its blocks and hands them over; this class runs them."""

    config: Any  # the family's: names and meanings of Hugging Face's config.json
    softcap = 0.0  # behind the head: none in our families (models/any.py has some)
    constant = 0.0  # at the end of every state, for a bias of the head: likewise

    def __init__(
        self, blocks: Iterable[Block], *, vocab: int, d_model: int, eps: float, tied: bool, rope: Rope,
        kernels: Kernels, cache_width: int, n_experts: int = 0, device: torch.device | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model = Backbone(blocks, vocab, d_model, eps, device)
        self.lm_head = None if tied else Linear(d_model, vocab, device=device)
        self.rope, self.kernels = rope, kernels
        self.cache_width, self.n_experts = cache_width, n_experts

    # ---- parts
    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def embedding(self) -> Tensor:
        return self.model.embed_tokens.weight

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding itself when tied."""
        return self.embedding if self.lm_head is None else self.lm_head.weight

    def unembed(self, hidden: Tensor) -> Tensor:
        """fp32 logits; the product runs in the dtype of `hidden`."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.embedding).to(self.kernels.torch_dtype)

    def _ends(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens' embeddings, and the head where the table is both and worth the trouble."""
        if self.lm_head is not None or not worth_it(self.embedding, self.kernels.native):
            return self.embed(tokens_BT), None
        rows_BTD, head_VD = both_ends(self.embedding, tokens_BT)
        return rows_BTD.to(self.kernels.torch_dtype), head_VD

    def new_cache(self, batch: int, capacity: int) -> Cache:
        layers = len(self.model.layers)
        dtype, device = self.kernels.torch_dtype, self.embedding.device
        return Cache(layers, batch, capacity, self.cache_width, dtype=dtype, device=device)

    @torch.no_grad()
    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Every matrix from N(0, std²); norms are 1 and biases 0 already."""
        for parameter in self.parameters():
            if parameter.ndim > 1 and not parameter.is_meta:
                parameter.normal_(0.0, std, generator=generator)

    # ---- one pass
    def prepare(
        self, tokens_BT: Tensor, positions_BT: Tensor | None, segments_BT: Tensor | None, cache: Cache | None
    ) -> Pass:
        """Positions, mask and RoPE table, shared by all layers."""
        T, dtype = tokens_BT.shape[1], self.kernels.torch_dtype
        if cache is None:
            positions = torch.arange(T, device=tokens_BT.device) if positions_BT is None else positions_BT
            cis = self.rope.table(positions)
            if segments_BT is None:
                return Pass(cis, None, self.kernels)
            if self.kernels.attention == "native":
                return Pass(cis, None, self.kernels, seen=seen_in(segments_BT))
            return Pass(cis, segment_bias(segments_BT, dtype), self.kernels)
        if segments_BT is not None:
            raise ValueError("segments and a cache cannot be combined")
        if positions_BT is None:
            positions = torch.arange(cache.used, cache.used + T, device=tokens_BT.device)
            end, fresh = cache.used + T, cache.used == 0
        else:
            positions = positions_BT
            end, fresh = max(cache.used, int(positions_BT.max()) + 1), False
        if end > cache.capacity:
            raise ValueError(f"position {end - 1} does not fit into a cache of {cache.capacity}")
        bias = None if fresh else cache_bias(positions if positions.ndim == 2 else positions[None], end, dtype)
        return Pass(self.rope.table(positions), bias, self.kernels, cache, positions_BT, 0 if fresh else end)

    def forward(
        self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, segments_BT: Tensor | None = None,
        cache: Cache | None = None, logits: bool = True, mtp: bool = False, balance: bool = False,
        routing: Tensor | None = None,
    ) -> Output:  # fmt: skip
        """One pass over tokens [B, T].

        `segments_BT`: attention stays inside runs of equal ids; a negative id marks padding, which experts do not
        count. `cache`: keys are read from and written to it, index == position. `routing` [L, B, T, A] replays
        recorded expert choices (their weights are still computed). `mtp` and `balance` ask for those outputs.
        """
        step = self.prepare(tokens_BT, positions_BT, segments_BT, cache)
        counted_BT = None if segments_BT is None else segments_BT >= 0
        seen = Routed(self.n_experts)
        x_BTD, head_VD = self._ends(tokens_BT)
        for layer, block in enumerate(self.model.layers):
            assert isinstance(block, Block)
            replay = routing[len(seen.chosen)] if routing is not None and isinstance(block.mlp, MoE) else None
            x_BTD, routed = block(x_BTD, step, layer, replay)
            if routed is not None:
                seen.chosen.append(routed[1])
                if balance:
                    seen.balance.append(balance_loss(routed[0], routed[1], counted_BT))
        if cache is not None:
            cache.used = max(cache.used, step.n_keys or tokens_BT.shape[1])
        hidden_BTD = self.model.norm(x_BTD, self.kernels.native)
        out = Output(hidden_BTD, self.unembed(hidden_BTD) if logits else None, head_VD=head_VD)
        if mtp:
            out.mtp_hidden = self.predict_further(tokens_BT, hidden_BTD, positions_BT, segments_BT, seen, balance)
        if seen.chosen:
            out.routed = torch.stack(seen.chosen)
            out.expert_load_LE = expert_load(seen.chosen + seen.mtp_chosen, self.n_experts, counted_BT)
        if seen.balance:
            out.balance = torch.stack(seen.balance).sum()
        return out

    def predict_further(
        self, tokens_BT: Tensor, hidden_BTD: Tensor, positions_BT: Tensor | None, segments_BT: Tensor | None,
        seen: Routed, balance: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Hidden states of multi-token prediction; families without it have none."""
        raise ValueError(f"{type(self).__name__} has no multi-token prediction module")
