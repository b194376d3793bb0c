"""The engine's side of the pipe: a process that holds one model and does nothing but receive, step and send.

It is started fresh (spawn), so that it has its own interpreter, its own torch threads and nothing of the server's.
Messages in: ("add", id, prompt ids, sampling fields, salt), ("cancel", id), ("stop",). Messages out: ("ready", facts),
("events", [Event, ...]), ("refused", id, sentence), ("broken", id, traceback), ("stats", {...}), ("failed", words). It
ends when the pipe does, so that it never outlives a killed server.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from shoestring.core.garbage import seldom_searched

STATS_SECONDS = 0.25
NICENESS = 5  # the server answers /health while the engine takes every core


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What to load, and how large."""

    name: str
    weights: str
    dtype: str = "auto"
    device: str | None = None
    threads: int = 1
    max_engine_tokens: int = 1 << 17
    deterministic: bool = False
    speculative: bool = False


def engine_main(spec: EngineSpec, pipe: Connection) -> None:
    """The whole life of the process."""
    # Ctrl-C and a service's stop reach the whole group of processes; they are the server's to hear, which tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICENESS)
    try:
        engine, facts = _load(spec)
        pipe.send(("ready", facts))
        _run(engine, pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        _tell(pipe, ("failed", f"{type(error).__name__}: {error}", traceback.format_exc()))
        raise SystemExit(1) from None


def _load(spec: EngineSpec) -> tuple[Any, dict[str, Any]]:
    import torch

    from shoestring.infer.engine import Engine
    from shoestring.models.checkpoint import load

    torch.set_num_threads(max(1, spec.threads))
    began = time.perf_counter()
    model, tokenizer = load(spec.weights, dtype=spec.dtype, device=spec.device)
    engine = Engine(
        model, tokenizer, cache_tokens=spec.max_engine_tokens, deterministic=spec.deterministic,
        speculative=spec.speculative,
    )  # fmt: skip
    facts = {
        "seconds": time.perf_counter() - began,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": model.config.vocab_size,
        "positions": model.config.max_position_embeddings,
        "device": str(next(model.parameters()).device),
    }
    return engine, facts


@seldom_searched()
def _run(engine: Any, pipe: Connection) -> None:
    told = 0.0
    while True:
        idle = not engine.has_work
        if idle or time.monotonic() - told > STATS_SECONDS:
            pipe.send(("stats", engine.stats()))
            told = time.monotonic()
        if idle or pipe.poll(0):
            if not _obey(engine, pipe, pipe.recv()):
                return
        elif events := engine.step():
            pipe.send(("events", events))


def _obey(engine: Any, pipe: Connection, message: tuple[Any, ...]) -> bool:
    from shoestring.core.errors import UserError

    if message[0] == "add":
        _, request_id, prompt_ids, sampling, salt = message
        try:
            engine.add(prompt_ids, sampling, request_id=request_id, salt=salt)
        except UserError as error:
            pipe.send(("refused", request_id, str(error)))
        except Exception:  # nothing of it is queued: it is no reason to end the others
            pipe.send(("broken", request_id, traceback.format_exc()))
    elif message[0] == "cancel":
        engine.cancel(message[1])
    return bool(message[0] != "stop")


def _tell(pipe: Connection, message: tuple[Any, ...]) -> None:
    try:
        pipe.send(message)
    except OSError:
        return
