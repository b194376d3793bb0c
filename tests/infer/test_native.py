"""The step in C: equal to the plain forward, a row the same whoever else is there, left out where it must be."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.build_c import Missing
from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling
from shoestring.infer import native, pages, runner
from shoestring.infer.engine import Engine
from shoestring.infer.pages import LARGE, Pages
from shoestring.infer.products import through_int8
from shoestring.models.dense import Dense, DenseConfig
from shoestring.nn.room import Room

from .conftest import V, deepseek, dense
from .test_paged import FAMILIES, IDS, hidden_of, pieces_of, relative, v3

REASON = native.why_not(torch.float32, torch.device("cpu"))
needs_native = pytest.mark.skipif(REASON is not None, reason=f"no native steps here: {REASON}")

ODD = {  # widths that are no multiple of any vector
    "odd": lambda: v3(
        hidden_size=41, intermediate_size=37, moe_intermediate_size=19, kv_lora_rank=21, q_lora_rank=23,
        qk_nope_head_dim=5, qk_rope_head_dim=6, v_head_dim=7, num_attention_heads=3,
    ),
    "wide": lambda: v3(
        hidden_size=96, kv_lora_rank=80, moe_intermediate_size=48, qk_nope_head_dim=32, v_head_dim=64,
        num_attention_heads=6,
    ),
    "heads of 64": lambda: heads(64),
    "heads of 160": lambda: heads(160),
}  # fmt: skip


def heads(width: int) -> Dense:
    """Narrow keys are turned before they are multiplied, wide ones are not."""
    config = DenseConfig(
        model_type="qwen3", vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=width, max_position_embeddings=128,
        initializer_range=0.2,
    )  # fmt: skip
    return Dense(config, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[*FAMILIES, *ODD])
def any_model(request: pytest.FixtureRequest) -> Any:
    return (FAMILIES | ODD)[request.param]()


def in_bf16(model: Any) -> Any:
    model.kernels = dataclasses.replace(model.kernels, dtype="bfloat16")
    return model


@needs_native
@pytest.mark.parametrize("cuts", [list(range(1, 60)), [1, 2, 12, 21, 33, 34]], ids=["tokens", "mixed"])
def test_logits_are_those_of_the_plain_forward(any_model: Any, cuts: list[int]) -> None:
    with torch.no_grad():
        expected = any_model(torch.tensor([IDS])).logits_BTV[0]
        found = any_model.unembed(hidden_of(any_model, cuts, native=True))
    assert relative(found, expected) < 1e-5


@needs_native
def test_in_bf16_it_errs_no_more_than_the_plain_steps(any_model: Any) -> None:
    """Median error against fp32, at most 1.1 times the twin's, in most of five models: one may hang on a choice
    of experts."""
    ratios = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for matrix in (p for p in any_model.parameters() if p.ndim == 2):
                matrix.copy_(matrix[:, torch.randperm(matrix.shape[1], generator=generator)])
            any_model.kernels = dataclasses.replace(any_model.kernels, dtype="float32")
            truth = any_model(torch.tensor([IDS])).hidden_BTD[0]
            native_error, plain_error = (
                float((hidden_of(in_bf16(any_model), list(range(1, 60)), native=way).float() - truth).abs().median())
                for way in (True, False)
            )
        assert native_error > 0
        ratios.append(native_error / plain_error)
    assert sorted(ratios)[2] <= 1.1


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [ODD["wide"], dense])
def test_a_row_does_not_depend_on_the_others(family: Any, dtype: str) -> None:
    """To the bit, whatever the other rows, their number, and the number of threads."""
    model = in_bf16(family()) if dtype == "bfloat16" else family()
    sampling = Sampling(temperature=1.0, seed=1, max_new_tokens=12, ignore_eos=True)
    crowd = [IDS[i : i + 5 + i % 9] for i in range(40)] * 3
    before = torch.get_num_threads()
    found = []
    try:
        for threads, others in ((1, 0), (2, 0), (2, 3), (2, 119)):
            torch.set_num_threads(threads)
            engine = Engine(model, native=True, prefix_cache=False)
            for ids in [IDS[:5], *crowd[:others]]:
                engine.add(ids, sampling)
            singles = [single for work in engine._scheduler.schedule() for single in engine._runner._singles(work)]
            found.append(engine._runner.run(singles).hidden_ND[:5].clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_prompt_s_other_rows_the_last_layer_computes_keys_and_values_alone(any_model: Any, dtype: str) -> None:
    """The same to the bit, in the cache and for the rows that are asked for."""
    model = in_bf16(any_model) if dtype == "bfloat16" else any_model
    engine = Engine(model, native=True, prefix_cache=False, max_batch_tokens=40)
    for ids in (IDS[:7], IDS[:1], IDS[7:19], IDS[:50]):
        engine.add(ids, Sampling(max_new_tokens=2))
    runner, works = engine._runner, engine._scheduler.schedule()
    upto = itertools.accumulate(work.end - work.start for work in works)
    lasts = [end - 1 for end, work in zip(upto, works, strict=True) if work.ends]
    assert len(lasts) == 3 and len(works) == 4
    store, found = runner.store, []
    for whole in (True, False):
        hidden_ND = runner.run(works, whole=whole).hidden_ND
        found.append((hidden_ND, store.keys[-1][: store.ready].clone(), store.values[-1][: store.ready].clone()))
        for arena in (store.keys[-1], store.values[-1]):
            arena[: store.ready] = 0
    (all_ND, *written), (few_ND, *written_again) = found
    assert torch.equal(all_ND[lasts], few_ND[lasts])
    assert int(few_ND.isnan().all(1).sum()) == len(few_ND) - 3 and not bool(all_ND.isnan().any())
    assert all(torch.equal(a, b) for a, b in zip(written, written_again, strict=True))
    assert not torch.equal(written[0], torch.zeros_like(written[0]))


@needs_native
def test_every_row_may_want_the_same_expert() -> None:
    model = v3(n_group=1, topk_group=1)
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 8, 0, 0, 0, 0, 0, 0]))
    sampling = Sampling(temperature=0.0, max_new_tokens=3, ignore_eos=True, routed_experts=True)
    prompts = [IDS[i : i + 9] for i in range(30)] * 5
    ours = Engine(model, native=True).generate(prompts, sampling)
    plain = Engine(model, native=False).generate(prompts, sampling)
    for (a,), (b,) in zip(ours, plain, strict=True):
        assert a.token_ids == b.token_ids
        assert a.routed_experts is not None and b.routed_experts is not None
        assert [[sorted(layer) for layer in token] for token in a.routed_experts] == [
            [sorted(layer) for layer in token] for token in b.routed_experts
        ]
        assert all(sorted(layer) == [0, 1] for token in a.routed_experts for layer in token)


@needs_native
@pytest.mark.parametrize("family", [deepseek, v3])
def test_nan_weights_are_found(family: Any) -> None:
    model = family()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        Engine(model, native=True).generate([[1]], Sampling(max_new_tokens=2))


def hidden_and_chosen(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states [N, D] of IDS token by token, and their experts [L, N, A] in order."""
    pieces = pieces_of(model, list(range(1, 60)), size=8, tile=0, native=True, routed=True)
    chosen = [ran.routed_LNA for ran in pieces if ran.routed_LNA is not None]
    hidden_ND = torch.cat([ran.hidden_ND for ran in pieces]).float()
    return hidden_ND, torch.cat(chosen, 1).sort(-1).values if chosen else None


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_stay_where_they_lie(any_model: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the numbers of packed ones; nothing is large in a test, so everything counts as such."""
    model = any_model if dtype == torch.float32 else in_bf16(any_model).bfloat16()
    with torch.no_grad():
        packed_ND, chosen_LNA = hidden_and_chosen(model)
        monkeypatch.setattr(pages, "LARGE", 0)
        found_ND, chosen_again_LNA = hidden_and_chosen(model)
    assert native.Weights(dtype).matrix(torch.zeros(3, 4, dtype=dtype)).packed == 0
    if dtype == torch.float32:
        assert relative(found_ND, packed_ND) < 1e-5
        return
    same_N = torch.ones(len(IDS), dtype=torch.bool)
    if chosen_LNA is not None and chosen_again_LNA is not None:  # by rounding, a token may choose another expert
        same_N = (chosen_LNA == chosen_again_LNA).all(-1).all(0)
    assert relative(found_ND[same_N], packed_ND[same_N]) < 2e-2
    assert int(same_N.sum()) >= len(IDS) - 6


@needs_native
@pytest.mark.parametrize("family", [v3, dense])
def test_short_and_long_prompts_of_one_step(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones are read by the plain layers, short ones as rows, whatever the order they come in."""
    monkeypatch.setattr(runner, "SINGLES", {"mla": 16, "gqa": 16})
    model = family()
    routed = model.n_experts > 0
    sampling = Sampling(temperature=0.0, max_new_tokens=5, ignore_eos=True, prompt_logprobs=0, routed_experts=routed)
    prompts = [IDS[i : i + n] for i, n in enumerate([40, 3, 30, 16, 17, 9])]
    ours = Engine(model, native=True).generate(prompts, sampling)
    plain = Engine(model, native=False).generate(prompts, sampling)
    for (a,), (b,) in zip(ours, plain, strict=True):
        assert a.token_ids == b.token_ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.prompt_logprobs is not None and b.prompt_logprobs is not None
        for mine, theirs in zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True):
            assert mine is not None and theirs is not None and mine[0] == pytest.approx(theirs[0], abs=1e-4)
        if routed:
            assert a.routed_experts is not None and b.routed_experts is not None
            pairs = zip(a.routed_experts, b.routed_experts, strict=True)
            assert all([sorted(x) for x in mine] == [sorted(x) for x in theirs] for mine, theirs in pairs)


# ---- int8
@needs_native
@pytest.mark.parametrize("family", [*FAMILIES.values(), *ODD.values()], ids=[*FAMILIES, *ODD])
def test_int8_is_the_model_with_rounded_weights(family: Any) -> None:
    """Prompts and steps alike: the same tokens and logprobs as a model whose weights went through int8."""
    model, rounded = family(), family()
    kept = ("embed", "lm_head", "norm", "gate.weight", "kv_b_proj", "mtp", "bias")
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if not any(word in name for word in kept):
                weight.copy_(through_int8(weight.flatten(0, -2)).view_as(weight))
    sampling = Sampling(temperature=0.0, max_new_tokens=8, ignore_eos=True, prompt_logprobs=0)
    prompts = [IDS[:4], IDS[3:40]]
    found = Engine(model, quantise="int8").generate(prompts, sampling)
    expected = Engine(rounded, native=False).generate(prompts, sampling)
    plain = Engine(model, native=False).generate(prompts, sampling)
    for (a,), (b,), (c,) in zip(found, expected, plain, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert a.prompt_logprobs is not None and b.prompt_logprobs is not None
        for mine, theirs in zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True):
            assert mine is not None and theirs is not None and mine[0] == pytest.approx(theirs[0], abs=1e-4)
        assert a.logprobs != pytest.approx(c.logprobs, abs=1e-5)


def test_int8_needs_native_steps(monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    with pytest.raises(UserError, match="quantise is 'int4'"):
        Engine(deepseek(), quantise="int4")  # type: ignore[arg-type]
    monkeypatch.setenv("SHOESTRING_NATIVE", "0")
    with pytest.raises(UserError, match="SHOESTRING_NATIVE is 0"):
        Engine(deepseek(), quantise="int8")


# ---- where it is left out
@pytest.fixture
def fresh_library() -> Iterator[None]:
    """As if nothing had been built in this process."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SHOESTRING_NATIVE": "0"}, "SHOESTRING_NATIVE is 0"),
        ({"CC": "no-such-compiler"}, "there is no C compiler"),
        ({"CC": "false"}, "false failed"),
        ({"PATH": ""}, "there is no C compiler"),
    ],
)
def test_without_a_compiler_steps_are_plain(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, fresh_library: None, tmp_path: Path
) -> None:
    for name in ("CC", "SHOESTRING_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    engine = Engine(deepseek())
    assert engine.stats()["native"] is False
    (completion,) = engine.generate([[1, 2, 3]], Sampling(max_new_tokens=2))[0]
    assert len(completion.token_ids) == 2
    with pytest.raises(UserError, match=reason):
        Engine(deepseek(), native=True)
    assert not list(tmp_path.rglob("*.so"))


def test_what_is_missing_is_looked_for_once(monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    """Every step asks whether there is a library; the reason stays the same until the cache is cleared."""
    monkeypatch.setenv("CC", "no-such-compiler")
    looked = []
    which = shutil.which
    monkeypatch.setattr("shutil.which", lambda name: looked.append(name) or which(name))
    for _ in range(3):
        with pytest.raises(Missing, match="there is no C compiler"):
            native.library()
    assert looked == ["no-such-compiler"]


@needs_native
def test_it_is_built_once_and_whole(
    monkeypatch: pytest.MonkeyPatch, fresh_library: None, tmp_path: Path
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library()
    (built,) = (tmp_path / "shoestring").iterdir()
    stamp = built.stat().st_mtime_ns
    native.library.cache_clear()
    native.library()
    assert [path.stat().st_mtime_ns for path in (tmp_path / "shoestring").iterdir()] == [stamp]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, fresh_library: None, tmp_path: Path
) -> None:  # fmt: skip
    tmp_path.chmod(0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "cache folder" in str(native.why_not(torch.float32, torch.device("cpu")))


def test_odd_blocks_are_plain() -> None:
    assert Engine(deepseek(), block_size=7).stats()["native"] is False
    with pytest.raises(UserError, match="block_size 7 is odd"):
        Engine(deepseek(), block_size=7, native=True)


def test_pages_hold_what_they_were_given() -> None:
    pages = Pages()
    tensors = [torch.randn(n, 33) for n in (1, 5, 700, 40_000)] + [torch.randn(6, 4).t()]
    copies = [pages.copy(tensor, torch.bfloat16) for tensor in tensors]
    for tensor, copied in zip(tensors, copies, strict=True):
        assert copied.is_contiguous() and copied.data_ptr() % 64 == 0
        assert torch.equal(copied, tensor.to(torch.bfloat16))
    large = torch.ones(LARGE // 4)
    assert pages.copy(large, torch.float32) is large and bool((large == 1).all())
    copied = pages.copy(large, torch.bfloat16)
    assert copied.numel() * 2 < LARGE and bool((copied == 1).all())


@needs_native
@pytest.mark.parametrize("shape", [(48, 64), (33, 7), (16, 34), (5, 1), (3, 40, 96), (2, 17, 65), (700, 128)])
def test_packing_in_c_is_the_plain_packing(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.randint(-30, 30, shape).float().exp2()
    weight[..., 0, 0], weight[..., -1, -1] = float("inf"), float("nan")
    made = native.pack_bf16(weight, Pages())
    plain = native.packed(weight.to(torch.bfloat16), 2)
    assert made.shape == plain.shape
    both = [words.contiguous().view(torch.bfloat16) for words in (made, plain)]
    torch.testing.assert_close(*both, rtol=0, atol=0, equal_nan=True)


@needs_native
def test_a_trainers_room_holds_the_head_until_it_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.nn.room.LARGE", 1)
    room, weight = Room(), torch.randn(100, 24)
    head = native.NativeHead(weight, torch.bfloat16, room)
    hidden = torch.randn(3, 24).bfloat16()
    logits = head(hidden)
    torch.testing.assert_close(logits, hidden.float() @ weight.bfloat16().float().t(), rtol=1e-3, atol=1e-3)
    assert head(hidden[:2]).data_ptr() == logits.data_ptr()
    assert len(room) == 0
    del head
    assert len(room) > 0
