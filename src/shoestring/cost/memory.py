"""Memory of the fullest rank, by term, in bytes.

Weights 2 bytes (FP8 1, plus the BF16 rest), gradients accumulated in FP32, optimizer FP32 master with FP32
moments (12) or BF16 moments with FP8 training (8), as DeepSeek-V3 section 3.3 does. Activations: what the
backward pass needs, counted from the shape; for a plain 16-bit GPT this gives the 34 bytes x hidden of arXiv
2205.05198. Communication buffers and fragmentation are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoestring.core.errors import UserError
from shoestring.cost.chips import Chip
from shoestring.cost.layout import Layout
from shoestring.cost.pipeline import in_flight
from shoestring.cost.shape import ModelShape
from shoestring.cost.units import show

BUFFERS = 3.0e9  # runtime, workspaces, communication buffers: an estimate
FRAGMENTATION = 0.08  # of activations (6-10%): an estimate


def stage_layers(shape: ModelShape, layout: Layout) -> int:
    """Layers on the fullest rank, one direction (DualPipe holds twice as many)."""
    return -(-shape.layers // layout.pp)


def stage_params(shape: ModelShape, layout: Layout) -> tuple[float, float]:
    """(expert, other) parameters of the fullest rank, before any sharding over dp."""
    full = stage_layers(shape, layout)
    if layout.pp == 1:
        return _held(shape, layout, full, 1 if shape.tied else 2)
    last = max(0, shape.layers - (layout.pp - 1) * full)
    ends = (full + last, 2) if layout.bidirectional else (full, 1)
    middle = (2 * full if layout.bidirectional else full, 0)
    return max((_held(shape, layout, *share) for share in (ends, middle)), key=sum)


def _held(shape: ModelShape, layout: Layout, layers: int, tables: int) -> tuple[float, float]:
    moe = min(layers, shape.moe_layers)
    experts = moe * shape.n_routed * shape.expert_params() / (layout.ep if layout.ep > 1 else layout.tp)
    other = layers * shape.attention_params() + moe * (shape.shared_params() + shape.router_params())
    dense = layers if shape.dense_residual else layers - moe
    if dense:
        other += dense * shape.dense_ffn_params()
    return experts, (other + tables * shape.vocab * shape.d_model) / layout.tp


def layer_activation_bytes(shape: ModelShape, layout: Layout, seq_len: int, *, flash: bool = True) -> float:
    """Kept for backward, one token, one layer, one rank."""
    d, h, t = shape.d_model, shape.heads, layout.tp
    if layout.recompute == "full":
        return 2.0 * d / t if flash else 2.0 * d
    small = 1.0 if layout.precision == "fp8" else 4.0 if layout.precision == "fp32" else 2.0  # inputs of products
    wide = 4.0 if layout.precision == "fp32" else 2.0
    core = h * (shape.qk_dim + shape.value_dim) + shape.kv_heads * (shape.qk_dim + shape.value_dim)
    if shape.kind == "mla":
        latent = (shape.q_lora or 0) + shape.kv_lora + shape.qk_rope
        kept = latent * wide + h * shape.value_dim * small
        up = h * (2 * shape.qk_dim + shape.value_dim) * wide
        attention = kept + (0 if layout.recompute == "selective" else up)
    else:
        attention = core * wide
    scores = 0.0 if flash or layout.recompute == "selective" else 5.0 * h * seq_len
    selective = layout.recompute == "selective"
    residual = (2 if selective else 4) * d * wide
    split = attention + scores + residual + _ffn_activations(shape, selective) * small
    return split / t + (0 if flash or selective else _unsharded(d, t))


def _unsharded(d: int, t: int) -> float:
    """Without sequence parallelism (it came with selective recomputation) norms and dropouts stay whole: 10 of 34."""
    return 10.0 * d * (1 - 1 / t)


def _ffn_activations(shape: ModelShape, selective: bool) -> float:
    """Numbers kept by the widest kind of layer: inputs, gate and up outputs, their product."""
    per_width = shape.ffn_mats - (1 if selective else 0)
    dense = shape.d_model + per_width * shape.ffn
    if not shape.n_routed:
        return dense
    routed = shape.n_active * (shape.d_model + per_width * shape.expert_ffn)
    shared = shape.d_model + per_width * shape.shared_width if shape.n_shared else 0
    return routed + shared + (dense if shape.dense_residual else 0)


class Memory:
    """Memory of the fullest rank under many layouts; parts are kept by what they depend on."""

    def __init__(self, shape: ModelShape, seq_len: int, *, flash: bool = True) -> None:
        self.shape, self.seq_len, self.flash = shape, seq_len, flash
        self._held: dict[tuple[object, ...], tuple[float, float]] = {}
        self._layer: dict[tuple[object, ...], float] = {}

    def held(self, layout: Layout) -> tuple[float, float]:
        """(expert, other) parameters of the fullest rank."""
        key = (layout.pp, layout.tp, layout.ep, layout.bidirectional)
        if key not in self._held:
            self._held[key] = stage_params(self.shape, layout)
        return self._held[key]

    def layer(self, layout: Layout, recompute: str) -> float:
        """Activation bytes of one token and layer."""
        key = (layout.tp, recompute, layout.precision)
        if key not in self._layer:
            changed = layout if layout.recompute == recompute else layout.with_(recompute=recompute)
            self._layer[key] = layer_activation_bytes(self.shape, changed, self.seq_len, flash=self.flash)
        return self._layer[key]

    def fixed(self, layout: Layout) -> tuple[float, float, float]:
        """Weights, gradients and optimizer: what no micro-batch or recomputation changes."""
        experts, other = self.held(layout)
        dp = layout.dp * layout.cp
        replicas = max(1, dp * layout.tp // layout.ep) if layout.ep > 1 else dp
        sharded = experts / replicas + other / dp
        whole = experts + other
        weight = {"fp8": 1.0, "fp32": 4.0}.get(layout.precision, 2.0)
        moments = {"fp8": 8.0, "fp32": 8.0}.get(layout.precision, 12.0)
        optimizer = moments * (sharded if layout.zero >= 1 else whole)
        if layout.zero == 3:  # its own share, and two layers gathered at a time
            gathered = 2 * weight * whole / max(1, stage_layers(self.shape, layout))
            return weight * sharded + gathered, 2.0 * sharded, optimizer
        return weight * whole, 4.0 * (sharded if layout.zero == 2 else whole), optimizer

    def per_rank(self, layout: Layout, micro_batches: int) -> dict[str, float]:
        """Bytes by term; their sum is what one rank needs."""
        tokens = layout.micro_batch * self.seq_len / layout.cp
        held = in_flight(layout.schedule, layout.pp, micro_batches, layout.virtual)
        activations = self.layer(layout, layout.recompute) * tokens * stage_layers(self.shape, layout) * held
        if layout.recompute == "full":  # one layer at a time is rebuilt in full
            activations += self.layer(layout, "none") * tokens
        weights, gradients, optimizer = self.fixed(layout)
        return {
            "weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations,
            "logits": tokens * self.shape.vocab * 4.0 / layout.tp,
            "fragmentation": FRAGMENTATION * activations, "buffers": BUFFERS,
        }  # fmt: skip


def memory_per_rank(
    shape: ModelShape, layout: Layout, seq_len: int, micro_batches: int, *, flash: bool = True
) -> dict[str, float]:
    """Bytes by term of one layout."""
    return Memory(shape, seq_len, flash=flash).per_rank(layout, micro_batches)


def check_fits(terms: Mapping[str, float], chip: Chip, label: str) -> None:
    """Raises UserError naming the largest term when the memory of a chip is exceeded."""
    total = sum(terms.values())
    if total > chip.memory_bytes:
        worst = max(terms, key=lambda k: terms[k])
        raise UserError(
            f"{label} needs {show(total / 1e9)} GB a chip and {chip.name} has {show(chip.memory_bytes / 1e9)} GB; "
            f"the largest term is {worst} ({show(terms[worst] / 1e9)} GB): {MEND[worst]}."
        )


MEND = {
    "weights": "raise pp, tp, ep or use zero=3",
    "gradients": "raise pp, tp, ep or use zero=2",
    "optimizer": "use zero=1 and raise dp, pp or tp",
    "activations": "use recompute=full, a smaller micro_batch or more tp",
    "logits": "raise tp or lower micro_batch",
    "fragmentation": "lower micro_batch",
    "buffers": "take a chip with more memory",
}
