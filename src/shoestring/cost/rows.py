"""A published run, or a row of a user's table in the same format, as something that can be predicted.

Empty cells are inferred by rules that hold for every row, and every inference is listed in `guesses`. What a row
says in `notes` is read for these facts only: the latent sizes of MLA, MTP modules, attention windows, whether
activations were recomputed, the micro-batch, the ZeRO stage, and whether its hours are a measured rate times tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoestring.core.errors import UserError
from shoestring.cost.chips import Cluster, find_chip
from shoestring.cost.layout import parse_published
from shoestring.cost.shape import ModelShape
from shoestring.cost.tables import number

FLASH_YEAR = 2022.4  # arXiv 2205.14135; fused attention is assumed in runs from then on
PAPER_LAG = 0.5  # years from a run to its paper: an estimate
DAYS_GUESS = 33.0  # median length of a run (Epoch AI, arXiv 2405.21015)
NEEDED = ("id", "chip")


@dataclass(frozen=True, slots=True)
class Run:
    """What is needed to predict a row. `truth` is None in a table of plans."""

    id: str
    shape: ModelShape
    cluster: Cluster
    seq_len: int
    global_batch: float
    fixed: dict[str, Any]  # what is known of the layout
    flash: bool
    tokens: float | None
    quantity: str
    truth: float | None
    hardware_flops: bool  # tflops_chip counts recomputation
    steady: bool  # a throughput measurement rather than a whole run
    metered: bool  # hours as spent; False where they are a measured rate times tokens, so without restarts
    documented: bool  # the fabric between the chips is stated
    moe: bool
    half: bool  # FP16, so with loss scaling
    model: str
    guesses: tuple[str, ...]

    @property
    def layout_known(self) -> bool:
        """Whether the row fixes how the work is spread: dp with tp or pp, or a sharding mode."""
        return "zero" in self.fixed or {"tp", "pp"} <= set(self.fixed)


def _cell(row: Mapping[str, str], column: str) -> str:
    return (row.get(column) or "").strip()


def _whole(row: Mapping[str, str], column: str) -> int:
    value = number(dict(row), column)
    if value is not None and value < 0:
        raise UserError(f'row "{row.get("id", "?")}": {column} is {value:g}; it cannot be negative.')
    if value is not None and value != int(value):
        raise UserError(f'row "{row.get("id", "?")}": {column} is {value:g}; it must be a whole number.')
    return int(value or 0)


def read_run(row: Mapping[str, str]) -> Run:
    """A row of the table. Raises UserError when it lacks what nothing can stand in for."""
    for column in NEEDED:
        if not _cell(row, column):
            raise UserError(f'row "{row.get("id", "?")}": the cell {column} is empty, and nothing can stand in for it.')
    guesses: list[str] = []
    shape = row_shape(row, guesses)
    quantity, truth = _quantity(row)
    seq_len = _whole(row, "seq_len")
    if not seq_len:
        seq_len = 65536 if _cell(row, "stage") == "context" else 4096
        guesses.append("seq_len")
    tokens = number(dict(row), "tokens")
    if quantity == "gpu_hours" and tokens is None:
        raise UserError(f'row "{row["id"]}": tokens is empty, so its hours cannot be predicted.')
    cluster = _cluster(row, shape, seq_len, tokens, guesses)
    batch = float(_whole(row, "global_batch"))
    if not batch:
        batch = guess_batch(shape, seq_len, cluster.n, tokens or 1e12)
        guesses.append("global_batch")
    year = _year(_cell(row, "source"))
    notes = _cell(row, "notes").lower()
    fixed = parse_published(_cell(row, "parallelism")) | _recompute(notes) | _stated(notes)
    fixed["precision"] = _precision(row, cluster, guesses)
    if "zero" not in fixed and "pp" not in fixed:
        guesses.append("parallelism")
    elif shape.n_routed:
        fixed.setdefault("ep", 1)
    return Run(
        id=row["id"], shape=shape, cluster=cluster, seq_len=seq_len, global_batch=batch,
        fixed=_consistent(fixed, cluster.n, guesses),
        flash=year is None or year - PAPER_LAG >= FLASH_YEAR,
        tokens=tokens,
        quantity=quantity, truth=truth, hardware_flops=_counts_recomputation(notes),
        steady=_cell(row, "kind") == "throughput" or quantity != "gpu_hours",
        metered=quantity == "gpu_hours" and not _rate_times_tokens(notes),
        documented=bool(_cell(row, "interconnect")), moe=bool(shape.n_routed),
        half="fp16" in _cell(row, "precision").lower(), model=_cell(row, "model"),
        guesses=tuple(guesses),
    )  # fmt: skip


def _quantity(row: Mapping[str, str]) -> tuple[str, float | None]:
    """What the row measures: hours of a whole run, else the rate it states."""
    order = ("step_s", "tok_s_chip", "tflops_chip", "gpu_hours")
    if _cell(row, "kind") != "throughput":
        order = ("gpu_hours", "step_s", "tok_s_chip", "tflops_chip")
    for name in order:
        value = number(dict(row), name)
        if value is not None:
            if value <= 0:
                raise UserError(f'row "{row["id"]}": {name} is {value:g}; it must be positive.')
            return name, value
    return "gpu_hours", None


def _year(source: str) -> float | None:
    """Year and month of the first arXiv number in the source."""
    found = re.search(r"\b(\d\d)(\d\d)\.\d{4,5}", source)
    return 2000 + int(found.group(1)) + (int(found.group(2)) - 0.5) / 12 if found else None


def _recompute(notes: str) -> dict[str, str]:
    if re.search(r"no (activation )?(checkpointing|recomputation)", notes):
        return {"recompute": "none"}
    if re.search(r"full (activation )?(checkpointing|recomputation)", notes):
        return {"recompute": "full"}
    if re.search(r"selective (activation )?(checkpointing|recomputation)", notes):
        return {"recompute": "selective"}
    return {}


def _stated(notes: str) -> dict[str, int]:
    """Micro-batch and ZeRO stage, where the notes name them."""
    found = (("micro_batch", r"micro-batch (\d+)"), ("zero", r"zero stage ([0-3])"))
    return {key: int(hit.group(1)) for key, pattern in found if (hit := re.search(pattern, notes))}


def _rate_times_tokens(notes: str) -> bool:
    """Hours computed from a measured rate or from logged step times: restarts and evaluation are not in them."""
    return bool(re.search(r"per trillion tokens|not (a )?bill(ed|ing)|iteration time|evaluation excluded"
                          r"|equals [\d.]+t / [\d,]+ tok/s", notes))  # fmt: skip


def _counts_recomputation(notes: str) -> bool:
    return bool(re.search(r"hardware flops|counts? (one |full |activation )*(activation )?recomputation", notes))


def _precision(row: Mapping[str, str], cluster: Cluster, guesses: list[str]) -> str:
    text = _cell(row, "precision").lower()
    if not text:
        guesses.append("precision")
    if "fp8" in text and cluster.chip.has_fp8:
        return "fp8"
    return "bf16"


def _consistent(fixed: dict[str, Any], n: int, guesses: list[str]) -> dict[str, Any]:
    """Degrees that multiply to more or less than the chips give way: dp first (clusters grow during a run)."""
    product = 1
    for key in ("tp", "pp", "cp"):
        product *= fixed.get(key, 1)
    if "dp" in fixed and ("tp" in fixed or "pp" in fixed) and fixed["dp"] * product != n:
        guesses.append("parallelism: dp from the number of chips")
        fixed = {k: v for k, v in fixed.items() if k != "dp"}
    return fixed


def guess_batch(shape: ModelShape, seq_len: int, chips: int, tokens: float) -> float:
    """Sequences a step: 0.292 C^0.3271 tokens for C FLOPs (arXiv 2401.02954 section 3.1), rounded to suit the chips."""
    flops = shape.flops_per_token(seq_len) * tokens
    wanted = min(64e6, max(0.25e6, 0.2920 * flops**0.3271)) / seq_len
    unit = next((u for u in (chips, chips // 8, chips // 64) if 0 < u <= wanted * 1.4), 1)
    return float(max(1, round(wanted / unit)) * unit)


def _cluster(
    row: Mapping[str, str], shape: ModelShape, seq_len: int, tokens: float | None, guesses: list[str]
) -> Cluster:
    chip = find_chip(_cell(row, "chip"))
    n = _whole(row, "n_chips")
    if n:
        return Cluster(chip, n)
    guesses.append("n_chips")
    return Cluster(chip, guess_chips(shape, chip.bf16, seq_len, tokens or 1e12, chip.node_size))


def guess_chips(shape: ModelShape, peak: float, seq_len: int, tokens: float, node: int) -> int:
    """The power of two of chips that ends a run nearest to a month at 40% of the peak."""
    chips = shape.flops_per_token(seq_len) * tokens / (0.4 * peak) / (DAYS_GUESS * 86400)
    size = min(8, node)
    while size < chips / 2**0.5:
        size *= 2
    return int(min(size, 16384))


# ---- shape
def row_shape(row: Mapping[str, str], guesses: list[str]) -> ModelShape:
    """The model of a row; what is not given is chosen so that the stated parameters come out."""
    total = number(dict(row), "total_params")
    active = number(dict(row), "active_params")
    base = _base(row, total, guesses)
    experts = _whole(row, "n_experts")
    options = [ModelShape(**base)] if not experts else _expert_options(row, base, experts, guesses)
    if total is None:
        return options[0]

    def miss(shape: ModelShape) -> float:
        count = shape.params()
        off = abs(count.total - total) / total
        return off + (abs(count.active - active) / active if active and experts else 0.0)

    best = min(options, key=miss)
    spare = total - best.params().total
    if spare > 0.05 * total and active and abs(best.params().active - active) < 0.1 * active:
        guesses.append("lookup tables beside the vocabulary's")
        best = best.with_(extra_tables=int(spare))
        spare = 0.0
    if abs(spare) > 0.1 * total:
        guesses.append(f"total_params: the shape recounts to {best.params().total / 1e9:.3g}B")
    mtp = re.search(r"(\d) MTP module", _cell(row, "notes"))
    best = best.with_(mtp_layers=int(mtp.group(1))) if mtp else best
    windows = re.search(r"windows S=(\d+) on (\d+) of (\d+) layers", _cell(row, "notes"))
    if windows:
        width, part, of = map(int, windows.groups())
        best = best.with_(window=width, window_layers=best.layers * part // max(1, of))
    return best


def _base(row: Mapping[str, str], total: float | None, guesses: list[str]) -> dict[str, Any]:
    vocab = _whole(row, "vocab")
    layers, d = _whole(row, "n_layers"), _whole(row, "d_model")
    if not vocab:
        vocab = 50_000
        guesses.append("vocab")
    if not layers or not d:
        layers, d = _proportions(row, total)
        guesses.append("n_layers and d_model")
    heads = _whole(row, "n_heads") or max(1, d // 128)
    base: dict[str, Any] = {
        "vocab": vocab, "d_model": d, "layers": layers, "heads": heads, "ffn_mats": _whole(row, "ffn_mats") or 3,
        "tied": _cell(row, "tied_emb") in ("1", "true", "yes"), "ffn": _whole(row, "ffn_dim"),
    }  # fmt: skip
    if _cell(row, "attention") == "mla":
        return base | _latent_sizes(_cell(row, "notes"), d, guesses)
    base |= {"kv_heads": _whole(row, "n_kv_heads") or heads, "head_dim": _whole(row, "head_dim") or max(1, d // heads)}
    if not base["ffn"] and not _whole(row, "n_experts"):
        base["ffn"] = _ffn_from_total(base, total)
        guesses.append("ffn_dim")
    return base


def _proportions(row: Mapping[str, str], total: float | None) -> tuple[int, int]:
    """Layers and width of a usual dense model with that many parameters (12 layers-width^2, width 128 a layer)."""
    if not total:
        raise UserError(f'row "{row.get("id", "?")}": give n_layers and d_model, or total_params.')
    layers = max(2, round((total / 12 / 128**2) ** (1 / 3)))
    return layers, max(128, round((total / 12 / layers) ** 0.5 / 128) * 128)


def _ffn_from_total(base: Mapping[str, Any], total: float | None) -> int:
    rest = 0.0
    if total:
        bare = ModelShape(**{**base, "ffn": 1}).params().total
        rest = (total - bare) / (base["layers"] * base["ffn_mats"] * base["d_model"])
    return (
        round(rest) if rest > base["d_model"] / 4 else round(base["d_model"] * (8 / 3 if base["ffn_mats"] == 3 else 4))
    )


def _latent_sizes(notes: str, d: int, guesses: list[str]) -> dict[str, Any]:
    """MLA sizes named in the notes, else those of every released DeepSeek model."""
    sizes = {"q_lora": 1536 if d >= 4096 else 0, "kv_lora": 512, "rope": 64, "nope": 128, "v": 128}
    for name in sizes:
        found = re.search(rf"\b{name} (\d+)", notes)
        if found:
            sizes[name] = int(found.group(1))
    if not re.search(r"kv_lora \d+", notes):
        guesses.append("latent sizes")
    return {"kind": "mla", "q_lora": sizes["q_lora"] or None, "kv_lora": sizes["kv_lora"], "qk_nope": sizes["nope"],
            "qk_rope": sizes["rope"], "v_dim": sizes["v"]}  # fmt: skip


def _expert_options(row: Mapping[str, str], base: dict[str, Any], experts: int, guesses: list[str]) -> list[ModelShape]:
    """Shapes that differ in which layers are dense; the stated parameters choose."""
    width = _whole(row, "moe_dim") or base["ffn"]
    if not _whole(row, "moe_dim"):
        guesses.append("moe_dim")
    base = base | {
        "n_routed": experts, "n_active": _whole(row, "top_k") or 2, "n_shared": _whole(row, "n_shared"),
        "expert_ffn": width, "ffn": base["ffn"] or width, "n_group": 1,
    }  # fmt: skip
    limit = re.search(r"<=?\s*(\d+) (?:of (\d+) )?nodes", _cell(row, "notes"))
    if limit and experts % int(limit.group(2) or 8) == 0:
        base |= {"n_group": int(limit.group(2) or 8), "topk_group": int(limit.group(1))}
    options = [ModelShape(**base, dense_layers=k) for k in range(min(4, base["layers"]))]
    if _whole(row, "ffn_dim"):
        options.append(ModelShape(**base, dense_residual=True))
    return options
