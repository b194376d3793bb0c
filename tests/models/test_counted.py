"""Shapes counted from the modules of transformers: their own parameters and torch's own count of FLOPs as oracles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shoestring import cli
from shoestring.core.errors import UserError
from shoestring.cost.chips import find_chip
from shoestring.cost.plan import plan
from shoestring.cost.serving import decode_rate
from shoestring.cost.stages import SFT_MFU
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


def test_plan_prices_a_state_by_its_parameters_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` has no layout for it and names the command that prices it; that command does, from a file or a folder."""
    _made("mamba").config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    assert cli.main(["plan", str(file), "--tokens", "1B", "--on", "8xH100"]) == 2
    refused = capsys.readouterr().err
    assert "layers without attention" in refused and "plan stage sft CONFIG" in refused and refused.count("\n") == 1
    shape, hours = config_shape(tmp_path), []
    for place in (file, tmp_path):
        assert cli.main(["plan", "stage", "sft", str(place), "--tokens", "1B", "--on", "8xH100", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert any("counted from its modules" in line for line in answer["assumed"])
        hours.append(answer["gpu_hours"]["mid"])
    flops = shape.flops_per_token(4000) * 1e9
    assert hours == [pytest.approx(flops / (SFT_MFU * find_chip("H100").bf16) / 3600)] * 2
    assert cli.main(["plan", "stage", "rl", str(file), "--samples", "1M"]) == 2  # decoding needs a layer's sizes


def test_a_counted_shape_has_no_layout_and_no_decoding() -> None:
    shape = counted_shape(_made("mamba"))
    for price in (lambda: plan(shape, 1e9, "8xH100"), lambda: decode_rate(shape, find_chip("H100"), 100)):
        with pytest.raises(UserError, match="counted whole"):
            price()
