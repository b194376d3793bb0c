"""Who samples from a model: `core.contracts.Generator` as the stages get it, whatever stands behind it."""

from __future__ import annotations

from typing import Any

from shoestring.core.contracts import Generator
from shoestring.infer.borrowed import BorrowedGenerator
from shoestring.infer.engine import Engine
from shoestring.nn.room import Room
from shoestring.text.tokenizer import Tokenizer


def generator_of(model: Any, tokenizer: Tokenizer, room: Room | None = None) -> Generator:
    """The engine for our own families, `transformers`' generate for theirs. `room`: of the model's trainer."""
    return BorrowedGenerator(model, tokenizer) if hasattr(model, "hf") else Engine(model, tokenizer, room=room)
