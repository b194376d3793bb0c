"""The multi-token-prediction module against transformers' own, which loads it from the files as they are released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_sizes as sizes
import pytest
import torch
from torch import Tensor, nn

from shoestring.models.checkpoint import save
from shoestring.models.deepseek import Deepseek

transformers = pytest.importorskip("transformers")
layers = pytest.importorskip("transformers.modeling_layers", reason="no MtpModel in this version of transformers")
if not hasattr(layers, "MtpModel"):
    pytest.skip("no MtpModel in this version of transformers", allow_module_level=True)

CASES: dict[str, dict[str, Any]] = {
    "v3": sizes.V3,
    "two modules": {**sizes.V3, "num_nextn_predict_layers": 2},
    "plain queries": {**sizes.MOONLIGHT, "num_nextn_predict_layers": 1},
    "a tied head": {**sizes.V3, "tie_word_embeddings": True},
}


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Ours, and from ours on disk their model and its MTP modules (they look for them in layer 61: told otherwise)."""
    model = sizes.make(sizes.deepseek(**CASES[request.param]), 1)
    assert isinstance(model, Deepseek)
    save(model, None, tmp_path, max_shard_bytes=20_000)
    family = transformers.DeepseekV3ForCausalLM
    L = model.config.num_hidden_layers
    names = [rf"model\.layers\.{L + k}\..*" for k in range(len(model.mtp))]
    monkeypatch.setattr(family, "_keys_to_ignore_on_load_unexpected", names)
    theirs = family.from_pretrained(tmp_path)
    return model, theirs, layers.MtpModel.from_pretrained(theirs)


def further(theirs: nn.Module, heads: nn.Module, x_BT: Tensor) -> list[Tensor]:
    """Their hidden states of every depth: depth k reads the state of depth k-1 and the token k further on."""
    from transformers.cache_utils import MtpCache

    T = x_BT.shape[1]
    hidden_BTD = theirs.model(x_BT).last_hidden_state  # after the final norm
    cache, found = MtpCache(config=heads.config), []
    for k in range(len(heads.layers)):
        ahead = T - k - 1
        hidden_BTD = heads.forward_layer(
            k, hidden_BTD[:, :ahead], torch.arange(k + 1, T)[None], cache, input_ids=x_BT[:, k + 1 :]
        )
        found.append(hidden_BTD)
    return found


def stacked(name: str) -> str:
    """Their name of one of our MTP parameters."""
    _, k, rest = name.split(".", 2)
    inside = rest.removeprefix("block.")
    return f"layers.{k}." + ("mtp_block." + inside if inside != rest else rest.replace("shared_head.norm", "post_norm"))


def test_the_same_predictions_and_gradients(pair: tuple[Any, ...]) -> None:
    model, theirs, heads = pair
    x_BT = sizes.tokens(model.config, 2, 17, 5)
    ours = [model.unembed(h) for h in model(x_BT, mtp=True).mtp_hidden]
    other = [theirs.lm_head(h) for h in further(theirs, heads, x_BT)]
    assert len(ours) == len(other) == len(model.mtp)
    for mine, its in zip(ours, other, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)
        assert torch.equal(mine.argmax(-1), its.argmax(-1))
    for logits in (ours, other):
        draw = torch.Generator().manual_seed(0)
        torch.stack([(x * torch.randn(x.shape, generator=draw)).sum() for x in logits]).sum().backward()
    reference = dict(theirs.named_parameters()) | dict(heads.named_parameters())
    for name, parameter in model.named_parameters():
        want, got = reference[stacked(name) if name.startswith("mtp.") else name].grad, parameter.grad
        if want is None or got is None:  # the main head where it is not tied: nobody asked it
            assert (want is None or not want.any()) and (got is None or not got.any()), name
            continue
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6, f"{name}: {(got - want).norm() / want.norm()}"
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "mtp.0.block" in n)
