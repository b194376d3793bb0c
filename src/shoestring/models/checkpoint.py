"""Checkpoints in Hugging Face's layout, in and out: config.json, safetensors (sharded, with index), tokenizer.

What is saved here, `transformers` loads, and the reverse, with the same logits. FP8 weights (`weight_scale_inv`) are
read and dequantised. `config.json` is written last and removed first, so a folder that has one is whole.
Left out: pickled `.bin` files (never opened), writing FP8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoestring.core.atomic import write_json
from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.hub import checkpoint_folder
from shoestring.core.registry import list_parts, load_part
from shoestring.models.checkpoint_files import Files, appearing, read_json, write_shards
from shoestring.models.checkpoint_names import disk_tensors, has_mtp, is_needless, mtp_copies
from shoestring.nn.decoder import Decoder, Embedding
from shoestring.nn.experts import Experts
from shoestring.nn.fp8 import BLOCK, dequantize
from shoestring.nn.kernels import Kernels
from shoestring.nn.linear import Linear
from shoestring.nn.moe import Gate
from shoestring.text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_log = logging.getLogger("shoestring")


def load(
    path_or_id: str | Path, *, dtype: str = "auto", device: str | torch.device | None = None,
    kernels: Kernels | None = None, frozen: Callable[[Any], Kernels] | None = None,
) -> tuple[Decoder, Tokenizer | None]:  # fmt: skip
    """Model and tokenizer (None when there is no tokenizer.json) of a folder, or of a model id on the hub.

    `dtype` is what the weights are kept in; "auto" is what config.json says. `kernels` defaults to products in that
    dtype, and to the attention that is fast on the device. `frozen`: the model is never trained; this gives the kernels
    for its config, and tables, linear layers and experts are kept in the dtype of their products from the start.
    Raises UserError for whatever is missing, extra, misshapen, NaN or cut short.
    """
    _check_device(device)
    folder = checkpoint_folder(path_or_id)
    raw = read_json(folder / "config.json")
    if not isinstance(raw.get("model_type"), str):
        if (folder / "manifest.json").exists():
            raise UserError(f"{folder} is the directory of a run; give one of the folders in its checkpoints/.")
        raise UserError(f"{folder / 'config.json'}: model_type {raw.get('model_type')!r} is not supported.")
    files = Files(folder)
    stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    chosen = (stored if stored in DTYPES else "float32") if dtype == "auto" else dtype
    if chosen not in DTYPES:
        raise UserError(f'dtype "{dtype}" is not known.{did_you_mean(dtype, (*DTYPES, "auto"))}')
    if kernels is None:
        attention: Any = "blocks" if torch.device(device or "cpu").type == "cpu" else "sdpa"
        kernels = Kernels(dtype="float32" if chosen == "float32" else "bfloat16", attention=attention)
    model: Decoder
    if (other := borrowed(raw["model_type"])) is not None:
        model = other.load(folder, dtype=DTYPES[chosen], device=device)
        model.kernels = kernels if frozen is None else frozen(model.config)
    else:
        model = build(raw, files.names, kernels=kernels, dtype=DTYPES[chosen], device=device, frozen=frozen)
        _fill(model, files, raw)
    if frozen is not None:
        model.requires_grad_(False)
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
        tokenizer.check_vocab(model.config.vocab_size)
    return model, tokenizer


def save(
    model: Decoder, tokenizer: Tokenizer | None, path: str | Path, *, max_shard_bytes: float = 5e9,
    dtype: str | None = None, generation_config: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a folder that `load` and transformers read. `dtype` None keeps the weights' own. Raises DiskFull."""
    folder = Path(path)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f'dtype "{dtype}" is not known.{did_you_mean(dtype, DTYPES)}')
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to save in.")
    raw = model.config.to_hf()
    if tokenizer is not None:
        tokenizer.check_vocab(model.config.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    theirs: Any = model
    if hasattr(theirs, "save_weights"):  # of transformers: its layout, its config.json
        with appearing(folder) as part:  # which it writes before the weights
            theirs.save_weights(part, max_shard_bytes, None if dtype is None else DTYPES[dtype])
            path = part / "generation_config.json"
            write_json(path, _generation((read_json(path) if path.exists() else {}), raw, tokenizer))
            if tokenizer is not None:
                tokenizer.save(part, model_type=raw.get("model_type", ""))
        return folder
    (folder / "config.json").unlink(missing_ok=True)
    tensors = disk_tensors(model) | mtp_copies(model)
    if dtype is not None:
        tensors = {name: _cast(name, tensor, DTYPES[dtype]) for name, tensor in tensors.items()}
    write_shards(tensors, folder, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder, model_type=raw.get("model_type", ""))
    write_json(folder / "generation_config.json", _generation({}, raw, tokenizer) | (generation_config or {}))
    name = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", raw | {"dtype": name, "torch_dtype": name})
    return folder


def _generation(given: dict[str, Any], raw: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What other software generates with: the ids of the config, and the tokenizer's end of a turn among the stops."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = given | {name: raw[name] for name in names if given.get(name) is None and raw.get(name) is not None}
    if tokenizer is None:
        return ids
    for name, known in (("bos_token_id", tokenizer.begin_id), ("pad_token_id", tokenizer.pad_id)):
        if ids.get(name) is None and known is not None:
            ids[name] = known
    stops = ids.get("eos_token_id")
    told = list(stops) if isinstance(stops, list | tuple) else [] if stops is None else [stops]
    if tokenizer.end_id is not None and tokenizer.end_id not in told:
        ids["eos_token_id"] = [tokenizer.end_id, *told] if told else tokenizer.end_id
    return ids


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f'device "{device}" cannot be used here: {reason}.') from None


def borrowed(model_type: str) -> Any:
    """The module that takes models of transformers, for a `model_type` that no family of ours declares; else None."""
    module = load_part("models", "any")
    ours = (getattr(load_part("models", name), "MODEL_TYPES", ()) for name in list_parts("models"))
    return module if not any(model_type in types for types in ours) and module.knows(model_type) else None


def family(model_type: str) -> Any:
    """The module of models/ that declares this `model_type` in its MODEL_TYPES."""
    known: dict[str, Any] = {}
    for name in list_parts("models"):
        module = load_part("models", name)
        known.update(dict.fromkeys(getattr(module, "MODEL_TYPES", ()), module))
    if model_type not in known:
        raise UserError(f'config.json: model_type "{model_type}" is not supported.{did_you_mean(model_type, known)}')
    return known[model_type]


def build(
    raw: dict[str, Any], names: Iterable[str], *, kernels: Kernels, dtype: torch.dtype,
    device: str | torch.device | None, frozen: Callable[[Any], Kernels] | None = None,
) -> Decoder:  # fmt: skip
    """An unfilled model for the contents of a config.json; MTP modules only if the files hold their weights."""
    module = family(raw.get("model_type", ""))
    try:
        config = module.CONFIG.from_hf(raw)
    except KeyError as missing:
        raise UserError(f"config.json lacks the key {missing}.") from None
    if getattr(config, "num_nextn_predict_layers", 0) and not has_mtp(list(names), config.num_hidden_layers):
        _log.warning("config.json announces multi-token prediction, but the files hold no weights for it: left out.")
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    model: Decoder = module.MODEL(config, kernels=kernels if frozen is None else frozen(config), device="meta")
    matrices = model_matrices(model) if frozen is not None else set()
    exact = {id(gate.e_score_correction_bias) for gate in model.modules() if isinstance(gate, Gate)}  # decides ties

    def real(part: Tensor) -> Tensor:  # not to_empty: on meta tensors that imports sympy (LOG.md, entry 18)
        kept = part.dtype if id(part) in exact or not part.is_floating_point() else dtype
        kept = model.kernels.torch_dtype if id(part) in matrices else kept
        return torch.empty(part.shape, dtype=kept, device=device or "cpu")

    return model._apply(real)


def model_matrices(model: Decoder) -> set[int]:
    """The ids of the parameters that are nothing but factors of products: tables, linear layers, experts. What a model
    computes is the same, to the bit, when they are kept in the dtype of the products; not so norms and routers."""
    parts = (part for part in model.modules() if isinstance(part, Linear | Embedding | Experts))
    return {id(parameter) for part in parts for parameter in part.parameters(recurse=False)}


@torch.no_grad()
def _fill(model: Decoder, files: Files, raw: dict[str, Any]) -> None:
    wanted = disk_tensors(model)
    tied, n_layers = model.config.tie_word_embeddings, model.config.num_hidden_layers
    _compare(wanted, [name for name in files.names if not is_needless(name, tied, n_layers)], files.folder)
    block = _fp8_block(raw)
    for name, target in wanted.items():
        _same_shape(name, files.shape(name), target, files.folder)
        scale = files.read(f"{name}_scale_inv") if f"{name}_scale_inv" in files.file_of else None
        for rows, tensor in files.pieces(name) if scale is None else [(..., files.read(name))]:
            if scale is not None:
                tensor = _dequantized(name, tensor, scale, block, files.folder)
            elif tensor.dtype == torch.float8_e4m3fn:
                raise UserError(f"{files.folder}: {name} is fp8 and its scale {name}_scale_inv is missing.")
            elif not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"{files.folder}: {name} is {kind}; only floating-point weights and fp8 are read.")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{files.folder}: {name} holds NaN or infinite values; this checkpoint is broken.")
            target[rows] = tensor


def _dequantized(name: str, tensor: Tensor, scale: Tensor, block: int, where: Path) -> Tensor:
    wanted = [-(-size // block) for size in tensor.shape]
    if tensor.ndim != 2 or list(scale.shape) != wanted:
        shapes = f"{tuple(scale.shape)}, and blocks of {block} ask for {tuple(wanted)}"
        raise UserError(f"{where}: {name}_scale_inv is {shapes}; the two do not belong together.")
    return dequantize(tensor, scale, block)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)


def _fp8_block(raw: dict[str, Any]) -> int:
    told = raw.get("quantization_config")
    sizes = (told.get("weight_block_size") if isinstance(told, dict) else None) or [BLOCK, BLOCK]
    square = isinstance(sizes, list) and len(sizes) == 2 and sizes[0] == sizes[1]
    if not square or not isinstance(sizes[0], int) or sizes[0] < 1:
        raise UserError(f"config.json: weight_block_size is {sizes!r}; only square blocks, [128, 128], are supported.")
    return sizes[0]


def _same_shape(name: str, shape: Sequence[int], target: Tensor, where: Path) -> None:
    if tuple(shape) != tuple(target.shape):
        shapes = f"{tuple(shape)} on disk and {tuple(target.shape)} by its config"
        raise UserError(f"{where}: {name} is {shapes}; the two do not belong together.")


def _compare(wanted: Iterable[str], found: Iterable[str], where: Path) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    for what, names in (("lacks", missing), ("holds, beyond what its config describes,", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{where} {what} {', '.join(names[:3])}{more}; weights and config do not belong together.")
