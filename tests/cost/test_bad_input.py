"""Each mistake of a user gets one sentence that says what to do, before anything is computed; exit code 2."""

import json
from pathlib import Path

import pytest

from shoestring import cli
from shoestring.core.errors import UserError
from shoestring.cost.hf import shape_from_hf
from shoestring.cost.show_plan import make

V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8,
    "topk_group": 4,
}  # fmt: skip
WORDS = {"precision": None, "layout": "", "by": "cost", "budget": None, "deadline": None, "rule": None,
         "calibration": None}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 300}, "300 active of 256"),
        ({"n_group": 7}, "7 groups"),
        ({"topk_group": 9}, "topk_group 9 of n_group 8"),
        ({"first_k_dense_replace": 99}, "exceeds num_hidden_layers 61"),
        ({"num_hidden_layers": -3}, "at least 0"),
        ({"num_hidden_layers": 61.5}, "whole number"),
        ({"num_hidden_layers": 100_000}, "no model is that large"),
        ({"hidden_size": 1e15}, "no model is that large"),
        ({"vocab_size": "big"}, "'big'"),
        ({"kv_lora_rank": None}, 'key "kv_lora_rank" is missing, and model_type "deepseek_v3" needs it'),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"mamba_d_state": 16}, "layers without attention"),
    ],
)
def test_config(change, words):
    with pytest.raises(UserError, match=words):
        shape_from_hf(V3 | change)


def test_config_without_a_type_is_llamas_and_an_unknown_type_is_said():
    sizes = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 1024}
    with pytest.raises(UserError, match="a config without model_type is read as Llama's"):
        shape_from_hf(sizes)
    unknown = shape_from_hf(sizes | {"vocab_size": 1000, "model_type": "brandnew"})
    assert "brandnew" in unknown.note
    known = shape_from_hf(sizes | {"vocab_size": 1000, "model_type": "llama"})
    assert not known.note and known == unknown


@pytest.mark.parametrize(
    ("tokens", "on", "options", "words"),
    [
        ("1e30", "8xH100", {}, "beyond any run"),
        ("5", "8xH100", {}, "less than one sequence"),
        ("1T", "1e9xH100", {}, "number of chips is 1e9; that is beyond any run"),
        ("1T", "-4xH100", {}, "number of chips is -4; it must be positive|positive, finite"),
        ("1T", "1.5xH100", {}, "whole number"),
        ("1T", "8xA100", {"precision": "fp8"}, "has no FP8 products"),
        ("1T", "8xH100", {"layout": "pp=7"}, "with pp=7, precision="),
        ("1T", "8xH100", {"budget": "5 days"}, "write it like .500K"),
        ("1T", "8xH100", {"usd_per_hour": 1e9}, "beyond any run"),
        ("1T", "8xH100", {"calibration": Path("none.json")}, "no calibration file"),
        ("1T", "any", {"layout": "pp=2"}, "needs a number of chips"),
        ("1T", "H100", {"deadline": "1h"}, "could end in 0.0417 days"),
        ("1T", "H100", {"budget": "$5"}, "the cheapest that ends in 90 days costs"),
    ],
)
def test_words(tokens, on, options, words):
    with pytest.raises(UserError, match=words) as caught:
        make("llama-3.1-8b", tokens, on, **WORDS | options)
    assert "{" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "quickstart", "--on", "8xH100", "--budget", "5"],
        ["plan", "quickstart"],
        ["plan", "deepseek-v3", "--tokens", "1T", "--on", "8xH801"],
        ["plan", "deepseek-v3", "--tokens", "1T", "--on", "2048xH100", "--rule", "2023-06-01:China"],
        ["check", "no numbers at all"],
        ["check", ""],
        ["plan", "table", "missing.csv"],
    ],
)
def test_command_line(arguments, capsys):
    """One sentence on standard error, nothing on standard output, exit code 2."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out.strip() and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_what_is_taken_for_granted_is_said(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(V3 | {"model_type": "brandnew"}), encoding="utf-8")
    document = make(str(config), "1T", "2048xH800", **WORDS).to_dict()
    assert document["guesses"][0] == 'model_type "brandnew" is not known: its keys are read as DeepSeek\'s'
