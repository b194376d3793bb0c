"""A smaller model out of a trained one: layers, channels, feed-forward neurons, heads and experts by their importance.

Importance needs forward passes only (Minitron, arXiv 2407.14679): per batch the mean of |activation| over tokens, L2
over batches. Hidden channels: outputs of the norms, summed over all sites, one choice for the whole model. Neurons: the
input of the down-projection, ranked within a layer. Heads: the length of what a head attends to (the input of the
output-projection), ranked within a layer: as many of each group that shares keys and values where their number allows
it, else whole groups with their keys and values; with MLA any. Experts: the mean over their tokens of |gate · E(x)|, as
many kept in each group. Layers: 1 - cos(in, out), the lowest dropped. The router's biases go with its rows; MTP modules
are dropped.
Left out: latent ranks, the inner width of heads and of routed experts, and adding what pruned heads said to the others
(Minitron's residual term).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.core.errors import UserError
from shoestring.cost.pruned import check_kept
from shoestring.models.checkpoint import family
from shoestring.models.checkpoint_names import disk_tensors
from shoestring.nn.linear import SwiGLU
from shoestring.nn.moe import MoE
from shoestring.nn.norm import RMSNorm

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_READS = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj", "mlp.gate")
_WRITES = ("o_proj", "down_proj")


@dataclass(slots=True)
class Importance:
    """Sums of squares over batches; `ranked` takes the largest."""

    hidden_D: Tensor
    layers_L: Tensor
    ffn: dict[int, Tensor] = field(default_factory=dict)  # layer -> [F], dense layers
    experts: dict[int, Tensor] = field(default_factory=dict)  # layer -> [E]
    heads: dict[int, Tensor] = field(default_factory=dict)  # layer -> [H]


def importance(model: Any, batches: Iterable[tuple[Tensor, Tensor | None, Tensor | None]]) -> Importance:
    """Scores from forward passes over (tokens, positions, segments).

    Raises UserError when there are none, and for a model that is none of our families.
    """
    _check_ours(model)
    layers, device = model.model.layers, model.embedding.device
    found = Importance(torch.zeros(model.config.hidden_size, device=device), torch.zeros(len(layers), device=device))
    ears, seen = _Ears(found), 0
    handles = ears.put_on(model)
    try:
        with torch.no_grad():
            for tokens_BT, positions_BT, segments_BT in batches:
                ears.real_BT = None if segments_BT is None else segments_BT >= 0
                model(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, logits=False)
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise UserError("pruning needs at least one batch of text to measure importance on.")
    return found


@dataclass(slots=True)
class _Ears:
    """Hooks that add to the scores what they hear of a pass; `real_BT` leaves out padding."""

    found: Importance
    real_BT: Tensor | None = None

    def put_on(self, model: Any) -> list[Any]:
        handles = [model.model.norm.register_forward_hook(self._on_norm)]
        for number, block in enumerate(model.model.layers):
            handles.append(block.register_forward_hook(self._on_block(number)))
            attention = block.self_attn
            handles.append(attention.o_proj.register_forward_pre_hook(self._on_heads(number, attention.heads)))
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                assert isinstance(norm, RMSNorm)
                handles.append(norm.register_forward_hook(self._on_norm))
            if isinstance(block.mlp, SwiGLU):
                handles.append(block.mlp.down_proj.register_forward_pre_hook(self._on_down(number)))
            else:
                handles.append(block.mlp.register_forward_hook(self._on_moe(number)))
        return handles

    def _rows(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.flatten(0, -2) if self.real_BT is None else x_BTD[self.real_BT]

    def _strength(self, x_BTD: Tensor) -> Tensor:
        return self._rows(x_BTD).float().abs().mean(0).square()

    def _on_norm(self, _: nn.Module, __: Any, out: Tensor) -> None:
        self.found.hidden_D += self._strength(out)

    def _on_block(self, layer: int) -> Any:
        def hook(_: nn.Module, given: Any, out: Any) -> None:
            before, after = self._rows(given[0]), self._rows(out[0])
            apart = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)
            self.found.layers_L[layer] += apart.mean().square()

        return hook

    def _on_down(self, layer: int) -> Any:
        def hook(_: nn.Module, given: Any) -> None:
            _add(self.found.ffn, layer, self._strength(given[0]))

        return hook

    def _on_heads(self, layer: int, count: int) -> Any:
        def hook(_: nn.Module, given: Any) -> None:
            rows = self._rows(given[0])
            _add(self.found.heads, layer, rows.float().unflatten(-1, (count, -1)).norm(dim=-1).mean(0).square())

        return hook

    def _on_moe(self, layer: int) -> Any:
        def hook(module: Any, given: Any, _: Any) -> None:
            _add(self.found.experts, layer, _expert_strength(module, self._rows(given[0])).square())

        return hook


def _add(scores: dict[int, Tensor], layer: int, score: Tensor) -> None:
    scores[layer] = scores[layer] + score if layer in scores else score


def _expert_strength(moe: MoE, x_ND: Tensor) -> Tensor:
    """[E]: the mean over an expert's tokens of |weight · E(x)|; 0 for one that got none."""
    _, chosen_NA, weight_NA = moe.gate(x_ND, None)
    experts = moe.experts
    score = torch.zeros(experts.down_proj.shape[0], device=x_ND.device)
    for e in range(len(score)):
        row, place = (chosen_NA == e).nonzero(as_tuple=True)
        if len(row):
            gate, up = (x_ND[row] @ experts.gate_up_proj[e].to(x_ND.dtype).T).chunk(2, dim=-1)
            out = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].to(x_ND.dtype).T
            score[e] = (out.float().norm(dim=-1) * weight_NA[row, place].float()).mean()
    return score


def prune(
    model: Any, found: Importance, *, layers: int | None = None, hidden: int | None = None, ffn: int | None = None,
    experts: int | None = None, heads: int | None = None,
) -> Any:  # fmt: skip
    """A new model with so many layers, channels, neurons (of dense layers), experts and heads; None keeps all.

    Raises UserError for a size that is no size of this model, or that its routing cannot serve.
    """
    config = model.config
    check_sizes(model, layers=layers, hidden=hidden, ffn=ffn, experts=experts, heads=heads)
    kept = kept_layers(found, layers)
    channels = _sorted(found.hidden_D, hidden)
    rows = {n: _sorted(score, ffn) for n, score in found.ffn.items()}
    chosen = {n: _in_groups(score, experts, getattr(config, "n_group", 1)) for n, score in found.experts.items()}
    parts = {n: _head_parts(config, score, heads) for n, score in found.heads.items()} if heads is not None else {}
    changes: dict[str, Any] = {"num_hidden_layers": len(kept), "hidden_size": len(channels)}
    if (hidden is not None or heads is not None) and hasattr(config, "head_width"):
        changes["head_dim"] = config.head_width
    if heads is not None:
        changes |= {"num_attention_heads": heads} | _kv_heads(config, heads)
    if ffn is not None:
        changes["intermediate_size"] = ffn
    if hasattr(config, "n_routed_experts"):
        changes |= {"n_routed_experts": experts or config.n_routed_experts, "num_nextn_predict_layers": 0}
        changes["first_k_dense_replace"] = sum(n < config.first_k_dense_replace for n in kept)
    small = family(config.model_type).MODEL(type(config)(**{**config.model_dump(), **changes}))
    small.kernels = model.kernels
    source = disk_tensors(model)
    with torch.no_grad():
        for name, target in disk_tensors(small).items():
            target.copy_(_cut(name, source, kept, channels, rows, chosen, parts))
    return small


def _cut(
    name: str, source: dict[str, Tensor], kept: list[int], channels: Tensor, rows: dict[int, Tensor],
    chosen: dict[int, Tensor], parts: dict[int, dict[str, Tensor]],
) -> Tensor:  # fmt: skip
    """The tensor of the small model called `name`, out of the large one's."""
    match = _LAYER.fullmatch(name)
    if match is None:  # tables [V, D] and the last norm [D]
        return source[name].index_select(-1, channels)
    layer, inner = kept[int(match[1])], match[2]
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(.+)", inner)
    if expert is not None:
        inner = f"mlp.experts.{int(chosen[layer][int(expert[1])])}.{expert[2]}"
    tensor = source[f"model.layers.{layer}.{inner}"]
    part = inner.removesuffix(".weight").removesuffix(".bias")
    dense = layer in rows and inner.startswith("mlp.")
    if inner in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        return tensor.index_select(0, channels)
    if part.endswith("e_score_correction_bias"):
        return tensor.index_select(0, chosen[layer])
    if part == "mlp.gate":
        tensor = tensor.index_select(0, chosen[layer])
    if (numbers := parts.get(layer, {}).get(part.removeprefix("self_attn."))) is not None:
        reads = part.endswith("o_proj")  # heads are its columns, and no part of its bias
        tensor = tensor if reads and tensor.ndim == 1 else tensor.index_select(int(reads), numbers)
    if dense and part.endswith(("gate_proj", "up_proj")):
        tensor = tensor.index_select(0, rows[layer])
    if dense and part.endswith("down_proj") and tensor.ndim == 2:
        tensor = tensor.index_select(1, rows[layer])
    if part.endswith(_READS) and tensor.ndim == 2:
        return tensor.index_select(1, channels)
    if part.endswith(_WRITES):
        return tensor.index_select(0, channels)
    return tensor


def _kv_heads(config: Any, heads: int) -> dict[str, int]:
    """The heads of keys and values that so many query heads keep: all where each keeps as many, else whole groups.

    Empty for MLA, whose heads have their own.
    """
    if not hasattr(config, "num_key_value_heads"):
        return {}
    groups = config.num_key_value_heads
    return {"num_key_value_heads": groups if heads % groups == 0 else heads * groups // config.num_attention_heads}


def _head_parts(config: Any, score_H: Tensor, heads: int) -> dict[str, Tensor]:
    """By projection the rows that stay, of o_proj the columns."""

    def spread(numbers: Tensor, width: int) -> Tensor:
        return (numbers[:, None] * width + torch.arange(width, device=numbers.device)).flatten()

    if not hasattr(config, "num_key_value_heads"):
        kept = _sorted(score_H, heads)
        q, v = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        asking = spread(kept, q)
        return {"q_proj": asking, "q_b_proj": asking, "kv_b_proj": spread(kept, config.qk_nope_head_dim + v),
                "o_proj": spread(kept, v)}  # fmt: skip
    groups, width = config.num_key_value_heads, config.head_width
    if heads % groups == 0:
        kept, shared = _in_groups(score_H, heads, groups), torch.arange(groups, device=score_H.device)
    else:
        each = len(score_H) // groups
        shared = _sorted(score_H.view(groups, each).sum(1), heads // each)
        kept = spread(shared, each)
    asked = spread(shared, width)
    return {"q_proj": spread(kept, width), "o_proj": spread(kept, width), "k_proj": asked, "v_proj": asked}


def kept_layers(found: Importance, keep: int | None) -> list[int]:
    """The numbers of the layers that stay, in order."""
    return sorted(_top(found.layers_L, keep))


def _top(score: Tensor, keep: int | None) -> list[int]:
    return [int(i) for i in score.argsort(descending=True, stable=True)[: keep or len(score)]]


def _sorted(score: Tensor, keep: int | None) -> Tensor:
    return torch.tensor(sorted(_top(score, keep)), device=score.device)


def _in_groups(score_E: Tensor, keep: int | None, groups: int) -> Tensor:
    """As many of each group, in order."""
    keep = keep or len(score_E)
    size = len(score_E) // groups
    parts = [_sorted(score_E[g * size : (g + 1) * size], keep // groups) + g * size for g in range(groups)]
    return torch.cat(parts)


def check_sizes(model: Any, **kept: int | None) -> None:
    """Raises UserError for a model or a size that `prune` would refuse, before importance is measured."""
    _check_ours(model)
    try:
        check_kept(model.config.shape(), **kept)
    except UserError as error:
        raise UserError(f"prune: {error}") from None


def _check_ours(model: Any) -> None:
    if not hasattr(model, "model"):
        raise UserError("prune: this model runs through transformers; only deepseek, llama, qwen2 and qwen3 can be.")
