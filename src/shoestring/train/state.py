"""Training state on disk: exact fp32 weights in Hugging Face layout, optimiser moments, counters. No pickle.

A checkpoint folder is loadable by anyone as a model; `optimizer.safetensors` and `training.json` beside it make it
resumable. Data order and random draws are functions of (seed, step), so there is no RNG state to save.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shoestring.core.errors import UserError
from shoestring.core.registry import load_part
from shoestring.models import checkpoint
from shoestring.models.checkpoint_files import open_safetensors, read_json
from shoestring.nn import lora
from shoestring.nn.decoder import Decoder
from shoestring.nn.kernels import Kernels
from shoestring.optim.base import Optimizer
from shoestring.optim.make import optimizers
from shoestring.text.tokenizer import Tokenizer
from shoestring.train import states
from shoestring.train.configs import Compute, ModelSpec, TrainBase
from shoestring.train.context import Context, step_generator
from shoestring.train.machine import keep_freed_memory
from shoestring.train.step import TrainState

TRAINING_SCHEMA = 2  # 2: sampled tokens are counted
COUNTERS = ("step", "tokens", "sampled", "flops")
ADAPTERS = "adapters.safetensors"  # of LoRA: what training moves, beside the merged weights
REFERENCE = "reference"  # folder beside the weights, when a KL term keeps a frozen model


def make_model(spec: ModelSpec, *, vocab_size: int, seed: int) -> Decoder:
    """A new model of a family of `models/`, initialised from `seed`."""
    part, config = described_model(spec, vocab_size=vocab_size)
    model: Decoder = part.MODEL(config, generator=step_generator(seed, 7))
    return model


def described_model(spec: ModelSpec, *, vocab_size: int) -> tuple[Any, Any]:
    """The family and the config of a model to be made. Raises UserError for what cannot be."""
    part = load_part("models", spec.family)
    if not hasattr(part, "MODEL"):
        raise UserError(f'"{spec.family}" is no model family; a family is a file of models/ with a MODEL and a CONFIG.')
    config = part.CONFIG.from_dict({**spec.config, "vocab_size": vocab_size}, where=f"model of family {spec.family}")
    return part, config


def checked_device(name: str) -> torch.device:
    """The device of this name. Raises UserError when this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'compute.device is "{name}", which is not usable here ({reason}); use "cpu".') from None
    return device


def use_kernels(model: Any, ctx: Context, compute: Compute, *, tokens: int, seq_len: int) -> None:
    """Set how the model computes and record the choice in the manifest."""
    keep_freed_memory()
    model.to(checked_device(compute.device))
    model.kernels = ctx.machine.kernels(model.config, compute, tokens=tokens, seq_len=seq_len)
    counted = model.config.shape().note  # what the FLOPs of the bill take for granted
    ctx.run.note(kernels=str(model.kernels), processor=ctx.machine.key, **({"counted": counted} if counted else {}))


def load_model(ctx: Context, role: str) -> tuple[Any, Tokenizer]:
    """Model and tokenizer of an input; the tokenizer must be there and fit."""
    return _load(ctx.checkpoint_of(role))


def load_frozen(ctx: Context, role: str, compute: Compute, *, tokens: int, seq_len: int) -> tuple[Any, Tokenizer]:
    """Model and tokenizer of an input that is never trained, on the stage's device, with the kernels of this machine;
    what products read is kept in their dtype from the start (models/checkpoint.py)."""

    def kernels(config: Any) -> Kernels:
        return ctx.machine.kernels(config, compute, tokens=tokens, seq_len=seq_len)

    model, tokenizer = _load(ctx.checkpoint_of(role), kernels)
    return model.to(checked_device(compute.device)), tokenizer


def _load(path: Path, frozen: Callable[[Any], Kernels] | None = None) -> tuple[Any, Tokenizer]:
    model, tokenizer = checkpoint.load(path, dtype="float32", frozen=frozen)
    if tokenizer is None:
        raise UserError(f"{path} holds no tokenizer.json; save the model together with its tokenizer.")
    return model, tokenizer


def start_or_resume(
    ctx: Context, stage: TrainBase, fresh: Any, more: Callable[[Any], None] = lambda model: None
) -> tuple[TrainState, Tokenizer]:
    """The state of the run's last checkpoint, or that of `fresh()` -> (model, tokenizer). `more(model)` gives it what
    is trained beside its weights."""
    latest, device = ctx.run.latest_checkpoint(), checked_device(stage.compute.device)
    if latest is None:
        ctx.run.rewind_metrics(0)  # rows of an attempt that died before its first checkpoint
        model, tokenizer = fresh()
        model.to(device)
        _adapt(model, stage)
        more(model)
        return TrainState(model, _optimizers(model, stage)), tokenizer
    step, path = latest
    try:
        # beside adapters lie weights that are the sum already; the adapters belong to those the stage began with
        if (path / ADAPTERS).exists():
            model, tokenizer = fresh()
        else:
            model, tokenizer = _load(path)
        model.to(device)
        _adapt(model, stage)
        more(model)
        state = TrainState(model, _optimizers(model, stage))
        _load_training(state, path)
        if state.step != step:
            raise UserError(f"{path} says step {state.step} inside")
    except UserError as error:
        raise UserError(
            f"the last checkpoint of {ctx.run.name} cannot be used ({str(error).rstrip('.')}); delete {path} to go on "
            "from the one before it."
        ) from error
    ctx.run.rewind_metrics(step)
    return state, tokenizer


def _adapt(model: Any, stage: TrainBase) -> None:
    """Give the model the stage's adapters, when it asks for them."""
    given = getattr(stage, "lora", None)
    if given is None:
        return
    lora.attach(model, given.rank, given.alpha, given.dora, step_generator(stage.seed, 17))


def _optimizers(model: nn.Module, stage: TrainBase) -> list[Optimizer]:
    o = stage.optim
    return optimizers(model, o.kind, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)


def save_training(ctx: Context, state: TrainState, tokenizer: Tokenizer) -> Path:
    """Write a checkpoint atomically; the two newest are kept."""
    folder = ctx.run.begin_checkpoint(state.step)
    checkpoint.save(lora.merged(state.model), tokenizer, folder)
    if lora.is_attached(state.model):
        moved = {name: t.detach().cpu().contiguous() for name, t in lora.moved(state.model).items()}
        save_file(moved, folder / ADAPTERS)
    states.save(state.model, folder)
    moments: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        for optimizer in state.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                moments[f"{name}|{key}"] = value.cpu().contiguous()
    save_file(moments, folder / "optimizer.safetensors")
    counters = {"schema": TRAINING_SCHEMA} | {name: getattr(state, name) for name in COUNTERS}
    (folder / "training.json").write_text(json.dumps(counters, indent=1))
    if state.reference is not None:
        checkpoint.save(state.reference, None, folder / REFERENCE)
    return ctx.run.commit_checkpoint(state.step)


def _load_training(state: TrainState, path: Path) -> None:
    counters = read_json(path / "training.json")
    if counters.get("schema") != TRAINING_SCHEMA:
        raise UserError(f"{path}/training.json: schema {counters.get('schema')}; this version reads {TRAINING_SCHEMA}.")
    device = state.model.embedding.device
    if (path / ADAPTERS).exists():
        kept = open_safetensors(path / ADAPTERS)
        moved = lora.moved(state.model)
        if lacking := sorted(moved.keys() - set(kept.keys())):
            raise UserError(f"{path / ADAPTERS} lacks {lacking[0]}")
        with torch.no_grad():
            for name, tensor in moved.items():
                tensor.copy_(kept.get_tensor(name))
    states.load(state.model, path)
    file = open_safetensors(path / "optimizer.safetensors")
    moments = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118 - no mapping
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, _, moment = key.partition("|")
        by_name.setdefault(name, {})[moment] = value
    owner = {id(p): o for o in state.optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in state.model.named_parameters():
        if name in by_name:
            owner[id(parameter)].state[parameter] = by_name[name]
    for name in COUNTERS:
        setattr(state, name, counters[name])
    if (path / REFERENCE).exists():
        reference, _ = checkpoint.load(path / REFERENCE, dtype="float32")
        state.reference = reference.to(device).requires_grad_(False)
