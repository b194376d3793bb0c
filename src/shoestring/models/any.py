"""Any causal language model of `transformers`, as a student or a teacher, behind the interface of our own families.

For architectures that `models/` does not have itself; loading, saving and key names are theirs. Losses see the states
and the head: a scale of the logits (Cohere, Granite) goes onto the states, a softcap (Gemma 2) is told to the losses, a
bias of the head (Phi-2, GPT-J) is one more column of its table that meets a constant at the end of every state, and
anything else between the two is refused.

Sequences packed into a row are told apart by their positions, which begin anew with each: from them transformers makes
the masks of every layer, sliding windows too (a mask of ours would stand in for those). Where that does not keep them
apart (models with a state, with ALiBi) each sequence has a row of its own; which it is, is tried when one is loaded.
There is never dropout: a run must repeat. `trust_remote_code` stays off. Our engine keeps caches of its own and does
not run them: they are sampled by their own `generate` (infer/borrowed.py).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.core.errors import UserError
from shoestring.cost.shape import ModelShape
from shoestring.models._counted import counted_shape
from shoestring.nn.decoder import Output
from shoestring.nn.head_rows import bend_
from shoestring.nn.kernels import FP32, Kernels

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # what configs call it
MODEL_TYPES = ()  # whatever no other family claims, when transformers knows it


class AnyConfig:
    """Their config object, with the names that ours have."""

    def __init__(self, theirs: Any, shape: ModelShape) -> None:
        self.theirs, self._shape = theirs, shape
        text = theirs.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.hidden_size: int = text.hidden_size
        self.num_hidden_layers: int = text.num_hidden_layers
        self.max_position_embeddings: int = getattr(text, "max_position_embeddings", 1 << 20)
        self.tie_word_embeddings: bool = bool(getattr(theirs, "tie_word_embeddings", False))
        self.eos_token_id = text.eos_token_id
        self.softcap = float(next(filter(None, (getattr(text, name, None) for name in SOFTCAPS)), 0.0))

    def shape(self) -> ModelShape:
        return self._shape

    def to_hf(self) -> dict[str, Any]:
        raw: dict[str, Any] = self.theirs.to_dict()
        return raw


class AnyModel(nn.Module):
    """A `transformers` model. Weights stay as loaded; with `kernels.dtype` bfloat16 products run under autocast."""

    n_experts = 0

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        if getattr(theirs.config, "rescale_every", 0):  # RWKV's help for fp16: in evaluation it divides its own weights
            theirs.config.rescale_every = 0
        self.hf = theirs
        self.config = AnyConfig(theirs.config, counted_shape(theirs))
        self.kernels: Kernels = FP32
        self.scale = 1.0  # of the logits, beyond the product with the head
        self.packs = True  # whether it keeps the sequences of a row apart by their positions
        self.hf.eval()

    def train(self, mode: bool = True) -> AnyModel:
        """The mode, but their modules stay without dropout."""
        super().train(mode)
        self.hf.eval()
        return self

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
        """[V, D]; [V, D + 1] where the head has a bias, that in the last column. Gradients reach both."""
        head = self.hf.get_output_embeddings()
        weight: Tensor = head.weight
        bias = getattr(head, "bias", None)
        return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)

    @property
    def constant(self) -> float:
        """What ends every state so that a bias in the head's last column is added; 0 where there is none."""
        return 0.0 if getattr(self.hf.get_output_embeddings(), "bias", None) is None else self.scale

    @property
    def softcap(self) -> float:
        """The c of logits c tanh(U h / c); 0 where they are U h."""
        return self.config.softcap

    @property
    def embedding(self) -> Tensor:
        """[V, D] of the input."""
        weight: Tensor = self.hf.get_input_embeddings().weight
        return weight

    def unembed(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.head_weight.to(hidden.dtype)).float()
        return bend_(logits, self.softcap) if self.softcap else logits

    def forward(
        self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, segments_BT: Tensor | None = None,
        cache: Any = None, logits: bool = True, mtp: bool = False, balance: bool = False, routing: Any = None,
    ) -> Output:  # fmt: skip
        """One pass over tokens [B, T]. With `segments_BT` attention and states stay inside runs of equal ids, each of
        which begins at position 0."""
        if cache is not None or mtp or routing is not None:
            raise ValueError("a model of transformers has no cache, MTP or routing of ours")
        dtype = self.kernels.torch_dtype
        with torch.autocast(tokens_BT.device.type, dtype, enabled=dtype != torch.float32):
            if segments_BT is None:
                last_BTD = self._last(tokens_BT, positions_BT)
            elif self.packs:
                last_BTD = self._last(tokens_BT, _places(segments_BT))
            else:
                last_BTD = self._alone(tokens_BT, segments_BT)
        hidden_BTD = last_BTD.to(dtype) if self.scale == 1.0 else last_BTD.to(dtype) * self.scale
        if constant := self.constant:
            hidden_BTD = F.pad(hidden_BTD, (0, 1), value=constant)
        return Output(hidden_BTD, self.unembed(hidden_BTD) if logits else None)

    def _last(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        """What is before the head [B, T, D], unscaled."""
        given = {} if positions_BT is None else {"position_ids": positions_BT}
        found: Tensor = self.hf.get_decoder()(input_ids=tokens_BT, use_cache=False, **given).last_hidden_state
        return found

    def _alone(self, tokens_BT: Tensor, segments_BT: Tensor) -> Tensor:
        """The same with every sequence in a row of its own, what fills the rows up behind it; zero where no sequence is
        (negative segments)."""
        place_BT = _places(segments_BT)
        keep_N = (segments_BT >= 0).flatten()
        number_N = ((place_BT == 0) & (segments_BT >= 0)).flatten().cumsum(0)[keep_N] - 1
        place_N = place_BT.flatten()[keep_N]
        rows_ST = tokens_BT.new_zeros(int(number_N[-1]) + 1, int(place_N.max()) + 1)
        rows_ST[number_N, place_N] = tokens_BT.flatten()[keep_N]
        last_ND = self._last(rows_ST, None)[number_N, place_N]
        whole_ND = last_ND.new_zeros(len(keep_N), last_ND.shape[1])
        whole_ND[keep_N] = last_ND
        return whole_ND.unflatten(0, tokens_BT.shape)

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
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{folder} lacks {missing[0]}{more}; copy the checkpoint again.")
    for name, tensor in theirs.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder}: {name} holds NaN or infinite values; this checkpoint is broken.")
    model = AnyModel(theirs.to(device or "cpu"))
    _check_head(model, folder)
    model.packs = _packs(model)
    return model


def _places(segments_BT: Tensor) -> Tensor:
    """The place of each token in its segment: [0, 1, 2, 0, 1] of [5, 5, 5, 6, 6]."""
    at_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return at_T - torch.where(begins_BT, at_T, 0).cummax(dim=1).values


@torch.no_grad()
def _check_head(model: AnyModel, folder: Path) -> None:
    """Four tokens, twice: their logits and ours, which may differ by a factor. Raises UserError where they differ by
    more, or cannot be had."""
    tokens_BT = torch.arange(4, device=model.embedding.device)[None] % model.config.vocab_size
    try:
        theirs = model.hf(input_ids=tokens_BT, use_cache=False).logits.double()
    except (ValueError, RuntimeError, AttributeError, TypeError, IndexError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{folder}: transformers loads this model and cannot run it ({reason}).") from None
    ours = model.unembed(model(tokens_BT, logits=False).hidden_BTD).double()
    scale = float((theirs * ours).sum() / ours.square().sum().clamp_min(1e-300))
    near = 1e-5 if model.embedding.dtype == torch.float32 else 1e-2
    if abs(scale - 1) > near and not model.softcap:
        model.scale = scale
    if not torch.allclose(theirs, model.scale * ours, rtol=near, atol=near * float(theirs.abs().max())):
        raise UserError(
            f"{folder}: logits of {model.config.theirs.model_type} are more than a product with its head and "
            "its bias, which the losses here do not follow; train it with other software."
        )


@torch.no_grad()
def _packs(model: AnyModel) -> bool:
    """Whether the second of two sequences in a row is what it is alone."""
    tokens_BT = torch.arange(9, device=model.embedding.device)[None] % model.config.vocab_size
    segments_BT = torch.tensor([[0] * 5 + [1] * 4], device=tokens_BT.device)
    packed = model(tokens_BT, segments_BT=segments_BT, logits=False).hidden_BTD[:, 5:].float()
    alone = model(tokens_BT[:, 5:], logits=False).hidden_BTD.float()
    near = 1e-4 if model.embedding.dtype == torch.float32 else 2e-2
    return float((packed - alone).abs().max()) <= near * float(alone.abs().max())
