"""Kernels chosen by measurement: one of the candidates, all of them on record, no global randomness used."""

from __future__ import annotations

import json
from typing import Any

import model_sizes as sizes
import pytest
import torch

from shoestring.nn.choose import attentions, choose_kernels

EVERY = {f"{dtype} {way}" for dtype in ("float32", "bfloat16") for way in ("loop", "bmm", "grouped")}
DENSE = {"float32 loop", "bfloat16 loop"}


@pytest.mark.parametrize(
    ("config", "fixed", "expected"),
    [
        (sizes.deepseek(**sizes.V3), {}, EVERY),
        (sizes.deepseek(first_k_dense_replace=0, num_hidden_layers=1), {}, EVERY),
        (sizes.deepseek(moe_intermediate_size=12), {}, EVERY - {"bfloat16 grouped"}),  # 24 bytes a row
        (sizes.deepseek(first_k_dense_replace=3), {}, DENSE),
        (sizes.dense(), {}, DENSE),
        (sizes.deepseek(), {"dtype": "float32"}, {label for label in EVERY if label.startswith("float32")}),
        (sizes.deepseek(), {"experts": "bmm"}, {label for label in EVERY if " bmm" in label}),
        (sizes.deepseek(), {"dtype": "bfloat16", "experts": "loop"}, {"bfloat16 loop"}),
    ],
)
def test_the_choice_and_its_record(config: Any, fixed: dict[str, str], expected: set[str]) -> None:
    state = torch.get_rng_state()
    with torch.no_grad():  # the caller's business
        best, record = choose_kernels(config, 64, 16, **fixed)
    assert torch.equal(torch.get_rng_state(), state)
    first, *others = attentions(best.dtype)  # the others are measured beside the best alone
    assert set(record["ms"]) == {f"{label} {first}" for label in expected} | {
        f"{best.dtype} {best.experts} {other}" for other in others
    }
    assert all(ms > 0 for ms in record["ms"].values())
    assert record["chosen"] == f"{best.dtype} {best.experts} {best.attention}"
    assert record["ms"][record["chosen"]] == min(record["ms"].values())
    assert (record["tokens"], record["seq_len"]) == (64, 16)
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(("tokens", "seq_len", "shape"), [(10, 64, (1, 10)), (64, 24, (2, 24)), (1, 1, (1, 1))])
def test_odd_sizes(tokens: int, seq_len: int, shape: tuple[int, int]) -> None:
    _, record = choose_kernels(sizes.deepseek(), tokens, seq_len, dtype="float32")
    assert (record["tokens"], record["seq_len"]) == (shape[0] * shape[1], shape[1])


def test_without_a_compiler_attention_is_made_of_blocks(
    monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:  # fmt: skip
    monkeypatch.setenv("SHOESTRING_NATIVE", "0")
    best, record = choose_kernels(sizes.dense(), 16, 8)
    assert best.attention == "blocks" and set(record["ms"]) == {f"{label} blocks" for label in DENSE}
    assert attentions("bfloat16", "cuda") == ["sdpa"]
