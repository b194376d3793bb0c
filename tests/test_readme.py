"""The README's Python, run as it stands: but for the place of the checkpoint, and for a recipe that trains nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring import api
from shoestring.models import checkpoint
from shoestring.models.dense import Dense, DenseConfig
from shoestring.text.tokenizer import Tokenizer

README = Path(__file__).parents[1] / "README.md"


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    tokenizer = Tokenizer.train(["2 + 3 = 5"], 300)
    config = DenseConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    folder = checkpoint.save(Dense(config), tokenizer, tmp_path / "model")
    place = "runs/…/checkpoints/step_000200"
    assert place in source
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "run", lambda name: f"would run {name}")
    names: dict[str, Any] = {"tokens": torch.tensor([[1, 2, 3]])}
    exec(source.replace(place, str(folder)), names)
    assert names["logits"].shape == (1, 3, tokenizer.vocab_size) and (tmp_path / "out" / "config.json").exists()
    assert len(names["answers"][0][0].token_ids) <= 32
    assert names["plan"].model == "deepseek-v3" and names["result"] == "would run quickstart"
