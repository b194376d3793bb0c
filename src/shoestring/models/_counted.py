"""Shapes that no formula gives: counted from the modules of transformers, on the meta device where nothing is loaded.

Exact: all parameters, and those in matrix products (an expert's by the share of experts a token meets). Beside them
what a state costs: 2 FLOPs a tap of a convolution, and 9 a token for each number of a selective state (discretise,
decay, input, output: Mamba, arXiv 2312.00752, section 3). Approximate, and said to be so in the shape's note:
attention is counted over all keys of the layers that have it, and recurrences of other kinds (RWKV, gated delta rule,
lightning attention) are not counted beside their products.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.hf import known_type, shape_from_hf
from shoestring.cost.shape import ModelShape

SCAN = 9  # FLOPs a token of one number of a selective state
OTHER_STATES = ("Linear", "Lightning", "Rwkv", "RWKV")  # in names of classes: attention without keys kept
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "experts_per_token")


def config_shape(place: Path, name: str = "") -> ModelShape:
    """The shape of the model in a folder, by its config.json (or another such file) alone. `name`: for complaints.

    Raises UserError for a config that is missing, no JSON, known to nobody, or of no causal model.
    """
    name, file = name or str(place), place if place.is_file() else place / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{place} holds no config.json: it is no checkpoint in Hugging Face layout.") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}).") from None
    if not isinstance(raw, dict) or known_type(raw) or not _theirs(raw):
        return shape_from_hf(raw, name)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a stranger's config makes their constructors raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{name}: transformers cannot make a causal model of its config.json ({reason}).") from None
    return counted_shape(model)


def _theirs(raw: Mapping[str, Any]) -> bool:
    """Whether transformers is here and has the architecture."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return False
    return raw.get("model_type") in CONFIG_MAPPING


def counted_shape(theirs: Any) -> ModelShape:
    """The shape of a causal model of transformers: by its config where the type is known, else by its modules."""
    raw: dict[str, Any] = theirs.config.to_dict()
    if known_type(raw):
        return shape_from_hf(raw)
    text = theirs.config.get_text_config()
    total, products, active = _parameters(theirs, _share(text))
    table = theirs.get_input_embeddings().weight.numel()
    head = theirs.get_output_embeddings()
    tied = head is None or head.weight is theirs.get_input_embeddings().weight
    layers = int(text.num_hidden_layers)
    attending = min(layers, sum(map(_attends, _blocks(theirs, layers))))
    heads = int(getattr(text, "num_attention_heads", 0) or 1) if attending else 1
    kv_heads = int(getattr(text, "num_key_value_heads", 0) or heads) if attending else 1
    return ModelShape(
        vocab=int(text.vocab_size), d_model=int(text.hidden_size), layers=layers, heads=heads, ffn=0, tied=tied,
        kv_heads=kv_heads if heads % kv_heads == 0 else heads,
        head_dim=int(getattr(text, "head_dim", 0) or 0) or max(1, int(text.hidden_size) // heads),
        counted=total - table - (0 if tied else head.weight.numel()), counted_products=products, counted_active=active,
        state_layers=layers - attending, state_flops=_state_flops(theirs),
        note=_note(str(raw.get("model_type")), layers - attending),
    )  # fmt: skip


def _note(kind: str, states: int) -> str:
    more = "; of layers with a state, products, convolutions and selective scans are counted" if states else ""
    return f'model_type "{kind}": parameters are counted from its modules, FLOPs approximately{more}'


def _share(text: Any) -> float:
    """Of the routed experts, how many a token meets."""
    there, met = (next((int(v) for n in names if (v := getattr(text, n, None))), 0) for names in (EXPERTS, CHOSEN))
    return met / there if there and met else 1.0


def _parameters(theirs: Any, share: float) -> tuple[int, int, int]:
    """(all, those in products of one token beside the head's, those one token meets beside the tables)."""
    from torch import nn

    ends = {id(part.weight) for part in (theirs.get_input_embeddings(), theirs.get_output_embeddings()) if part}
    tables = {id(p) for m in theirs.modules() if isinstance(m, (nn.Embedding, nn.Conv1d)) for p in m.parameters()}
    total, products, active = 0, 0.0, 0.0
    for name, parameter in theirs.named_parameters():
        total += parameter.numel()
        if id(parameter) in ends:
            continue
        expert = ".experts." in name
        met = parameter.numel() * (share if expert else 1.0)
        active += met
        matrix = parameter.ndim == 2 or (expert and parameter.ndim == 3)
        if matrix and id(parameter) not in tables and not name.endswith("A_log"):
            products += met
    return total, round(products), round(active)


def _blocks(theirs: Any, layers: int) -> list[Any]:
    from torch import nn

    lists = (part for part in theirs.modules() if isinstance(part, nn.ModuleList) and len(part) == layers)
    return list(next(lists, []))


def _attends(block: Any) -> bool:
    names = {type(part).__name__ for part in block.modules()}
    return any("Attention" in name and not any(other in name for other in OTHER_STATES) for name in names)


def _state_flops(theirs: Any) -> int:
    """Forward FLOPs a token of convolutions and selective states, all layers."""
    from torch import nn

    flops = 0
    for part in theirs.modules():
        if isinstance(part, nn.Conv1d):
            flops += 2 * part.weight.numel()
        width, size = (getattr(part, name, None) for name in ("intermediate_size", "ssm_state_size"))
        if isinstance(width, int) and isinstance(size, int) and hasattr(part, "A_log"):
            flops += SCAN * width * size
    return flops
