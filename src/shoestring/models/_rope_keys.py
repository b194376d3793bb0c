"""RoPE settings in Hugging Face's config.json, old form and new.

Old: `rope_theta` beside `rope_scaling` (whose type is called `type` or `rope_type`). New (transformers 5): one dict
`rope_parameters` with all of it. Both are read; the new form is written, with the old keys beside it for older
readers.
"""

from __future__ import annotations

from typing import Any

from shoestring.core.errors import UserError
from shoestring.nn.rope import RopeScaling


def read_rope(raw: dict[str, Any], default_theta: float = 10000.0) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling of a config.json."""
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(found := raw.get(key) or {}, dict):
            raise UserError(f"config.json: {key} is {found!r}; it must be an object of settings.")
        settings |= found
    theta = settings.pop("rope_theta", None) or raw.get("rope_theta") or default_theta
    if not isinstance(theta, int | float):
        raise UserError(f"config.json: rope_theta is {theta!r}; it must be a number.")
    theta = float(theta)
    kind = settings.pop("rope_type", None) or settings.get("type") or "default"
    settings.pop("type", None)
    if kind == "default":
        return theta, None
    if kind not in ("yarn", "llama3"):
        raise UserError(f'rope scaling of type "{kind}" is not supported; known: default, yarn, llama3.')
    settings.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    known = {name: value for name, value in settings.items() if name in RopeScaling.model_fields and value is not None}
    return theta, RopeScaling.from_dict({**known, "rope_type": kind}, where="config.json, rope scaling")


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys of config.json for these settings."""
    if scaling is None:
        return {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    settings = scaling.model_dump(exclude_none=True)
    if scaling.rope_type == "yarn":
        settings = {name: v for name, v in settings.items() if name not in ("low_freq_factor", "high_freq_factor")}
    else:
        keep = ("rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        settings = {name: settings[name] for name in keep}
    return {
        "rope_theta": theta,
        "rope_scaling": settings | {"type": scaling.rope_type},
        "rope_parameters": settings | {"rope_theta": theta},
    }
