"""Chunks of rows against the vocabulary's table: their logits, softmax and entropy, and the gradients through them.

What the sums of `head.py` and the divergences of `losses/_fused.py` are made of. `Rows` is the plain twin; `NativeRows`
reads each row in C (nn/csrc/elements.c), `BentRows` puts a softcap between products and softmax; for large tables there
is `slices.SlicedRows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.nn import elements, multiply
from shoestring.nn.room import Room, cast, empty

CHUNK_ELEMENTS = 1 << 21  # logits alive at a time: 8 MB in fp32, about what a core's caches hold
MIN_ROWS = 128  # fewer, and the pass over the gradient of a wide table costs more than the products (LOG.md, entry 9)
PACKED = 8192  # rows of a table up to which our own products pack it anew for each chunk
SLICE_ELEMENTS = 1 << 19  # of the table's gradient that are multiplied and added at a time


def chunk_rows(hidden_ND: Tensor, vocab: int, native: bool) -> int:
    """Twice as many where no fp32 lies beside logits of two bytes: less memory still, and faster products."""
    rows = max(MIN_ROWS, CHUNK_ELEMENTS // vocab)
    return 2 * rows if elements.usable(native, hidden_ND) and hidden_ND.element_size() == 2 else rows


def _multiplied(native: bool, hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether products with the table are nn/multiply.py's."""
    return len(weight_VD) <= PACKED and multiply.usable(native, hidden_ND, (weight_VD,))


def accurate(dtype: torch.dtype) -> torch.dtype:
    """What is computed of products of this dtype: fp32, or fp64 if they are."""
    return torch.promote_types(dtype, torch.float32)


def add_outer(
    grad_VD: Tensor, dz_nV: Tensor, hidden_nD: Tensor, *, first: bool = False, native: bool = False
) -> None:  # fmt: skip
    """Add dzᵀ h; on a CPU some rows of the table at a time, whose product is in cache still when it is added.

    `first`: write it, whatever was there. `native`: the sum without a copy of the product in the table's dtype.
    """
    if grad_VD.dtype == torch.float32 and _multiplied(native, hidden_nD, grad_VD):
        return multiply.gradients(dz_nV, hidden_nD, (grad_VD,), add=not first)
    step = max(1024, SLICE_ELEMENTS // hidden_nD.shape[1]) if grad_VD.device.type == "cpu" else len(grad_VD)
    for part_vD, dz_nv in zip(grad_VD.split(step), dz_nV.split(step, dim=1), strict=True):
        product_vD = dz_nv.t() @ hidden_nD
        if native and part_vD.dtype == torch.float32:
            if first:
                part_vD.zero_()
            elements.call("add_to", product_vD.dtype, product_vD, product_vD.numel(), part_vD)
        elif first:
            part_vD.copy_(product_vD)
        else:
            part_vD.add_(product_vD)


def bend_(z_nV: Tensor, softcap: float, temperature: float = 1.0, slope_nV: Tensor | None = None) -> Tensor:
    """In place the logits that a softcap makes of products z: c tanh(z / c), at the temperature.

    `slope_nV` receives the derivative of c tanh(z / c). Source: Gemma 2 (arXiv 2408.00118) section 2.
    """
    z_nV.div_(softcap).tanh_()
    if slope_nV is not None:
        torch.square(z_nV, out=slope_nV).neg_().add_(1)
    return z_nV.mul_(softcap / temperature)


def unwritten(weight_VD: Tensor, hidden_ND: Tensor, room: Room | None) -> Tensor:
    """The table's gradient before the first chunk is written to it; zero when there will be none."""
    return empty(room, weight_VD) if len(hidden_ND) else torch.zeros_like(weight_VD)


def scaled(gradient: Tensor | None, grad: Tensor) -> Tensor | None:
    """The gradient made in the forward pass times the one that arrives: the same tensor, no copy, where that is 1."""
    if gradient is None or (grad.device.type == "cpu" and grad == 1):
        return gradient
    return gradient * grad.to(gradient.dtype)


class Rows:
    """Chunks of rows against the table [V, D], in memory that every chunk uses again."""

    native = False

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float, chunk: int, room: Room | None
    ):  # fmt: skip
        self.hidden_ND, self.ids_N1, self.temperature = hidden_ND, ids_N[:, None], temperature
        self.table_VD = cast(room, weight_VD, hidden_ND.dtype)
        chunk = min(chunk, len(hidden_ND))
        self.wide_nV = empty(room, hidden_ND, (chunk, len(weight_VD)), accurate(hidden_ND.dtype))
        same = self.wide_nV.dtype == hidden_ND.dtype
        self.narrow_nV = self.wide_nV if same else empty(room, hidden_ND, (chunk, len(weight_VD)))
        self.slices = [slice(start, start + chunk) for start in range(0, len(hidden_ND), chunk)] if chunk else []

    def into(self, grad_VD: Tensor | None) -> None:
        """Say where the table's gradient will be written; before that, anything may stand there."""

    def product(self, rows: slice) -> Tensor:
        """The chunk times the table, in the accurate dtype."""
        hidden_nD = self.hidden_ND[rows]
        narrow_nV, wide_nV = self.narrow_nV[: len(hidden_nD)], self.wide_nV[: len(hidden_nD)]
        torch.mm(hidden_nD, self.table_VD.t(), out=narrow_nV)
        if self.narrow_nV is not self.wide_nV:
            wide_nV.copy_(narrow_nV)
        return wide_nV

    def logits(self, rows: slice) -> Tensor:
        """The same at the temperature."""
        wide_nV = self.product(rows)
        return wide_nV if self.temperature == 1.0 else wide_nV.div_(self.temperature)

    def slopes(self, rows: slice) -> tuple[Tensor, Tensor]:
        """((softmax - onehot) in the dtype of products, logprobs of the ids)."""
        p_nV, logp_n = self.softmax(rows)
        return self.slope(p_nV, logp_n, rows), logp_n

    def logprobs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Logprobs of the ids, and the entropy."""
        logp_nV = torch.log_softmax(self.logits(rows), dim=-1)
        logp_n = logp_nV.gather(1, self.ids_N1[rows]).squeeze(1)
        p_nV = torch.exp(logp_nV, out=self.wide_nV[: len(logp_nV)])
        return logp_n, -p_nV.mul_(logp_nV).sum(-1)

    def slopes_and_entropy(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Both, and the entropy."""
        p_nV, logp_n = self.softmax(rows)
        entropy_n = torch.special.entr(p_nV).sum(-1)
        return self.slope(p_nV, logp_n, rows), logp_n, entropy_n

    def softmax(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(probabilities, logprobs of the ids). Every pass over the vocabulary but one reads only: from the largest
        logit x and its probability p, log Σ exp = x - log p, exactly enough because p >= 1/V."""
        wide_nV = self.logits(rows)
        target_n, top_n = wide_nV.gather(1, self.ids_N1[rows]).squeeze(1), wide_nV.amax(-1)
        torch.softmax(wide_nV, dim=-1, out=wide_nV)
        return wide_nV, target_n - (top_n - wide_nV.amax(-1).log_())

    def slope(self, p_nV: Tensor, logp_n: Tensor, rows: slice) -> Tensor:
        """(softmax - onehot), over p, in the dtype of products; p - 1 of a likely target keeps its digits."""
        p_nV.scatter_(1, self.ids_N1[rows], logp_n.expm1()[:, None])
        return p_nV if self.narrow_nV is self.wide_nV else self.narrow_nV[: len(p_nV)].copy_(p_nV)

    def back(self, slope_nV: Tensor, out_nD: Tensor) -> Tensor:
        """Slopes times the table."""
        return torch.mm(slope_nV, self.table_VD, out=out_nD)

    def add_gradients(
        self, slope_nV: Tensor, factor_n: Tensor, rows: slice, grad_ND: Tensor | None, grad_VD: Tensor | None
    ) -> None:
        """Gradients of Σ factor · logit where dlogit = slope. The factor goes onto the D side, the narrow one."""
        factor_n1 = factor_n[:, None]
        if grad_ND is not None:
            self.back(slope_nV, grad_ND[rows]).mul_(factor_n1)
        if grad_VD is not None:
            scaled_nD = (self.hidden_ND[rows] * factor_n1).to(slope_nV.dtype)
            add_outer(grad_VD, slope_nV, scaled_nD, first=rows.start == 0, native=self.native)


class NativeRows(Rows):
    """The same in C: a row's logits are read once, and its slope written over them; no fp32 copy of the chunk."""

    native = True

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float, chunk: int, room: Room | None
    ):  # fmt: skip
        self.hidden_ND, self.ids_N, self.temperature = hidden_ND, ids_N.contiguous(), temperature
        N = len(hidden_ND)
        count = -(-N // chunk)
        self.slices = [slice(N * i // count, N * (i + 1) // count) for i in range(count)]  # even: none of a few rows
        self.multiplied = chunk >= 16 and _multiplied(True, hidden_ND, weight_VD)
        self.table_VD = weight_VD.contiguous() if self.multiplied else cast(room, weight_VD, hidden_ND.dtype)
        self.narrow_nV = empty(room, hidden_ND, (-(-N // count) if count else 0, len(weight_VD)))

    def _read(self, rows: slice, entropy_n: Tensor | None, slope: bool) -> tuple[Tensor, Tensor]:
        hidden_nD = self.hidden_ND[rows]
        (n, V), narrow_nV = (len(hidden_nD), self.narrow_nV.shape[1]), self.narrow_nV[: len(hidden_nD)]
        if self.multiplied:
            multiply.forward(hidden_nD, (self.table_VD,), narrow_nV)
        else:
            torch.mm(hidden_nD, self.table_VD.t(), out=narrow_nV)
        logp_n = torch.empty(n)
        elements.call(
            "vocabulary", narrow_nV.dtype, narrow_nV, self.ids_N[rows], self.temperature, n, V, logp_n, entropy_n, slope
        )  # fmt: skip
        return narrow_nV, logp_n

    def back(self, slope_nV: Tensor, out_nD: Tensor) -> Tensor:
        if self.multiplied:
            return multiply.inputs(slope_nV, (self.table_VD,), out_nD)
        return super().back(slope_nV, out_nD)

    def slopes(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self._read(rows, None, True)

    def logprobs(self, rows: slice) -> tuple[Tensor, Tensor]:
        entropy_n = torch.empty(len(self.hidden_ND[rows]))
        return self._read(rows, entropy_n, False)[1], entropy_n

    def slopes_and_entropy(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        entropy_n = torch.empty(len(self.hidden_ND[rows]))
        return *self._read(rows, entropy_n, True), entropy_n


class BentRows(Rows):
    """The same behind a softcap."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float, chunk: int, room: Room | None,
        softcap: float,
    ):  # fmt: skip
        super().__init__(hidden_ND, weight_VD, ids_N, temperature, chunk, room)
        self.softcap = softcap
        self.bend_nV = empty(room, self.wide_nV, self.wide_nV.shape)  # what the softcap makes of a slope

    def logits(self, rows: slice) -> Tensor:
        wide_nV = self.product(rows)
        return bend_(wide_nV, self.softcap, self.temperature, self.bend_nV[: len(wide_nV)])

    def slope(self, p_nV: Tensor, logp_n: Tensor, rows: slice) -> Tensor:
        return super().slope(p_nV, logp_n, rows).mul_(self.bend_nV[: len(p_nV)])
