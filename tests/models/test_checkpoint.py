"""Checkpoints: round trips with transformers, shards, FP8, and one sentence for each way to be broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_sizes as sizes
import pytest
import torch
from safetensors.torch import load_file, save_file

from shoestring.core.errors import UserError
from shoestring.models import checkpoint_files
from shoestring.models.checkpoint import load, save
from shoestring.models.dense import Dense, DenseConfig
from shoestring.nn.fp8 import quantize_weight
from shoestring.text.tokenizer import Tokenizer

NAMED = {
    "v3": sizes.deepseek(**sizes.V3),
    "moonlight": sizes.deepseek(**sizes.MOONLIGHT),
    "v2-lite": sizes.deepseek(**sizes.V2_LITE),
    "v2": sizes.deepseek(**sizes.V2),
    "llama-3.1": sizes.dense(rope_scaling=sizes.LLAMA3),
    "qwen2-tied": sizes.dense(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": sizes.dense(model_type="qwen3", head_dim=16),
}


@pytest.mark.parametrize("name", NAMED)
@torch.no_grad()
def test_ours_to_ours(name: str, tmp_path: Path) -> None:
    model = sizes.make(NAMED[name])
    save(model, None, tmp_path, max_shard_bytes=20_000)
    shards = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1 and shards == {path.name for path in tmp_path.glob("*.safetensors")}
    again, tokenizer = load(tmp_path)
    assert tokenizer is None and again.config == model.config
    for (key, mine), (other_key, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(mine, other), key


@pytest.mark.parametrize("elements", [1, 700])
@torch.no_grad()
def test_read_a_piece_at_a_time(elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one by one, and several with a short last piece; NaN in a later piece is found."""
    model = sizes.make(NAMED["v3"])
    save(model, None, tmp_path)
    monkeypatch.setattr(checkpoint_files, "PIECE_ELEMENTS", elements)
    again, _ = load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1, -1] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds NaN"):
        load(tmp_path)


def test_loading_and_training_import_neither_a_compiler_nor_algebra(tmp_path: Path) -> None:
    """torch imports both unasked in some calls: more than a hundred megabytes and two seconds of every process."""
    save(sizes.make(NAMED["v3"]), None, tmp_path)
    code = f"""
import sys, torch
from shoestring.models.checkpoint import load, save
from shoestring.optim.make import optimizers
model, _ = load({str(tmp_path)!r}, dtype="bfloat16")
model(torch.arange(8)[None]).logits.sum().backward()
torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
for optimizer in optimizers(model, "adamw", lr=0.1, betas=(0.9, 0.95), weight_decay=0.1):
    optimizer.step()
save(model, None, {str(tmp_path / "again")!r})
print([name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr[-500:]


@pytest.mark.parametrize("name", NAMED)
@torch.no_grad()
def test_ours_to_transformers_and_back(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = NAMED[name]
    model = sizes.make(config)
    x_BT = sizes.tokens(config, 2, 20)
    save(model, None, tmp_path / "ours", max_shard_bytes=20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs(x_BT).logits, model(x_BT).logits_BTV, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    back, _ = load(tmp_path / "theirs")
    torch.testing.assert_close(back(x_BT).logits_BTV, model(x_BT).logits_BTV, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_directory_of_a_run_is_no_checkpoint(tmp_path: Path) -> None:
    """Its config.json is the stage's; the verbs take a run, `load` one of its checkpoints."""
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"stage": "pretrain", "steps": 3}')
    with pytest.raises(UserError, match="is the directory of a run; give one of the folders in its checkpoints/"):
        load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="model_type None is not supported"):
        load(tmp_path)


def test_names_on_disk(tmp_path: Path) -> None:
    """Those of the released files: one expert a key, MTP at index L with its copies, a bias without `.weight`."""
    model = sizes.make(NAMED["v3"])
    save(model, None, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    L, E = 3, 8
    assert stored[f"model.layers.1.mlp.experts.{E - 1}.down_proj.weight"].shape == (32, 16)
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    for name in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"):
        assert f"model.layers.{L}.{name}.weight" in stored
    assert f"model.layers.{L}.mlp.experts.0.up_proj.weight" in stored
    assert torch.equal(stored[f"model.layers.{L}.shared_head.head.weight"], stored["lm_head.weight"])
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["num_nextn_predict_layers"] == 1 and raw["topk_method"] == "noaux_tc" and raw["dtype"] == "float32"


@torch.no_grad()
def test_bfloat16_keeps_the_router_bias_exact(tmp_path: Path) -> None:
    model = sizes.make(NAMED["v3"])
    save(model, None, tmp_path, dtype="bfloat16")
    again, _ = load(tmp_path)
    assert again.embedding.dtype == torch.bfloat16 and again.kernels.dtype == "bfloat16"
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(again.state_dict()[key], model.state_dict()[key])
    full, _ = load(tmp_path, dtype="float32")
    assert full.embedding.dtype == torch.float32 and full.kernels.dtype == "float32"


@torch.no_grad()
def test_fp8_weights_are_read(tmp_path: Path) -> None:
    """A checkpoint as DeepSeek's: fp8 projections with block scales of 16, everything else as it was."""
    model = sizes.make(NAMED["moonlight"])
    save(model, None, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    half: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if "_proj" in name and "layers.1" in name:
            half[name], half[f"{name}_scale_inv"] = quantize_weight(tensor, 16)
        else:
            half[name] = tensor
    save_file(half, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit(tmp_path, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]})
    again, _ = load(tmp_path)
    for name, tensor in again.state_dict().items():
        want = model.state_dict()[name]
        if "_proj" in name and "layers.1" in name:
            assert 0 < (tensor - want).abs().max() <= 16 / 448 * want.abs().max(), name
        else:
            assert torch.equal(tensor, want), name


def test_tied_models_store_no_head(tmp_path: Path) -> None:
    save(sizes.make(NAMED["qwen2-tied"]), None, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_announced_mtp_without_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers announces MTP in every V3 config it writes, and never writes its weights."""
    model = sizes.make(sizes.deepseek())
    save(model, None, tmp_path)
    edit(tmp_path, num_nextn_predict_layers=1)
    again, _ = load(tmp_path)
    assert again.config.num_nextn_predict_layers == 0 and "left out" in caplog.text


# ---- broken checkpoints
def edit(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def reweigh(folder: Path, change: Any) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def quantised(stored: dict[str, torch.Tensor], scale: torch.Tensor) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    stored[f"{name}_scale_inv"] = scale


BROKEN = {
    "missing": (lambda f: reweigh(f, lambda s: s.pop("model.norm.weight")), "lacks model.norm.weight"),
    "extra": (lambda f: reweigh(f, lambda s: s.update(stray=torch.ones(2))), "stray"),
    "misshapen": (
        lambda f: reweigh(f, lambda s: s.update({"model.norm.weight": torch.ones(7)})),
        r"model.norm.weight is \(7,\) on disk and \(32,\)",
    ),
    "nan": (lambda f: reweigh(f, lambda s: s["lm_head.weight"][3].fill_(float("nan"))), "lm_head.weight holds NaN"),
    "truncated": (cut, "damaged or cut short"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"no tensors"), "damaged or cut short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "bad json": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "family": (lambda f: edit(f, model_type="deepseek_v9"), "Did you mean"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "is not supported"),
    "activation": (lambda f: edit(f, hidden_act="gelu"), "hidden_act"),
    "rope": (lambda f: edit(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "longrope"),
    "vocabulary": (lambda f: edit(f, vocab_size=65), "do not belong together"),
    "no key": (lambda f: edit(f, hidden_size=None), "hidden_size"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "one JSON object, not list"),
    "type no name": (lambda f: edit(f, model_type=["deepseek_v3"]), "is not supported"),
    "below zero": (lambda f: edit(f, vocab_size=-3), "must be greater than or equal to 1"),
    "no experts chosen": (lambda f: edit(f, num_experts_per_tok=0), "num_experts_per_tok"),
    "no groups": (lambda f: edit(f, n_group=0), "n_group"),
    "epsilon": (lambda f: edit(f, rms_norm_eps=-1.0), "rms_norm_eps"),
    "rope a word": (lambda f: edit(f, rope_parameters="yarn"), "rope_parameters is 'yarn'"),
    "rope of nothing": (
        lambda f: edit(
            f, rope_parameters={"rope_type": "yarn", "factor": 0, "original_max_position_embeddings": 0}
        ),
        "factor",
    ),
    "theta a word": (lambda f: edit(f, rope_parameters={"rope_theta": "10k"}), "rope_theta is '10k'"),
    "one block size": (lambda f: edit(f, quantization_config={"weight_block_size": [128]}), "weight_block_size"),
    "index a list": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'), "weight_map must say"
    ),
    "whole numbers": (
        lambda f: reweigh(f, lambda s: s.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        "model.norm.weight is int8",
    ),
    "fp8 scale misshapen": (lambda f: reweigh(f, lambda s: quantised(s, torch.ones(2, 1))), "blocks of 128 ask for"),
    "fp8 scale one number": (lambda f: reweigh(f, lambda s: quantised(s, torch.ones(()))), "blocks of 128 ask for"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoints(how: str, tmp_path: Path) -> None:
    save(sizes.make(NAMED["moonlight"]), None, tmp_path)
    load(tmp_path)
    damage, sentence = BROKEN[how]
    damage(tmp_path)
    with pytest.raises(UserError, match=sentence) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = sizes.make(NAMED["moonlight"])
    with pytest.raises(UserError, match='dtype "bfloat61"'):
        save(model, None, tmp_path / "out", dtype="bfloat61")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        save(model, None, tmp_path / "file")


def test_where_it_cannot_be_loaded(tmp_path: Path) -> None:
    save(sizes.make(NAMED["moonlight"]), None, tmp_path)
    with pytest.raises(UserError, match='device "gpu" cannot be used here'):
        load(tmp_path, device="gpu")


def test_missing_shard(tmp_path: Path) -> None:
    save(sizes.make(NAMED["moonlight"]), None, tmp_path, max_shard_bytes=20_000)
    sorted(tmp_path.glob("model-*"))[1].unlink()
    with pytest.raises(UserError, match="which its index names"):
        load(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a checkpoint"):
        load(tmp_path / "nowhere")


def test_saving_again_removes_old_shards(tmp_path: Path) -> None:
    model = sizes.make(NAMED["moonlight"])
    save(model, None, tmp_path, max_shard_bytes=20_000)
    save(model, None, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_an_interrupted_save_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sizes.make(NAMED["moonlight"])
    save(model, None, tmp_path)
    monkeypatch.setattr("shoestring.models.checkpoint.write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(model, None, tmp_path)
    with pytest.raises(UserError, match="cut short"):
        load(tmp_path)


@pytest.mark.parametrize(("given", "wanted"), [(None, "end"), (5, ["end", 5]), ((5, "end"), [5, "end"])])
def test_other_software_is_told_where_a_turn_ends(given: Any, wanted: Any, tmp_path: Path) -> None:
    """A config without an end token, or with another one: `generate` of transformers stops at the tokenizer's too."""
    tokenizer = Tokenizer.train(["some words to learn from"], 300)

    def resolved(ids: Any) -> Any:
        return [resolved(i) for i in ids] if isinstance(ids, list | tuple) else tokenizer.end if ids == "end" else ids

    eos = resolved(given)
    config = DenseConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
    )  # fmt: skip
    folder = save(Dense(config), tokenizer, tmp_path / "m")
    told = json.loads((folder / "generation_config.json").read_text())
    assert told["eos_token_id"] == resolved(wanted) and told["pad_token_id"] == tokenizer.pad_id


def test_a_file_that_is_opened_anew_while_it_is_read_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.randn(50, 40), "b": torch.randn(7), "c": torch.randn(30, 20)}
    checkpoint_files.write_tensors(tensors, tmp_path / checkpoint_files.SINGLE)
    monkeypatch.setattr(checkpoint_files, "PIECE_ELEMENTS", 200)
    monkeypatch.setattr(checkpoint_files, "MAPPED", 2000)
    opened: list[Path] = []
    before = checkpoint_files.open_safetensors
    monkeypatch.setattr(checkpoint_files, "open_safetensors", lambda path: opened.append(path) or before(path))
    files = checkpoint_files.Files(tmp_path)
    for name, tensor in tensors.items():
        made = torch.zeros_like(tensor)
        for rows, part in files.pieces(name):
            made[rows] = part
        assert torch.equal(made, tensor)
    assert len(opened) > 3
