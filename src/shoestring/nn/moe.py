"""DeepSeekMoE: shared expert plus routed experts (V3 section 2.1.2). Tokens are never dropped.

    s = sigmoid(x W_gᵀ) in fp32;  c = s + b      b: correction bias, moved by load, never by a gradient
    group score = sum of the two best c in each group; the best `topk_group` groups stay, others -inf
    idx = top-K of c;  w = s[idx] / (Σ s[idx] + 1e-20) · routed_scaling_factor
    y = Σ w_k E_k(x) + Shared(x)

V2-style: s = softmax, no bias, group score = the best s, masked groups 0, w = s[idx] · routed_scaling_factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.nn import elements
from shoestring.nn.experts import Experts
from shoestring.nn.kernels import Kernels
from shoestring.nn.linear import SwiGLU


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose experts; the names are those of the checkpoints' config."""

    n_experts: int
    top_k: int
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    n_group: int = 1
    topk_group: int = 1
    normalise: bool = True
    scale: float = 1.0

    def choose(self, score_NE: Tensor, bias_E: Tensor | None) -> Tensor:
        """Expert ids [N, A]. The bias decides who is chosen and nothing else."""
        choice_NE = score_NE if bias_E is None else score_NE + bias_E
        if self.n_group > 1 and self.topk_group < self.n_group:
            choice_NGE = choice_NE.unflatten(-1, (self.n_group, -1))
            best = 2 if self.scoring == "sigmoid" else 1
            group_NG = choice_NGE.topk(min(best, choice_NGE.shape[-1]), dim=-1).values.sum(-1)
            kept_NG = torch.zeros_like(group_NG, dtype=torch.bool)
            kept_NG.scatter_(1, group_NG.topk(self.topk_group, dim=-1).indices, True)
            lost = float("-inf") if self.scoring == "sigmoid" else 0.0
            choice_NE = choice_NGE.masked_fill(~kept_NG.unsqueeze(-1), lost).flatten(-2)
        return choice_NE.topk(self.top_k, dim=-1).indices

    def weigh(self, score_NE: Tensor, chosen_NA: Tensor) -> Tensor:
        weight_NA = score_NE.gather(-1, chosen_NA)
        if self.normalise:
            weight_NA = weight_NA / (weight_NA.sum(-1, keepdim=True) + 1e-20)
        return weight_NA * self.scale


OWN_PRODUCT = 1 << 14  # numbers in the router's weights up to which C multiplies as well: beyond, torch is faster


class _NativeGate(torch.autograd.Function):
    """The gate in C, with tokens read in their own dtype. Equal choices fall to the lower expert."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing, replay_NA: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_ND, w_ED, (N, D) = x_ND.contiguous(), weight_ED.float().contiguous(), x_ND.shape
        E, A, ctx.own = len(w_ED), routing.top_k, w_ED.numel() <= OWN_PRODUCT
        logit_NE = torch.empty(N, E) if ctx.own else F.linear(x_ND.float(), w_ED)
        if ctx.own:
            elements.call("gate_forward", x_ND.dtype, x_ND, w_ED, N, D, E, logit_NE)
        score_NE, weight_NA = torch.empty_like(logit_NE), logit_NE.new_empty(N, A)
        chosen_NA = torch.empty(N, A, dtype=torch.long) if replay_NA is None else replay_NA.contiguous()
        shape = N, E, A, routing.n_group, routing.topk_group
        ctx.how = routing.scoring == "sigmoid", routing.normalise
        elements.call(
            "route_forward", None, logit_NE, bias_E, *shape, *ctx.how, routing.scale, replay_NA is not None,
            score_NE, chosen_NA, weight_NA,
        )  # fmt: skip
        ctx.save_for_backward(x_ND, weight_ED, score_NE, chosen_NA)
        ctx.scale = routing.scale
        ctx.mark_non_differentiable(chosen_NA)
        ctx.set_materialize_grads(False)
        return score_NE, chosen_NA, weight_NA

    @staticmethod
    def backward(ctx: Any, dscore_NE: Tensor | None, _: Any, dweight_NA: Tensor | None) -> tuple[Tensor | None, ...]:
        x_ND, weight_ED, score_NE, chosen_NA = ctx.saved_tensors
        (N, E), A, D = score_NE.shape, chosen_NA.shape[1], x_ND.shape[1]
        dlogit_NE = torch.empty_like(score_NE)
        grads = [None if d is None else d.contiguous() for d in (dweight_NA, dscore_NE)]
        elements.call(
            "route_backward", None, score_NE, chosen_NA, *grads, N, E, A, *ctx.how, ctx.scale, dlogit_NE
        )  # fmt: skip
        w_ED = weight_ED.float().contiguous()
        if not ctx.own:
            dx_ND, dw_ED = (dlogit_NE @ w_ED).to(x_ND.dtype), dlogit_NE.t() @ x_ND.float()
            return dx_ND, dw_ED.to(weight_ED.dtype), None, None, None
        dx_ND, dw_ED = torch.empty_like(x_ND), torch.empty(E, D)
        elements.call("gate_tokens", x_ND.dtype, dlogit_NE, w_ED, N, D, E, dx_ND)
        elements.call("gate_weights", x_ND.dtype, dlogit_NE, x_ND, N, D, E, dw_ED)
        return dx_ND, dw_ED.to(weight_ED.dtype), None, None, None


class Gate(nn.Module):
    """The router. With sigmoid scores it has the buffer `e_score_correction_bias` (fp32)."""

    e_score_correction_bias: Tensor | None

    def __init__(self, d_model: int, routing: Routing, *, device: torch.device | None = None):
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(routing.n_experts, d_model, device=device))
        bias = torch.zeros(routing.n_experts, device=device) if routing.scoring == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_ND: Tensor, replay_NA: Tensor | None, native: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [N, E], chosen ids [N, A], weights [N, A], all in fp32."""
        if elements.usable(native, x_ND):
            made: tuple[Tensor, Tensor, Tensor] = _NativeGate.apply(
                x_ND, self.weight, self.e_score_correction_bias, self.routing, replay_NA
            )
            return made
        logit_NE = F.linear(x_ND.float(), self.weight.float())
        score_NE = logit_NE.sigmoid() if self.routing.scoring == "sigmoid" else logit_NE.softmax(-1)
        with torch.no_grad():
            chosen_NA = self.routing.choose(score_NE, self.e_score_correction_bias) if replay_NA is None else replay_NA
        return score_NE, chosen_NA, self.routing.weigh(score_NE, chosen_NA)


def balance_loss(score_BTE: Tensor, chosen_BTA: Tensor, counted_BT: Tensor | None) -> Tensor:
    """Sequence-wise Σ_i f_i P_i, mean over sequences (V3 eqs. 17-20, without α). 1 at perfect balance.

    f_i = E/(A T) · #(tokens of the sequence that chose i), P_i = mean over t of s_it / Σ_j s_jt.
    """
    E, A = score_BTE.shape[-1], chosen_BTA.shape[-1]
    chosen_BTE = torch.zeros_like(score_BTE).scatter_(-1, chosen_BTA, 1.0)
    share_BTE = score_BTE / score_BTE.sum(-1, keepdim=True)
    if counted_BT is None:
        return (chosen_BTE.mean(1) * (E / A) * share_BTE.mean(1)).sum(-1).mean()
    seen_B1 = counted_BT.sum(1, keepdim=True).clamp(min=1)
    f_BE = (chosen_BTE * counted_BT[..., None]).sum(1) / seen_B1 * (E / A)
    P_BE = (share_BTE * counted_BT[..., None]).sum(1) / seen_B1
    return (f_BE * P_BE).sum(-1).mean()


class MoE(nn.Module):
    """The block's feed-forward: gate, routed experts, and one shared SwiGLU as wide as all shared experts."""

    def __init__(
        self, d_model: int, width: int, n_shared: int, routing: Routing, *, device: torch.device | None = None
    ):
        super().__init__()
        self.gate = Gate(d_model, routing, device=device)
        self.experts = Experts(routing.n_experts, d_model, width, device=device)
        self.shared_experts = SwiGLU(d_model, n_shared * width, device=device) if n_shared else None

    def forward(
        self, x_BTD: Tensor, kernels: Kernels, replay_BTA: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output [B, T, D], the scores [B, T, E] and the chosen experts [B, T, A]."""
        B, T, _ = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        replay_NA = None if replay_BTA is None else replay_BTA.flatten(0, 1)
        score_NE, chosen_NA, weight_NA = self.gate(x_ND, replay_NA, kernels.native)
        y_BTD = self.experts(x_ND, chosen_NA, weight_NA, kernels).view_as(x_BTD)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(x_BTD, kernels.native)
        return y_BTD, score_NE.unflatten(0, (B, T)), chosen_NA.unflatten(0, (B, T))


def expert_load(chosen: list[Tensor], n_experts: int, counted_BT: Tensor | None) -> Tensor:
    """Tokens each expert received, int64 [layers, E], from each layer's chosen experts [B, T, A].

    A layer of an MTP module has fewer positions; they are the first ones. Uncounted tokens (padding) are left out.
    """
    loads = []
    for chosen_BTA in chosen:
        ids = chosen_BTA if counted_BT is None else chosen_BTA[counted_BT[:, : chosen_BTA.shape[1]]]
        loads.append(torch.bincount(ids.flatten(), minlength=n_experts))
    return torch.stack(loads)


@torch.no_grad()
def update_router_bias(model: nn.Module, expert_load_LE: Tensor, gamma: float, *, centred: bool = False) -> None:
    """Balancing without an auxiliary loss: b_i += γ · sign(mean load - load_i), once a step, over the global batch.

    `centred` subtracts the mean of the signs, which keeps Σ b = 0 and changes no choice (Moonlight, appendix C).
    Layers are taken in the order of `expert_load_LE`: the main model's MoE layers, then those of MTP modules.
    """
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    load_LE = expert_load_LE.to(torch.float32)
    for gate, load_E in zip(gates, load_LE, strict=False):  # without `mtp=True` the MTP gates saw nothing
        sign_E = torch.sign(load_E.mean() - load_E)
        if centred:
            sign_E = sign_E - sign_E.mean()
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias += gamma * sign_E
