"""A tiny V3 model with its tokenizer, and problems to train it on."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from shoestring.data.textbook import solved
from shoestring.models.deepseek import Deepseek, DeepseekConfig
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
