"""What is left of a shape that is pruned, and which sizes can be: asked by the dry run of `prune` and by its run."""

from __future__ import annotations

from dataclasses import replace

from shoestring.core.errors import UserError
from shoestring.cost.shape import ModelShape


def check_kept(
    shape: ModelShape, *, layers: int | None = None, hidden: int | None = None, ffn: int | None = None,
    experts: int | None = None, heads: int | None = None,
) -> None:  # fmt: skip
    """Raises UserError for a number to keep that is no size of this model, or that its routing cannot serve. None keeps
    all."""
    for name, wanted, there in (
        ("layers", layers, shape.layers), ("hidden", hidden, shape.d_model), ("ffn", ffn, shape.ffn),
        ("experts", experts, shape.n_routed), ("heads", heads, shape.heads),
    ):  # fmt: skip
        if wanted is not None and not 1 <= wanted <= there:
            raise UserError(f"{name} is {wanted}; this model has {there}.")
    if experts is not None:
        _check_experts(shape, experts)
    if heads is not None and shape.kind == "gqa":
        groups, each = shape.kv_heads, shape.heads // shape.kv_heads
        if heads % groups and heads % each:
            raise UserError(
                f"{heads} heads neither divide into the {groups} groups of this model nor are whole groups of {each}; "
                f"keep a multiple of {groups} or of {each}."
            )
    if ffn is not None and shape.moe_layers == shape.layers:
        raise UserError("this model has no dense feed-forward layer; leave ffn out.")


def _check_experts(shape: ModelShape, experts: int) -> None:
    groups, met = shape.n_group, shape.topk_group
    if experts % groups:
        near = max(groups, experts // groups * groups)
        raise UserError(
            f"{experts} experts do not divide into the {groups} groups of this model; keep {near}, or another multiple "
            f"of {groups}."
        )
    if shape.n_active > experts // groups * met:
        least = -(-shape.n_active // met) * groups
        raise UserError(
            f"{experts} experts are too few for {shape.n_active} a token out of {met} of {groups} groups; keep at "
            f"least {least}."
        )


def pruned(
    shape: ModelShape, *, layers: int | None = None, hidden: int | None = None, ffn: int | None = None,
    experts: int | None = None, heads: int | None = None,
) -> ModelShape:  # fmt: skip
    """What is left (of layers without experts the first are taken to stay). Raises UserError as `check_kept`."""
    check_kept(shape, layers=layers, hidden=hidden, ffn=ffn, experts=experts, heads=heads)
    kept, asking, kv_heads = layers or shape.layers, heads or shape.heads, shape.kv_heads
    if shape.kind == "gqa" and asking % kv_heads:  # whole groups go
        kv_heads = asking * kv_heads // shape.heads
    return replace(
        shape, layers=kept, heads=asking, kv_heads=kv_heads, d_model=hidden or shape.d_model, ffn=ffn or shape.ffn,
        n_routed=experts or shape.n_routed, dense_layers=min(shape.dense_layers, kept), mtp_layers=0,
        head_dim=shape.head_dim or (shape.d_model // shape.heads if shape.kind == "gqa" else 0),
    )  # fmt: skip
