"""ModelShape: the one description of a decoder's shape, and what follows from it by counting alone.

Parameters (total, active, by part), FLOPs a token, key-value numbers a token. Sources: DeepSeek-V3 report
(arXiv 2412.19437) sections 2.1, 2.2, 4.2 and its released config; Megatron-LM (arXiv 2104.04473) for the
FLOP conventions. Left out: encoders; layers with a state are known as sums only (`counted`, `state_flops`).

Conventions. A matrix product of n parameters costs 2n FLOPs a token forward and 6n in training. Attention is
counted beside it, over S/2 keys (causal) or S keys (full, as many papers do). Router, shared expert and head
are counted, the input table is not. Hardware FLOPs (recomputation) are not counted here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from shoestring.core.errors import UserError


@dataclass(frozen=True, slots=True)
class ParamCount:
    """Parameters by part; the parts from `embedding` to `head` add up to `total`. MTP modules stand beside."""

    embedding: int
    attention: int  # projections, their biases, latent norms, query/key norms, sinks
    dense_ffn: int
    experts: int  # routed
    shared: int
    router: int  # with the correction bias, if the shape has one
    norms: int
    head: int  # 0 when tied
    extra: int  # lookup tables beside the vocabulary's (positions, value embeddings): never active in a product
    counted: int  # of a model that was counted whole: all between the two tables
    active: int  # touched by one token, without the input table (a tied table is counted: it is the head)
    active_with_tables: int
    mtp: int  # unique to the MTP modules; embedding and head are shared with the main model

    @property
    def total(self) -> int:
        """The main model, without MTP modules."""
        ffn = self.dense_ffn + self.experts + self.shared + self.router
        return self.embedding + self.attention + ffn + self.norms + self.head + self.extra + self.counted


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only transformer. `kind` says which attention, and so which head sizes count."""

    vocab: int
    d_model: int
    layers: int
    heads: int
    ffn: int  # hidden width of dense layers
    kind: Literal["mla", "gqa"] = "gqa"
    # gqa
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: d_model / heads
    qk_norm: Literal["none", "head", "full"] = "none"  # head: Qwen3, per head; full: OLMoE, over all heads at once
    # mla
    q_lora: int | None = None
    kv_lora: int = 0
    qk_nope: int = 0
    qk_rope: int = 0
    v_dim: int = 0
    # mixture of experts
    n_routed: int = 0
    n_active: int = 0  # routed experts a token
    n_shared: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0  # width of one shared expert; 0: expert_ffn
    dense_layers: int = 0  # layers without experts in a model that has experts (first_k_dense_replace)
    dense_residual: bool = False  # a dense FFN beside the experts in every MoE layer (Arctic)
    n_group: int = 1
    topk_group: int = 1
    gate_bias: bool = False  # e_score_correction_bias, one entry an expert
    shared_gate: bool = False  # Qwen2-MoE: one vector of d_model gates the shared expert
    # small print
    ffn_mats: int = 3  # 3: gated (SwiGLU, GeGLU); 2: plain
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    expert_bias: bool = False  # gpt-oss
    router_bias: bool = False  # gpt-oss; unlike gate_bias it has a gradient
    sinks: bool = False  # gpt-oss: one learned logit a head
    norm_bias: bool = False  # LayerNorm rather than RMSNorm
    norms_per_layer: int = 2
    embedding_norm: bool = False  # BLOOM
    extra_tables: int = 0  # parameters in further lookup tables
    mtp_layers: int = 0
    window: int = 0  # sliding-window width; 0: none
    window_layers: int = 0  # how many layers use it
    # a model whose modules were counted (models/_counted.py): its parts are not told apart
    counted: int = 0  # parameters between the two tables; 0: by the sizes above
    counted_products: int = 0  # of them in the products of one token
    counted_active: int = 0  # of them met by one token
    state_layers: int = 0  # layers with a state instead of attention
    state_flops: int = 0  # forward FLOPs a token of convolutions and states, all layers
    note: str = field(default="", compare=False)  # what was taken for granted when this was read

    def __post_init__(self) -> None:
        for name in ("vocab", "d_model", "layers", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model shape: {name} is {getattr(self, name)}; it must be at least 1.")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and value < 0:
                raise UserError(f"model shape: {f.name} is {value}; it cannot be negative.")
        self._check_attention()
        self._check_experts()

    def _check_attention(self) -> None:
        if self.kind == "mla":
            if min(self.kv_lora, self.qk_nope, self.qk_rope, self.v_dim) < 1:
                raise UserError("model shape: latent attention needs kv_lora, qk_nope, qk_rope and v_dim above 0.")
            return
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        if self.head_dim == 0:
            if self.d_model % self.heads:
                raise UserError(
                    f"model shape: d_model {self.d_model} is no multiple of {self.heads} heads; give head_dim."
                )
            object.__setattr__(self, "head_dim", self.d_model // self.heads)
        if self.heads % self.kv_heads:
            raise UserError(f"model shape: {self.heads} heads cannot share {self.kv_heads} key-value heads evenly.")

    def _check_experts(self) -> None:
        if not self.n_routed:
            if not self.ffn and not self.counted:
                raise UserError("model shape: ffn is 0 and there are no experts; give the feed-forward width.")
            return
        if not 1 <= self.n_active <= self.n_routed:
            raise UserError(
                f"model shape: {self.n_active} active of {self.n_routed} experts; it must be 1 to {self.n_routed}."
            )
        if not self.expert_ffn:
            raise UserError("model shape: expert_ffn is 0; give the width of one expert.")
        if self.dense_layers > self.layers:
            raise UserError(f"model shape: {self.dense_layers} dense layers in a model of {self.layers} layers.")
        if self.n_group < 1 or self.n_routed % self.n_group:
            raise UserError(f"model shape: {self.n_routed} experts do not divide into {self.n_group} groups.")
        if not 1 <= self.topk_group <= self.n_group:
            raise UserError(
                f"model shape: topk_group {self.topk_group} of n_group {self.n_group}; it must be 1 to that."
            )

    # ---- derived sizes
    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.n_routed else 0

    @property
    def qk_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope + self.qk_rope if self.kind == "mla" else self.head_dim

    @property
    def value_dim(self) -> int:
        return self.v_dim if self.kind == "mla" else self.head_dim

    @property
    def shared_width(self) -> int:
        """Summed width of the shared experts; they run as one FFN."""
        return self.n_shared * (self.shared_ffn or self.expert_ffn)

    # ---- parameters, one layer or part at a time
    def attention_matrices(self) -> int:
        """Parameters of one layer's attention products."""
        d, h = self.d_model, self.heads
        if self.kind == "gqa":
            return 2 * d * h * self.head_dim + 2 * d * self.kv_heads * self.head_dim
        queries = d * self.q_lora + self.q_lora * h * self.qk_dim if self.q_lora else d * h * self.qk_dim
        latent = d * (self.kv_lora + self.qk_rope) + self.kv_lora * h * (self.qk_nope + self.v_dim)
        return queries + latent + h * self.v_dim * d

    def attention_params(self) -> int:
        """One layer's attention: products, biases, the norms inside it, sinks."""
        small = self.heads if self.sinks else 0
        if self.out_bias:
            small += self.d_model
        if self.kind == "mla":
            small += (self.q_lora or 0) + self.kv_lora  # the two latent norms
            if self.qkv_bias:  # on q_a_proj (with query compression) and kv_a_proj_with_mqa only
                small += (self.q_lora or 0) + self.kv_lora + self.qk_rope
            return self.attention_matrices() + small
        if self.qkv_bias:
            small += (self.heads + 2 * self.kv_heads) * self.head_dim
        if self.qk_norm == "head":
            small += 2 * self.head_dim
        elif self.qk_norm == "full":
            small += (self.heads + self.kv_heads) * self.head_dim
        return self.attention_matrices() + small

    def _ffn(self, width: int, bias: bool) -> int:
        biases = (self.ffn_mats - 1) * width + self.d_model if bias else 0
        return self.ffn_mats * self.d_model * width + biases

    def dense_ffn_params(self) -> int:
        return self._ffn(self.ffn, self.ffn_bias)

    def expert_params(self) -> int:
        return self._ffn(self.expert_ffn, self.expert_bias)

    def shared_params(self) -> int:
        if not self.n_shared:
            return 0
        return self._ffn(self.shared_width, False) + (self.d_model if self.shared_gate else 0)

    def router_params(self) -> int:
        return self.n_routed * (self.d_model + int(self.gate_bias) + int(self.router_bias))

    def _norm(self) -> int:
        return self.d_model * (2 if self.norm_bias else 1)

    def mtp_params(self) -> int:
        """Unique parameters of all MTP modules: one block each, eh_proj, enorm, hnorm and shared_head.norm."""
        block = self.attention_params() + self.norms_per_layer * self._norm()
        if self.n_routed:
            block += self.n_routed * self.expert_params() + self.shared_params() + self.router_params()
        else:
            block += self.dense_ffn_params()
        return self.mtp_layers * (block + 2 * self.d_model**2 + 3 * self._norm())

    def params(self) -> ParamCount:
        """All parameters, by part."""
        if self.counted:
            return self._counted_params()
        moe = self.moe_layers
        dense_ffns = self.layers if self.dense_residual else self.layers - moe
        table = self.vocab * self.d_model
        experts = moe * self.n_routed * self.expert_params()
        idle = moe * (self.n_routed - self.n_active) * self.expert_params()
        attention = self.layers * self.attention_params()
        dense = dense_ffns * self.dense_ffn_params() if dense_ffns else 0
        shared, router = moe * self.shared_params(), moe * self.router_params()
        norms = (self.layers * self.norms_per_layer + 1 + int(self.embedding_norm)) * self._norm()
        head = 0 if self.tied else table
        active = attention + dense + experts - idle + shared + router + norms + table
        return ParamCount(
            embedding=table, attention=attention, dense_ffn=dense, experts=experts, shared=shared, router=router,
            norms=norms, head=head, extra=self.extra_tables, active=active,
            active_with_tables=active + head, mtp=self.mtp_params(), counted=0,
        )  # fmt: skip

    def check_parts(self) -> None:
        """Raises UserError for a model whose modules were counted: what needs the sizes of a layer cannot be priced."""
        if self.counted:
            raise UserError(
                "the parameters of this model are counted whole, without the sizes of its layers: its layouts and "
                "decoding are not priced, only stages by parameters (sft, distill, logits)."
            )

    def _counted_params(self) -> ParamCount:
        table = self.vocab * self.d_model
        head, active = 0 if self.tied else table, self.counted_active + table
        return ParamCount(
            embedding=table, attention=0, dense_ffn=0, experts=0, shared=0, router=0, norms=0, head=head, extra=0,
            active=active, active_with_tables=active + head, mtp=0, counted=self.counted,
        )  # fmt: skip

    # ---- FLOPs and cache
    def matmul_params(self, *, mtp: bool = False) -> int:
        """Parameters in the matrix products of one token: no input table, norms or biases."""
        moe, d = self.moe_layers, self.d_model
        if self.counted:
            return self.counted_products + self.vocab * d
        dense_ffns = self.layers if self.dense_residual else self.layers - moe
        ffn = dense_ffns * self.ffn_mats * d * self.ffn + moe * self._moe_matrices()
        main = self.layers * self.attention_matrices() + ffn + self.vocab * d
        return main + (self.mtp_layers * self._mtp_matrices() if mtp else 0)

    def _moe_matrices(self) -> int:
        width = self.n_active * self.expert_ffn + self.shared_width
        return self.ffn_mats * self.d_model * width + self.d_model * self.n_routed

    def _mtp_matrices(self) -> int:
        ffn = self._moe_matrices() if self.n_routed else self.ffn_mats * self.d_model * self.ffn
        return self.attention_matrices() + ffn + 2 * self.d_model**2 + self.vocab * self.d_model

    def mean_keys(self, seq_len: int, *, causal: bool = True, window: int = 0) -> float:
        """Keys a query meets on average: S/2 causal (S when not); in a window w < S, w - w^2/2S (w when not)."""
        span = min(window, seq_len) if window else seq_len
        return span - span * span / (2 * seq_len) if causal else float(span)

    def attention_flops(self, seq_len: int, *, causal: bool = True, mtp: bool = False) -> float:
        """Scores and weighted values, forward, one token, all layers."""
        per_key = 2 * self.heads * (self.qk_dim + self.value_dim)
        full = self.layers - self.window_layers - self.state_layers + (self.mtp_layers if mtp else 0)
        keys = full * self.mean_keys(seq_len, causal=causal)
        if self.window_layers:
            keys += self.window_layers * self.mean_keys(seq_len, causal=causal, window=self.window)
        return per_key * keys

    def flops_per_token(self, seq_len: int, *, causal: bool = True, mtp: bool = False, backward: bool = True) -> float:
        """Model FLOPs of one token in sequences of `seq_len`: 6 N + 3 A in training, 2 N + A forward only."""
        if seq_len < 1:
            raise UserError(f"sequence length is {seq_len}; it must be at least 1.")
        forward = 2 * self.matmul_params(mtp=mtp) + self.attention_flops(seq_len, causal=causal, mtp=mtp)
        forward += self.state_flops
        return 3 * forward if backward else forward

    def kv_numbers_per_token(self) -> int:
        """Numbers kept in the cache for one token, windows ignored."""
        if self.kind == "mla":
            return self.layers * (self.kv_lora + self.qk_rope)
        return (self.layers - self.state_layers) * 2 * self.kv_heads * self.head_dim

    def kv_numbers(self, context: int) -> int:
        """Numbers in the cache of one sequence of `context` tokens; window layers keep at most their window."""
        per_layer = self.kv_numbers_per_token() // self.layers
        full = (self.layers - self.window_layers) * context
        return per_layer * (full + self.window_layers * min(context, self.window or context))

    def with_(self, **changes: Any) -> ModelShape:
        """A copy with some sizes changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
