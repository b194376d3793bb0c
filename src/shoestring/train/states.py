"""Hidden states as a further lesson: what the blocks of student and teacher put out, matched through projections.

The states are read by forward hooks, so models know nothing of it. The projections hang on the student as a module that
its state_dict leaves out: the optimiser and the clipping see them, the student that is saved does not. For going on
after a kill they lie beside the checkpoint's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shoestring.losses._states import WithStates, states_sum
from shoestring.losses._tokens import Tokens
from shoestring.models.checkpoint_files import open_safetensors
from shoestring.train.configs import HiddenStates
from shoestring.train.context import step_generator
from shoestring.train.step import Objective

FILE = "projections.safetensors"
NAME = "projections_to_teacher"


class Projections(nn.Module):
    """One [C, D] matrix for each pair of layers; no part of the model's state_dict."""

    def __init__(self, pairs: Sequence[tuple[int, int]], widths: tuple[int, int], seed: int) -> None:
        super().__init__()
        self.pairs = list(pairs)
        D, C = widths
        generator = step_generator(seed, 23)
        for number in range(len(self.pairs)):  # the identity where the widths agree
            first = torch.eye(D) if C == D else torch.randn(C, D, generator=generator) * D**-0.5
            self.register_parameter(f"pair_{number}", nn.Parameter(first))

    def _save_to_state_dict(self, *_: Any) -> None:
        """Nothing: they are thrown away with the stage."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing, likewise."""

    @property
    def matrices(self) -> list[Tensor]:
        return [parameter for _, parameter in self.named_parameters()]


class Taps:
    """What some blocks of a model put out in its last forward pass."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self._layers, self._seen = list(layers), dict[int, Tensor]()
        blocks = model.blocks
        for layer in set(layers):
            blocks[layer].register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def keep(_: nn.Module, __: Any, out: Any) -> None:
            self._seen[layer] = out[0] if isinstance(out, tuple) else out

        return keep

    def take(self, place_N: Tensor) -> list[Tensor]:
        """[N, D] of each layer asked for, at these places of the batch; once a pass, so that no graph outlives it."""
        taken = [self._seen[layer].flatten(0, 1)[place_N] for layer in self._layers]
        self._seen.clear()
        return taken


def attach(model: Any, pairs: Sequence[tuple[int, int]], widths: tuple[int, int], seed: int) -> None:
    """Give the student projections for these pairs of layers. `widths`: of student and teacher."""
    model.add_module(NAME, Projections(pairs, widths, seed).to(model.embedding.device))


def projections(model: Any) -> Projections | None:
    """Those of the student, if it has any."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, Projections) else None


def save(model: Any, folder: Path) -> None:
    """Beside the weights of a checkpoint, when there are any."""
    if (found := projections(model)) is not None:
        save_file({name: p.detach().cpu().contiguous() for name, p in found.named_parameters()}, folder / FILE)


@torch.no_grad()
def load(model: Any, folder: Path) -> None:
    """Put back what `save` wrote."""
    if (found := projections(model)) is not None:
        kept = open_safetensors(folder / FILE)
        for name, parameter in found.named_parameters():
            parameter.copy_(kept.get_tensor(name))


def with_states(objective: Objective, model: Any, settings: HiddenStates) -> Objective:
    """The objective with weight · mean over pairs of the states' distance; the metric "states" is that mean."""
    found = projections(model)
    assert found is not None
    taps = Taps(model, [ours for ours, _ in found.pairs])

    def both(hidden_ND: Tensor, weight_VD: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics = objective(hidden_ND, weight_VD, tokens)
        told = tokens.teacher
        assert isinstance(told, WithStates) and tokens.place_N is not None
        sums = [
            states_sum(h_ND, t_NC, W_CD, tokens.weight_N, settings.measure)
            for h_ND, t_NC, W_CD in zip(taps.take(tokens.place_N), told.states, found.matrices, strict=True)
        ]
        apart = torch.stack(sums).mean()
        return total + settings.weight * apart, metrics | {"states": apart.detach()}

    return both
