"""Model shapes by name, from data/models.json, a config.json, a folder, or a recipe's resolved config."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from shoestring.core.errors import UserError, did_you_mean
from shoestring.cost.hf import load_config, shape_from_hf
from shoestring.cost.shape import ModelShape
from shoestring.cost.tables import shipped_json


@cache
def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower().rsplit("/", 1)[-1])


def model_names() -> list[str]:
    """Names that `resolve_shape` knows."""
    return sorted(shipped_json("models"))


@cache
def named_shape(name: str) -> ModelShape:
    """A shape shipped by name; 'deepseek-ai/DeepSeek-V3' and 'DeepSeek V3' work too."""
    models = shipped_json("models")
    aliases = {_key(alias): entry for entry, config in models.items() for alias in (entry, *config.get("aliases", ()))}
    if _key(name) not in aliases:
        raise UserError(f'unknown model "{name}".{did_you_mean(name.lower(), models)} A config.json works too.')
    entry = aliases[_key(name)]
    return shape_from_hf({k: v for k, v in models[entry].items() if k != "aliases"}, entry)


def resolve_shape(name: str) -> ModelShape:
    """A name, a config.json, or a folder with one."""
    path = Path(name)
    if name.endswith(".json") or path.is_dir() or (len(path.parts) > 2 and path.exists()):
        return load_config(path)
    return named_shape(name)
