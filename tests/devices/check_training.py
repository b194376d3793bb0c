"""A step of training on the pretended device: no tensor on the wrong side, and the numbers of the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.registry import list_parts, load_part
from shoestring.data.batch import Batch, Example, packed_batches, stream_batch
from shoestring.losses import next_token
from shoestring.losses._several import Several
from shoestring.losses._states import WithStates, states_sum
from shoestring.losses._teacher import Hidden, Sampled, Spans, TopK
from shoestring.losses._tokens import Tokens
from shoestring.models import checkpoint
from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig
from shoestring.nn import lora
from shoestring.nn.choose import choose_kernels
from shoestring.nn.kernels import Kernels
from shoestring.optim.make import optimizers
from shoestring.recipes import quickstart
from shoestring.train.configs import Optim, SftStage, Textbook
from shoestring.train.step import TrainState, train_step

from .pretend import NAME, WrongDevice, pretending

V = 48
WAYS = [
    Kernels(experts="loop", attention="blocks"),
    Kernels(experts="grouped", attention="sdpa"),
    pytest.param(Kernels(experts="bmm", attention="plain"), marks=pytest.mark.slow),
    pytest.param(Kernels(experts="plain", attention="sdpa"), marks=pytest.mark.slow),
    pytest.param(Kernels(dtype="bfloat16", attention="sdpa"), marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def counts() -> Iterator[Counter[str]]:
    with pretending() as counted:
        yield counted


def deepseek(device: str = "cpu", **changes: Any) -> Deepseek:
    config = DeepseekConfig(**{
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "max_position_embeddings": 64, "num_nextn_predict_layers": 1,
        "initializer_range": 0.2, **changes,
    })  # fmt: skip
    return Deepseek(config, generator=torch.Generator().manual_seed(0)).to(device)  # type: ignore[return-value]


def dense(device: str = "cpu", **changes: Any) -> Dense:
    config = DenseConfig(**{
        "model_type": "qwen3", "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "initializer_range": 0.2, **changes,
    })  # fmt: skip
    return Dense(config, generator=torch.Generator().manual_seed(0)).to(device)  # type: ignore[return-value]


def batches() -> list[Batch]:
    """Rows of a stream, and documents packed beside padding."""
    rows = torch.randint(0, V, (2, 24), generator=torch.Generator().manual_seed(1))
    examples = [Example(row[: 5 + 6 * i].tolist(), [1.0] * (5 + 6 * i)) for i, row in enumerate(rows)]
    return [stream_batch(rows.numpy()), *packed_batches(examples, row_tokens=24, tokens_per_microbatch=48, pad_id=0)]


STAGE = SftStage(
    name="x", steps=1, textbook=Textbook(mix=quickstart.LEARN), optim=Optim(lr=1e-2, warmup_steps=0),
    mtp_lambda=0.3, balance_alpha=1e-4,
)  # fmt: skip


def test_the_device_is_strict() -> None:
    here, there = torch.ones(3, device=NAME), torch.ones(3)
    with pytest.raises(WrongDevice):
        here + there
    with pytest.raises(WrongDevice):
        torch.mm(here[None], there[:, None])
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()
    assert (here + 1.0).device.type == NAME and (here.cpu() + there).device.type == "cpu"


@pytest.mark.parametrize("kernels", WAYS, ids=lambda k: f"{k.dtype}-{k.experts}-{k.attention}")
@pytest.mark.parametrize("family", [deepseek, dense])
def test_a_step_is_that_of_the_cpu(family: Callable[[], Any], kernels: Kernels) -> None:
    """Forward, MTP, balance, backward, clipping, update, router's bias."""
    stats = []
    kind: Any = "muon" if kernels.attention == "blocks" else "adamw"
    for device in ("cpu", NAME):
        model = family().to(device)
        model.kernels = kernels
        state = TrainState(model, optimizers(model, kind, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1))
        stats.append(train_step(state, batches(), next_token.loss, STAGE, progress=0.0))
        assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {device}
    here, there = stats
    near = 1e-3 if kernels.dtype == "float32" else 5e-2  # attention by other kernels: other roundings
    assert there.loss == pytest.approx(here.loss, rel=near)
    assert there.grad_norm == pytest.approx(here.grad_norm, rel=near)
    assert there.metrics == pytest.approx(here.metrics, rel=10 * near, abs=10 * near)


N, D, C = 12, 16, 20


def tokens_with(teacher: Any) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    ids, weight = torch.randint(0, V, (N,), generator=generator), torch.ones(N)
    weight[[2, 5]] = 0
    advantage, old, ref = (torch.randn(N, generator=generator) - 2 for _ in range(3))
    return Tokens(ids, weight, advantage, old, ref, teacher)


def teachers() -> dict[str, Any]:
    """What a teacher says, in every form it is kept in."""
    generator = torch.Generator().manual_seed(2)

    def hidden(width: int) -> Hidden:
        return Hidden(torch.randn(N, C, generator=generator), torch.randn(width, C, generator=generator), V)

    logp = torch.randn(N, V, generator=generator).log_softmax(-1)
    top = logp.topk(5)
    drawn = torch.randint(0, V, (N, 6), generator=generator)
    return {
        "hidden": hidden(V), "top-k": TopK(top.indices, top.values, (1 - top.values.exp().sum(-1)).log()),
        "sampled": Sampled(drawn, torch.full((N, 6), 1 / 6)), "spans": Spans(torch.arange(N) // 2, -torch.ones(N)),
        "several": Several([hidden(V), hidden(V)], (0.4, 0.6)),
        "several, logits": Several([hidden(V), hidden(V)], (0.4, 0.6), "logits"),
        "with states": WithStates(hidden(V), [torch.randn(N, C, generator=generator)]),
    }  # fmt: skip


def there(tokens: Tokens) -> Tokens:
    device = torch.device(NAME)
    fields = {name: getattr(tokens, name) for name in ("ids_N", "weight_N", "advantage_N", "old_N", "ref_N", "teacher")}
    return Tokens(**{name: None if x is None else x.to(device) for name, x in fields.items()})


PAIRS = [
    (name, kind) for name in list_parts("losses") for kind in teachers()
    if (kind == "spans") == (name == "span_likelihood")
    and not (kind == "sampled" and name != "forward_kl") and not (name in ("next_token", "policy") and kind != "hidden")
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_losses(name: str, kind: str) -> None:
    part = load_part("losses", name)
    how = {"temperature": 2.0} if name not in ("next_token", "span_likelihood") else {}
    generator = torch.Generator().manual_seed(3)
    hidden, table = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    found = []
    for device, tokens in (("cpu", tokens_with(teachers()[kind])), (NAME, there(tokens_with(teachers()[kind])))):
        leaves = [x.clone().to(device).requires_grad_() for x in (hidden, table)]
        total, metrics = part.loss(*leaves, tokens, **how)
        total.backward()
        found.append([total.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)])
        assert all(value.device.type == device for value in metrics.values())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_hidden_states_are_matched() -> None:
    generator = torch.Generator().manual_seed(0)
    h, t, projection = (torch.randn(shape, generator=generator) for shape in ((N, D), (N, C), (C, D)))
    weight = torch.rand(N, generator=generator)
    for measure in ("mse", "cosine"):
        found = []
        for device in ("cpu", NAME):
            leaves = [x.clone().to(device).requires_grad_() for x in (h, projection)]
            total = states_sum(leaves[0], t.to(device), leaves[1], weight.to(device), measure)  # type: ignore[arg-type]
            found.append([x.cpu() for x in (total.detach(), *torch.autograd.grad(total, leaves))])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters(dora: bool) -> None:
    model = dense(NAME)
    lora.attach(model, 4, 8.0, dora, torch.Generator().manual_seed(0))
    tokens = torch.arange(8, device=NAME)[None]
    model(tokens).logits.sum().backward()
    assert all(p.grad is not None and p.device.type == NAME for p in lora.adapters(model).values())
    merged = lora.merged(model)
    assert {p.device.type for p in merged.parameters()} == {NAME}
    torch.testing.assert_close(merged(tokens).logits.cpu(), model(tokens).logits.detach().cpu())


@pytest.mark.parametrize("family", [deepseek, dense])
def test_checkpoints(family: Any, tmp_path: Path) -> None:
    """Saved from the device, loaded to it, and made on it."""
    model = family(NAME)
    folder = checkpoint.save(model, None, tmp_path / "m")
    again, _ = checkpoint.load(folder, device=NAME)
    tokens = torch.arange(8)[None]
    assert {p.device.type for p in [*again.parameters(), *again.buffers()]} == {NAME}
    here, _ = checkpoint.load(folder)
    torch.testing.assert_close(again(tokens.to(NAME)).logits.cpu(), here(tokens).logits)
    made = type(model)(model.config, device=NAME, generator=torch.Generator(NAME).manual_seed(0))
    assert {p.device.type for p in [*made.parameters(), *made.buffers()]} == {NAME}


def test_kernels_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.nn.choose.REPEATS", 1)
    kernels, record = choose_kernels(deepseek().config, 64, 32, device=NAME)
    assert kernels.attention == "sdpa" and len(record["ms"]) > 1
