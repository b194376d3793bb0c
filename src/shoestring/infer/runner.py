"""Runs one step's work through the prepared layers: tokens in, hidden states of the rows that need logits out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.infer.attend import FixedPlan, Plan, make_plan
from shoestring.infer.chunks import Chunk
from shoestring.infer.layers import Making, Norm, PreparedGQA, PreparedMLA, PreparedSwiGLU, Step
from shoestring.infer.mixture import PreparedMoE
from shoestring.infer.native import NativeHead, NativeLayers, Rows, make_rows
from shoestring.infer.scheduler import Work
from shoestring.infer.store import Store
from shoestring.nn.decoder import Block, Decoder
from shoestring.nn.gqa import GQA
from shoestring.nn.mla import MLA
from shoestring.nn.moe import MoE
from shoestring.nn.room import Room

# Tokens of prompts up to this position are computed row by row, natively, with MLA and with ordinary attention: a pass
# of their own costs more (LOG.md, entries 11, 15 and 22). A row of MLA meets the latent with every head, which costs
# three times what expanded keys do. Matrix units make the pass's products several times as fast; for narrower vectors
# the longer ones were not measured.
if torch.cpu._is_amx_tile_supported():
    SINGLES = {"mla": 16, "gqa": 16}
else:
    SINGLES = {"mla": 512, "gqa": 4096} if torch.cpu._is_avx512_supported() else {"mla": 256, "gqa": 256}


@dataclass(slots=True)
class Ran:
    """`hidden_ND` after the final norm, for every token; `routed_LNA` when asked for."""

    hidden_ND: Tensor
    routed_LNA: Tensor | None
    steps: list[tuple[Step, Tensor] | Rows]  # what its passes were made of, plain ones with their rows' positions


class PreparedBlock:
    """One layer."""

    def __init__(self, block: Block, make: Making):
        attention, mlp = block.self_attn, block.mlp
        self.before, self.between = (
            Norm(each, make.dtype) for each in (block.input_layernorm, block.post_attention_layernorm)
        )
        self.attention = PreparedMLA(attention, make) if isinstance(attention, MLA) else PreparedGQA(attention, make)
        self.mlp = PreparedMoE(mlp, make) if isinstance(mlp, MoE) else PreparedSwiGLU(mlp, make)

    def __call__(self, x_ND: Tensor, step: Step, layer: int) -> tuple[Tensor, Tensor | None]:
        x_ND = self.attention(self.before(x_ND), x_ND, step, layer)
        h_ND = self.between(x_ND)
        if isinstance(self.mlp, PreparedMoE):
            return self.mlp(h_ND, x_ND)
        return self.mlp(h_ND, x_ND), None


class ModelRunner:
    """A model's weights prepared for inference, and the cache they fill. Raises TypeError for a foreign model."""

    def __init__(
        self, model: Decoder, *, blocks: int, block_size: int, tile: int = 0, more_layers: int = 0,
        native: bool = False, int8: bool = False, room: Room | None = None,
    ):  # fmt: skip
        self.tile, self.native, self.int8, self._room = tile, native, int8, room
        self.dtype = model.kernels.torch_dtype
        attention = next(block.self_attn for block in model.model.layers)
        latent = isinstance(attention, MLA)
        self._kind = "mla" if latent else "gqa"
        groups, width = (1, model.cache_width) if latent else _heads(attention)
        self.store = Store(
            len(model.model.layers) + more_layers, blocks, block_size, groups, width, latent=latent, dtype=self.dtype,
            device=model.embedding.device,
        )  # fmt: skip
        self._tables: tuple[list[int], Any] | None = None
        self.load(model)

    def load(self, model: Decoder) -> None:
        """Prepare these weights. Nothing may be using the cache: its blocks are zeroed again when they are taken, in
        case the old weights left NaN there."""
        self.store.ready = 0
        self.let_go()  # old and new weights never lie beside each other
        make = self.making()
        self.model, self.device = model, model.embedding.device
        self._blocks: list[PreparedBlock] | None = None
        self.table_VD = model.embedding.detach()  # rows are cast as they are looked up
        weight_VD = model.head_weight
        self.head = NativeHead(weight_VD, self.dtype, self._room) if self.native else make.exactly(weight_VD)
        self.norm = Norm(model.model.norm, self.dtype)
        self.layers = self.native_layers(model.model.layers, model.model.norm, 0) if self.native else None

    def let_go(self) -> None:
        """Free the prepared weights; nothing runs before `load`."""
        for name in ("_blocks", "head", "layers"):
            self.__dict__.pop(name, None)

    @property
    def blocks(self) -> list[PreparedBlock]:
        """The plain layers: made when the first pass needs them, which native steps may never do."""
        if self._blocks is None:
            make = self.making()
            self._blocks = [PreparedBlock(block, make) for block in self.model.model.layers]  # type: ignore[arg-type]
        return self._blocks

    def making(self) -> Making:
        """How this runner's products are made."""
        return Making(self.dtype, self.tile, absorb=not self.native, int8=self.int8)

    def native_layers(self, blocks: Any, norm: Any, first: int) -> NativeLayers:
        """These blocks as one native call; their keys are in the cache's layers from `first` on."""
        return NativeLayers(blocks, norm, self.store, first, self.model.rope, self.dtype, int8=self.int8)

    def arrange(self, works: list[Work]) -> list[Work]:
        """In the order in which `run` computes them: rows of one token, what is computed as such, chunks."""
        if self.layers is None or not works or works[-1].end - works[-1].start == 1:  # the scheduler sorts chunks last
            return works
        return sorted(works, key=lambda work: not self._by_rows(work))

    def _by_rows(self, work: Work) -> bool:
        return bool(self.tile) or work.end - work.start == 1 or work.end <= SINGLES[self._kind]

    @torch.inference_mode()
    def run(self, works: list[Work], *, routed: bool = False, whole: bool = True) -> Ran:
        """One pass over the work, as `arrange` orders it.

        whole: False where only the hidden states from which a next token is sampled are wanted; others may be NaN.
        """
        if any(work.drafted for work in works):
            works = [single for work in works for single in (self._singles(work) if work.drafted else [work])]
        if self.layers is not None:
            return self._natively(works, routed, whole or routed)
        if not self.tile:
            return self._pass(works, routed)
        # Every token a row of its own, so that chunks have no borders, and always as many rows: the last tile is
        # filled up with its first row, which writes the same numbers to the same place.
        singles = [single for work in works for single in self._singles(work)]
        tiles = [singles[i : i + self.tile] for i in range(0, len(singles), self.tile)]
        ran = [self._pass([*tile, *[tile[0]] * (self.tile - len(tile))], routed) for tile in tiles]
        hidden_ND = torch.cat([each.hidden_ND for each in ran])[: len(singles)]
        chosen = [each.routed_LNA for each in ran if each.routed_LNA is not None]
        steps = [step for each in ran for step in each.steps]
        return Ran(hidden_ND, torch.cat(chosen, dim=1)[:, : len(singles)] if chosen else None, steps)

    def _natively(self, works: list[Work], routed: bool, whole: bool) -> Ran:
        """Rows of one token in one native call, then the chunks; short prompts are rows too."""
        if works[-1].end - works[-1].start > 1:  # else all are rows already
            works = [single for work in works for single in (self._singles(work) if self._by_rows(work) else [work])]
        R = next((i for i, work in enumerate(works) if work.end - work.start > 1), len(works))
        if not R:
            return self._pass(works, routed)
        rows = self._rows(works[:R])
        tokens_R = torch.from_numpy(np.array([work.sequence.token(work.start) for work in works[:R]]))
        keep = None if whole else [row for row, work in enumerate(works[:R]) if work.ends]
        keep = None if keep is not None and len(keep) == R else keep
        assert self.layers is not None
        hidden_RD, chosen_LRA = self.layers.run(self.embed(tokens_R), rows, routed=routed, keep=keep)
        if len(works) == R:
            return Ran(hidden_RD, chosen_LRA, [rows])
        rest = self._pass(works[R:], routed)
        if chosen_LRA is not None and rest.routed_LNA is not None:
            chosen_LRA = torch.cat([chosen_LRA, rest.routed_LNA], dim=1)
        return Ran(torch.cat([hidden_RD, rest.hidden_ND]), chosen_LRA, [rows, *rest.steps])

    def _rows(self, works: list[Work]) -> Rows:
        """Where these rows stand; the last step's table while the same sequences have the same blocks."""
        key = [work.sequence.table for work in works]
        known = self._tables[1] if self._tables is not None and self._tables[0] == key else None
        tables = [] if known is not None else [work.sequence.blocks or [] for work in works]
        if known is None:
            self.store.reserve(1 + max(map(max, tables)))
        rows = make_rows([work.start for work in works], tables, known)
        self._tables = (key, rows.table_RJ)
        return rows

    @staticmethod
    def _singles(work: Work) -> list[Work]:
        """A row for each token, the draft included."""
        if work.end - work.start == 1 and not work.drafted:
            return [work]
        return [Work(work.sequence, at, at + 1) for at in range(work.start, work.end + work.drafted)]

    def _pass(self, works: list[Work], routed: bool) -> Ran:
        step, tokens_N, position_N = self._step(works)
        x_ND = self.embed(tokens_N)
        chosen = []
        for layer, block in enumerate(self.blocks):
            x_ND, chosen_NA = block(x_ND, step, layer)
            if routed and chosen_NA is not None:
                chosen.append(chosen_NA)
        return Ran(self.norm(x_ND), torch.stack(chosen) if chosen else None, [(step, position_N)])

    def embed(self, tokens_N: Tensor) -> Tensor:
        """Their rows of the input table, in the dtype of products."""
        return self.table_VD.index_select(0, tokens_N).to(self.dtype)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """fp32 [R, V]."""
        logits_RV: Tensor = self.head(hidden_RD).float()
        return logits_RV

    def _step(self, works: list[Work]) -> tuple[Step, Tensor, Tensor]:
        """Indices of the step; `works` has the rows that decode first."""
        size, store = self.store.size, self.store
        R = next((i for i, work in enumerate(works) if work.end - work.start > 1), len(works))
        tokens: list[int] = []
        positions: list[int] = []
        homes: list[int] = []  # the block of each token
        chunks = []
        for work in works:
            blocks = work.sequence.blocks
            assert blocks is not None
            begin = len(tokens)
            if work.end - work.start == 1:
                tokens.append(work.sequence.token(work.start))
                positions.append(work.start)
                homes.append(blocks[work.start // size])
                continue
            tokens += work.sequence.ids[work.start : work.end]
            positions += range(work.start, work.end)
            homes += [blocks[position // size] for position in range(work.start, work.end)]
            rows = slice(begin - R, len(tokens) - R)
            chunks.append(Chunk(rows, work.start, torch.tensor(blocks, device=self.device)))
        store.reserve(1 + max(max(work.sequence.blocks or [0]) for work in works))
        position_N = torch.tensor(positions, device=self.device)
        slot_M = store.slots(torch.tensor(homes, device=self.device), position_N % size)
        plan: Plan | FixedPlan | None = None
        bias = None
        if self.tile:
            tables = [(w.sequence.blocks or [])[: w.start // size + 1] for w in works]
            plan = FixedPlan(tables, position_N + 1, size, self.device)
        elif R:
            plan = self._plan(works[:R])
            assert isinstance(plan, Plan)
            bias = plan.bias(position_N[:R] + 1, size)
        cis_N = self.model.rope.table(position_N)
        step = Step(R, cis_N, slot_M, store, plan, bias, chunks)
        return step, torch.tensor(tokens, device=self.device), position_N

    def _plan(self, works: list[Work]) -> Plan:
        """The last step's plan while the same sequences have the same blocks."""
        key = [work.sequence.table for work in works]
        if self._tables is None or self._tables[0] != key:
            self._tables = (key, make_plan([work.sequence.blocks or [] for work in works], self.device))
        plan: Plan = self._tables[1]
        return plan

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        self.store.copy(pairs)


def _heads(gqa: Any) -> tuple[int, int]:
    assert isinstance(gqa, GQA)
    return gqa.kv_heads, gqa.head_dim
