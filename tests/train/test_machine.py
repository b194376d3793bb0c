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
    write(tmp_path, attention="native")
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


@pytest.mark.skipif(native.why_not() is not None, reason="no native library here")
def test_elements_are_recorded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    """As attention is; the records of versions that knew none mean torch's operations."""
    assert chosen(tmp_path, FIXED).native and read(tmp_path)[name_of(tmp_path)]["elements"] == "native"
    write(tmp_path, attention="blocks")
    native.library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("SHOESTRING_NATIVE", "0")
        with pytest.raises(UserError, match="compute elements natively"):
            chosen(tmp_path, FIXED)
    native.library.cache_clear()
    write(tmp_path, elements=None)
    assert chosen(tmp_path, FIXED).elements == "torch"


def name_of(root: Path) -> str:
    """The key of the one record of kernels."""
    (name,) = (key for key in read(root) if key.startswith("kernels"))
    return name


def read(root: Path) -> dict[str, dict[str, str]]:
    """What is known of this machine."""
    (known,) = json.loads((root / "machine.json").read_text()).values()
    return dict(known)


def write(root: Path, **changes: str | None) -> None:
    """Change the record of kernels; None takes an entry away."""
    facts = json.loads((root / "machine.json").read_text())
    for known in facts.values():
        for key, found in known.items():
            if key.startswith("kernels"):
                found.update(changes)
                for gone in [name for name, value in changes.items() if value is None]:
                    del found[gone]
    (root / "machine.json").write_text(json.dumps(facts))
