"""Kernels are chosen once for a folder of runs; a choice that cannot be kept is not replaced in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoestring.core.errors import UserError
from shoestring.models.dense import DenseConfig
from shoestring.nn import native
from shoestring.nn.choose import attentions
from shoestring.nn.kernels import Kernels
from shoestring.train.configs import Compute
from shoestring.train.machine import Machine

FIXED = Compute(dtype="float32", experts="bmm")
CONFIG = DenseConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """As if no native library had been looked for in this process."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def chosen(root: Path, compute: Compute) -> Kernels:
    return Machine(root).kernels(CONFIG, compute, tokens=64, seq_len=16)


@pytest.mark.skipif(native.why_not() is not None, reason="no native library here")
@pytest.mark.parametrize("compute", [FIXED, Compute()])
def test_native_attention_that_is_gone_stops_a_resumed_run(
    compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:
    first = chosen(tmp_path, compute)
    (record,) = (found for key, found in read(tmp_path).items() if key.startswith("kernels"))
    assert record["attention"] == first.attention
    if compute is FIXED:
        assert first.attention == attentions("float32")[0]  # no clock decides where nothing is left to measure
    write_attention(tmp_path, "native")
    native.library.cache_clear()
    monkeypatch.setenv("SHOESTRING_NATIVE", "0")
    with pytest.raises(UserError, match=r"machine\.json says .* natively, .* SHOESTRING_NATIVE is 0; mend that"):
        chosen(tmp_path, compute)
    assert chosen(tmp_path / "other", compute).attention == "blocks"


def test_what_was_recorded_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    """A library that appears later changes nothing in a folder that began without it."""
    with monkeypatch.context() as patch:
        patch.setenv("SHOESTRING_NATIVE", "0")
        assert chosen(tmp_path, FIXED) == Kernels(experts="bmm", attention="blocks")
    assert chosen(tmp_path, FIXED).attention == "blocks"


def read(root: Path) -> dict[str, dict[str, str]]:
    """What is known of this machine."""
    (known,) = json.loads((root / "machine.json").read_text()).values()
    return dict(known)


def write_attention(root: Path, way: str) -> None:
    facts = json.loads((root / "machine.json").read_text())
    for known in facts.values():
        for key, found in known.items():
            if key.startswith("kernels"):
                found["attention"] = way
    (root / "machine.json").write_text(json.dumps(facts))
