"""A model as the server holds it: its tokenizer here, its weights in the engine's process, its line, its price."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoestring.core.errors import UserError
from shoestring.serve.engine_client import EngineClient
from shoestring.serve.engine_process import EngineSpec
from shoestring.serve.fair_queue import FairQueue
from shoestring.serve.generation import Tally
from shoestring.serve.settings import ModelSpec, ServeConfig
from shoestring.serve.tokens import TokenTexts
from shoestring.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Served:
    """One model."""

    spec: ModelSpec
    folder: Path
    tokenizer: Tokenizer
    texts: TokenTexts
    engine: EngineClient
    line: FairQueue
    positions: int
    vocab_size: int
    run: dict[str, Any] = field(default_factory=dict)  # the manifest of the run it is from
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.spec.name

    def usd(self, prompt: int, cached: int, completion: int) -> float:
        """What so many tokens cost."""
        spec = self.spec
        fresh = (prompt - cached) * spec.usd_per_million_prompt + cached * spec.usd_per_million_cached
        return (fresh + completion * spec.usd_per_million_completion) / 1e6

    def cost(self, tally: Tally) -> float:
        return self.usd(tally.prompt, tally.cached, tally.completion)

    def card(self) -> dict[str, Any]:
        """Its entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": self.spec.owner,
            "root": self.name,
            "parent": None,
            "max_model_len": self.positions,
            "meta": {
                "n_vocab": self.vocab_size,
                "n_ctx_train": self.positions,
                "n_params": self.engine.facts.get("parameters"),
            },
        }


def open_model(spec: ModelSpec, config: ServeConfig) -> Served:
    """Read what the server needs of a model; the engine is not started yet. Raises UserError."""
    folder = checkpoint_of(spec.path)
    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
    except OSError:
        raise UserError(f"{folder} holds no config.json; name a run directory or the folder of a checkpoint.") from None
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{spec.path} has no tokenizer.json; serving needs the model's tokenizer beside its weights.")
    tokenizer = Tokenizer.load(folder)
    threads = spec.threads or max(1, (os.cpu_count() or 1) // max(1, len(config.models)))
    engine = EngineSpec(
        spec.name, str(folder), spec.dtype, spec.device, threads, config.max_engine_tokens, config.deterministic,
        config.speculative,
    )  # fmt: skip
    line = FairQueue(
        max_running=config.max_running, max_queue=config.max_queue, max_queue_tokens=config.max_queue_tokens
    )
    return Served(
        spec, folder, tokenizer, TokenTexts(tokenizer), EngineClient(engine), line,
        int(raw.get("max_position_embeddings", 2048)), int(raw["vocab_size"]), _manifest(spec.path),
    )  # fmt: skip


def checkpoint_of(path: str) -> Path:
    """The last checkpoint of a run directory, a checkpoint folder as it is, or what a hub id downloads to."""
    if (Path(path) / "manifest.json").exists():
        from shoestring.core.run import Run

        latest = Run.load(path).latest_checkpoint()
        if latest is None:
            raise UserError(f"{path} holds no checkpoint to serve.")
        return Path(latest[1])
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"{path} is not a run directory, the folder of a checkpoint, nor a model id like owner/name.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{path} is no folder here; to download it, pip install 'shoestring[hf]'.") from None
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:
        raise UserError(f"{path} is no folder here, and downloading it failed: {type(error).__name__}.") from error


def _manifest(path: str) -> dict[str, Any]:
    if not (Path(path) / "manifest.json").exists():
        return {}
    from shoestring.core.run import Run

    run = Run.load(path)
    return run.manifest | {"config": run.config}
