"""Models of transformers behind our interface: logits, isolation, round trip, training; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.errors import UserError
from shoestring.infer.score import score
from shoestring.losses import forward_kl
from shoestring.losses._teacher import Hidden
from shoestring.losses._tokens import Tokens
from shoestring.models import checkpoint
from shoestring.models.any import AnyModel
from shoestring.nn.kernels import Kernels
from shoestring.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def _made(folder: Path, kind: str = "olmo2", **changes: object) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["olmo2", "mistral", "phi3", "gpt_neox"])
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model, _ = checkpoint.load(_made(tmp_path, kind))
    assert isinstance(model, AnyModel)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.shape().params().total == sum(p.numel() for p in theirs.parameters())


TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("olmo2", {}),
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4, **TWO_KINDS}),
        ("cohere2", {"sliding_window": 4, **TWO_KINDS}),  # and a scale on its logits
        ("granite", {"logits_scaling": 3.0}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5}),  # positions from a mask of its own
        ("bloom", {}),  # ALiBi
        ("mamba", {"state_size": 4}),
    ],
)
def test_packed_examples_do_not_see_each_other(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Logits of packed sequences are those of transformers for each alone, and so are gradients."""
    model, _ = checkpoint.load(_made(tmp_path, kind, **changes))
    model.train()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    lengths = [5, 9, 7]
    alone = [torch.randint(3, 64, (1, length)) for length in lengths]
    filler = torch.zeros(1, 3, dtype=torch.int64)
    positions, segments = [i for n in lengths for i in range(n)], [s for s, n in enumerate(lengths) for _ in range(n)]
    logits = model(
        torch.cat([*alone, filler], dim=1), positions_BT=torch.tensor([[*positions, 0, 0, 0]]),
        segments_BT=torch.tensor([[*segments, -1, -1, -1]]),
    ).logits[0, :-3]  # fmt: skip
    wanted = torch.cat([theirs(ids, use_cache=False).logits[0] for ids in alone])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    for said in (logits, wanted):
        torch.log_softmax(said, dim=-1)[:, 3].sum().backward()
    for ours, other in zip(model.hf.parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None and other.grad is not None
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_round_trip_and_bf16(tmp_path: Path) -> None:
    model, _ = checkpoint.load(_made(tmp_path / "a"))
    checkpoint.save(model, None, tmp_path / "b")
    again, _ = checkpoint.load(tmp_path / "b")
    ids = torch.randint(0, 64, (1, 6))
    assert torch.equal(model(ids).logits, again(ids).logits)
    again.kernels = Kernels(dtype="bfloat16")
    hidden = again(ids, logits=False).hidden_BTD
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), model(ids).hidden_BTD, rtol=0.05, atol=0.05)


def test_a_pass_leaves_the_weights_alone(tmp_path: Path) -> None:
    """RWKV halves weights of every sixth block when it is evaluated; what is saved must be what was loaded."""
    made = _made(tmp_path / "a", "rwkv", num_hidden_layers=7, attention_hidden_size=32)
    model, _ = checkpoint.load(made)
    before = transformers.AutoModelForCausalLM.from_pretrained(made).state_dict()
    ids = torch.randint(3, 64, (1, 6))
    logits = model(ids).logits
    checkpoint.save(model, None, tmp_path / "b")
    again, _ = checkpoint.load(tmp_path / "b")
    assert all(torch.equal(value, before[name]) for name, value in again.hf.state_dict().items())
    assert torch.equal(again(ids).logits, logits)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made).eval()
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "nanochat"])
def test_a_softcap_is_part_of_logits_and_losses(kind: str, tmp_path: Path) -> None:
    """Of student and teacher, in value and gradient, at a temperature; and of what is scored."""
    model, _ = checkpoint.load(_made(tmp_path, kind, final_logit_softcapping=0.5))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 64, (2, 9))
    wanted = theirs(ids).logits
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    logp = torch.log_softmax(wanted / 1.5, dim=-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(torch.tensor(score(model, ids.tolist(), temperature=1.5)), logp, rtol=1e-4, atol=1e-5)
    hidden = model(ids, logits=False).hidden_BTD.flatten(0, 1)
    told = Hidden(hidden.detach().flip(0), model.head_weight.detach(), 64, 0.5)
    tokens = Tokens(ids.flatten(), torch.ones(18), teacher=told, softcap=0.5)
    forward_kl.loss(hidden, model.head_weight, tokens, temperature=1.5, vocab=64)[0].backward()
    flat = wanted.flatten(0, 1)
    p, logq = torch.softmax(flat.detach().flip(0) / 1.5, dim=-1), torch.log_softmax(flat / 1.5, dim=-1)
    (p * (p.log() - logq)).sum().backward()
    for ours, other in zip(model.hf.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_what_the_losses_do_not_follow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _made(tmp_path)
    family = transformers.models.olmo2.modeling_olmo2.Olmo2ForCausalLM
    plain = family.forward

    def bent(self: Any, *given: Any, **more: Any) -> Any:
        out = plain(self, *given, **more)
        out.logits = out.logits.square()
        return out

    with monkeypatch.context() as patch:
        patch.setattr(family, "forward", bent)
        with pytest.raises(UserError, match="more than a product with its head"):
            checkpoint.load(made)
        patch.setattr(family, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel")))
        with pytest.raises(UserError, match=r"cannot run it \(no kernel\)"):
            checkpoint.load(made)


def test_damage_is_said(tmp_path: Path) -> None:
    folder = _made(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"lm_head\.weight holds NaN"):
        checkpoint.load(folder)
    with pytest.raises(UserError, match="not sampled by this engine"):
        AnyModel(transformers.AutoModelForCausalLM.from_config(model.config)).new_cache(1, 8)


def test_an_unknown_type_is_still_said(tmp_path: Path) -> None:
    folder = _made(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"olmo2"', '"nonsense"'))
    with pytest.raises(UserError, match='"nonsense" is not supported'):
        checkpoint.load(folder)


def test_a_save_that_is_cut_short_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers writes config.json first; ours promise that a folder which has one is whole."""
    model, _ = checkpoint.load(_made(tmp_path / "a"))
    saved = type(model.hf).save_pretrained

    def cut(self: Any, folder: Path, **options: Any) -> None:
        saved(self, folder, **options)
        assert (Path(folder) / "config.json").exists() and not (tmp_path / "b" / "config.json").exists()
        (Path(folder) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model.hf), "save_pretrained", cut)
        checkpoint.save(model, None, tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())
    checkpoint.save(model, None, tmp_path / "b", max_shard_bytes=10_000)
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 1
    checkpoint.save(model, None, tmp_path / "b")  # and the shards of an earlier save are gone
    assert [path.name for path in (tmp_path / "b").glob("model*")] == ["model.safetensors"]
    again, _ = checkpoint.load(tmp_path / "b")
    assert torch.equal(again.head_weight, model.head_weight)


def test_a_vocabulary_within_a_config_of_several_parts(tmp_path: Path) -> None:
    """Of a model that also sees, config.json has vocab_size under text_config alone."""
    tokenizer = Tokenizer.train(["hello there"], 300)
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    text = TINY | {"vocab_size": tokenizer.vocab_size}
    config = transformers.AutoConfig.for_model("gemma3", text_config=text, vision_config=sees)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model, found = checkpoint.load(tmp_path)
    checkpoint.save(model, found, tmp_path / "again")
    ids = torch.tensor([[3, 4, 5]])
    again, _ = checkpoint.load(tmp_path / "again")
    assert torch.equal(again(ids).logits, model(ids).logits)
