"""Shapes counted from the modules of transformers: their own parameters and torch's own count of FLOPs as oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shoestring.models._counted import config_shape, counted_shape

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, tuple[dict[str, Any], int]] = {  # sizes, layers with a state
    "phi": ({"partial_rotary_factor": 0.5}, 0),
    "gptj": ({"rotary_dim": 8}, 0),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, 0),
    "starcoder2": ({}, 0),
    "mamba": ({"state_size": 4, "intermediate_size": 64, "time_step_rank": 4}, 4),
    "falcon_mamba": ({"state_size": 4, "intermediate_size": 64, "time_step_rank": 4}, 4),
    "mamba2": ({"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1}, 4),
    "rwkv": ({"attention_hidden_size": 32}, 4),
    "jamba": ({"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
               "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
               "mamba_d_state": 4}, 2),
    "falcon_h1": ({"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
                   "mamba_expand": 1}, 0),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, 2),
    "qwen3_next": ({**EXPERTS, **MIXED, "shared_expert_intermediate_size": 16, "head_dim": 16,
                    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                    "linear_value_head_dim": 8}, 2),
}  # fmt: skip


def _made(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **TINY | KINDS[kind][0] | more, attn_implementation="eager", experts_implementation="eager"
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_flops(kind: str, tmp_path: Path) -> None:
    """All parameters exactly; products of 32 tokens as torch counts them in the same forward pass."""
    states = KINDS[kind][1]
    model = _made(kind)
    shape = counted_shape(model)
    assert shape.params().total == sum(p.numel() for p in model.parameters())
    assert shape.state_layers == states and "counted" in shape.note
    model.config.save_pretrained(tmp_path)
    assert config_shape(tmp_path) == shape  # nothing loaded
    ids = torch.randint(3, 64, (1, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    found = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = sum(found.get(f"aten.{op}", 0) for op in ("mm", "addmm"))
    assert 32 * 2 * shape.matmul_params() == pytest.approx(linear, rel=1e-6)
    assert shape.params().active <= shape.params().total
    if not states and kind != "falcon_h1":  # attention is all there is beside
        ours = 32 * shape.flops_per_token(32, causal=False, backward=False)
        assert ours == pytest.approx(counter.get_total_flops(), rel=1e-6)
