"""A tiny V3 model with its tokenizer, and problems to train it on."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `distilling` is within reach of the tests here

from distilling import trace_of

from shoestring.data.textbook import solved
from shoestring.data.traces import TraceStore
from shoestring.models import checkpoint
from shoestring.models.deepseek import Deepseek, DeepseekConfig
from shoestring.models.dense import Dense, DenseConfig
from shoestring.recipes import quickstart
from shoestring.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = (
        " ".join((p.prompt, p.voices[v].thinking, p.voices[v].answer))
        for p, v in islice(solved(quickstart.LEARN, 0, 0.5), 400)
    )
    return Tokenizer.train(texts, 400)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Deepseek:
    config = DeepseekConfig.from_dict({
        **quickstart.TEACHER.config, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "vocab_size": tokenizer.vocab_size,
    })  # fmt: skip
    return Deepseek(config, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path, model: Deepseek, tokenizer: Tokenizer) -> Path:
    """The tiny model on disk, as anyone's checkpoint."""
    return checkpoint.save(model, tokenizer, tmp_path / "some" / "model")


@pytest.fixture(autouse=True)
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's GEMM rate without measuring it, which takes a second in every new folder of runs."""
    monkeypatch.setattr("shoestring.train.machine.gemm_rate", lambda *_, **__: 1e11)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Twelve worked answers."""
    store = TraceStore(tmp_path / "book")
    store.append([trace_of(i, p, v) for i, (p, v) in enumerate(islice(solved(quickstart.LEARN, 5, 1.0), 12))])
    return tmp_path / "book"


@pytest.fixture
def student(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A Qwen2-shaped student whose tables are padded beyond the tokenizer."""
    config = DenseConfig(
        model_type="qwen2", vocab_size=tokenizer.vocab_size + 5, hidden_size=24, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1,
    )  # fmt: skip
    return checkpoint.save(Dense(config, generator=torch.Generator().manual_seed(1)), tokenizer, tmp_path / "student")
