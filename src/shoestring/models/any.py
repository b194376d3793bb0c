"""Any causal language model of `transformers`, as a student or a teacher, behind the interface of our own families.

For architectures that `models/` does not have itself; loading, saving and key names are theirs. A model whose logits
are more than one product with its head (softcaps, scales, biases) is refused when loaded: losses see the head alone.
`trust_remote_code` stays off. Our engine keeps caches of its own and does not run them: they are sampled by their own
`generate` (infer/borrowed.py).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.core.errors import UserError
from shoestring.cost.hf import shape_from_hf
from shoestring.cost.shape import ModelShape
from shoestring.nn.attention import segment_bias
from shoestring.nn.decoder import Output
from shoestring.nn.kernels import FP32, Kernels

MODEL_TYPES = ()  # whatever no other family claims, when transformers knows it


class AnyConfig:
    """Their config object, with the names that ours have."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs
        text = theirs.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.hidden_size: int = text.hidden_size
        self.num_hidden_layers: int = text.num_hidden_layers
        self.max_position_embeddings: int = getattr(text, "max_position_embeddings", 1 << 20)
        self.tie_word_embeddings: bool = bool(getattr(theirs, "tie_word_embeddings", False))
        self.eos_token_id = text.eos_token_id

    def shape(self) -> ModelShape:
        return shape_from_hf(self.to_hf())

    def to_hf(self) -> dict[str, Any]:
        raw: dict[str, Any] = self.theirs.to_dict()
        return raw


class AnyModel(nn.Module):
    """A `transformers` model. Weights stay as loaded; with `kernels.dtype` bfloat16 products run under autocast."""

    n_experts = 0

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.hf = theirs
        self.config = AnyConfig(theirs.config)
        self.kernels: Kernels = FP32

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order. Raises UserError where there is no such list."""
        count = self.config.num_hidden_layers
        for part in self.hf.get_decoder().children():
            if isinstance(part, nn.ModuleList) and len(part) == count:
                return part
        raise UserError(
            f"{self.config.theirs.model_type} keeps its blocks in no list of {count}; leave hidden_states and lora out."
        )

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        weight: Tensor = self.hf.get_output_embeddings().weight
        return weight

    @property
    def embedding(self) -> Tensor:
        """[V, D] of the input."""
        weight: Tensor = self.hf.get_input_embeddings().weight
        return weight

    def unembed(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()

    def forward(
        self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, segments_BT: Tensor | None = None,
        cache: Any = None, logits: bool = True, mtp: bool = False, balance: bool = False, routing: Any = None,
    ) -> Output:  # fmt: skip
        """One pass over tokens [B, T]; `segments_BT` keeps attention inside runs of equal ids."""
        if cache is not None or mtp or routing is not None:
            raise ValueError("a model of transformers has no cache, MTP or routing of ours")
        B, T = tokens_BT.shape
        positions = torch.arange(T, device=tokens_BT.device).expand(B, T) if positions_BT is None else positions_BT
        mask = None if segments_BT is None else segment_bias(segments_BT, next(self.parameters()).dtype)
        dtype = self.kernels.torch_dtype
        with torch.autocast(tokens_BT.device.type, dtype, enabled=dtype != torch.float32):
            out = self.hf.get_decoder()(
                input_ids=tokens_BT, position_ids=positions, attention_mask=mask, use_cache=False
            )
        hidden_BTD = out.last_hidden_state.to(dtype)
        return Output(hidden_BTD, self.unembed(hidden_BTD) if logits else None)

    def new_cache(self, batch: int, capacity: int) -> Any:
        raise UserError(
            f"{self.config.theirs.model_type} runs through transformers and is not sampled by this engine; `eval`, "
            "`ask`, `reject` and `distill` sample it, vLLM serves it."
        )

    def save_weights(self, folder: Path, max_shard_bytes: float, dtype: torch.dtype | None) -> None:
        """Weights and config.json as transformers writes them. `dtype` None keeps the weights' own."""
        theirs = self.hf if dtype is None else copy.deepcopy(self.hf).to(dtype)
        theirs.save_pretrained(folder, max_shard_size=int(max_shard_bytes))


def knows(model_type: str) -> bool:
    """Whether transformers is here and has this architecture."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return False
    return model_type in CONFIG_MAPPING


def load(folder: Path, *, dtype: torch.dtype, device: str | torch.device | None) -> AnyModel:
    """The model in a folder. Raises UserError for missing, damaged or NaN weights, and a head that is no product."""
    from transformers import AutoModelForCausalLM

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0]}).") from None
    theirs, said = found
    if missing := sorted(said["missing_keys"]):
        raise UserError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more; copy the checkpoint again.")
    for name, tensor in theirs.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder}: {name} holds NaN or infinite values; this checkpoint is broken.")
    model = AnyModel(theirs.to(device or "cpu"))
    _check_head(model, folder)
    return model


@torch.no_grad()
def _check_head(model: AnyModel, folder: Path) -> None:
    """Four tokens, twice: their logits and ours."""
    tokens_BT = torch.arange(4, device=model.head_weight.device)[None] % model.config.vocab_size
    model.hf.eval()
    theirs = model.hf(input_ids=tokens_BT, use_cache=False).logits.float()
    ours = model.unembed(model.hf.get_decoder()(input_ids=tokens_BT, use_cache=False).last_hidden_state)
    model.hf.train()
    if not torch.allclose(theirs, ours, rtol=1e-2, atol=1e-3 * float(theirs.abs().max())):
        raise UserError(
            f"{folder}: logits of {model.config.theirs.model_type} are more than one product with its head (a softcap, "
            "scale or bias), which the losses here do not follow; train it with other software."
        )
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()):
        model.hf.eval()  # a run must repeat: no dropout
