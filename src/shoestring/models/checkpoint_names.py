"""Which tensor on disk is which part of our state: Hugging Face's names, as DeepSeek's own files have them.

Names are the same but for two things. Routed experts are stacked here ([E, 2F, D] and [E, D, F]) and stored one by
one: `mlp.experts.{e}.{gate,up,down}_proj.weight`. MTP module k lives at layer index L + k, and carries copies of the
embedding and the head (`embed_tokens`, `shared_head.head`), which are written for others and not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from shoestring.nn.decoder import Decoder

_MTP_BLOCK = re.compile(r"mtp\.(\d+)\.(?:block\.)?(.+)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def _disk_name(ours: str, n_layers: int) -> str:
    match = _MTP_BLOCK.fullmatch(ours)
    return ours if match is None else f"model.layers.{n_layers + int(match[1])}.{match[2]}"


def _unstacked(name: str, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
    prefix = name.rsplit(".", 1)[0]
    for e, expert in enumerate(stack):
        if name.endswith("gate_up_proj"):
            gate, up = expert.chunk(2)
            yield f"{prefix}.{e}.gate_proj.weight", gate
            yield f"{prefix}.{e}.up_proj.weight", up
        else:
            yield f"{prefix}.{e}.down_proj.weight", expert


def disk_tensors(model: Decoder) -> dict[str, Tensor]:
    """Every tensor of the model under its name on disk, as views: writing to one changes the model."""
    n_layers = model.config.num_hidden_layers
    found: dict[str, Tensor] = {}
    for ours, tensor in model.state_dict().items():
        name = _disk_name(ours, n_layers)
        if name.endswith(_STACKED):
            found.update(_unstacked(name, tensor))
        else:
            found[name] = tensor
    return found


def mtp_copies(model: Decoder) -> dict[str, Tensor]:
    """The copies of embedding and head that stand beside each MTP module on disk."""
    first = model.config.num_hidden_layers
    found = {}
    for k in range(getattr(model.config, "num_nextn_predict_layers", 0)):
        found[f"model.layers.{first + k}.embed_tokens.weight"] = model.embedding
        found[f"model.layers.{first + k}.shared_head.head.weight"] = model.head_weight
    return found


def is_needless(name: str, tied: bool, n_layers: int) -> bool:
    """On disk, yet no part of our state: MTP's copies, fp8 scales (read with their weight), old RoPE buffers."""
    if name.endswith(("_scale_inv", "rotary_emb.inv_freq")) or (tied and name == "lm_head.weight"):
        return True
    layer = _LAYER.match(name)
    beyond = layer is not None and int(layer[1]) >= n_layers
    return beyond and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))


def has_mtp(names: list[str], n_layers: int) -> bool:
    """Whether any tensor on disk belongs to a layer beyond the main model's."""
    return any((layer := _LAYER.match(name)) is not None and int(layer[1]) >= n_layers for name in names)
