"""From token sequences to training batches: examples, packing, and the two shifts (next token, MTP).

Rows are packed best-fit decreasing (V3 section 5.1 packs SFT data with isolation): each row holds whole examples,
told apart by `segments_BT`, with positions that start again at 0. Pretraining rows are cut from one stream and
carry no segments (V3 section 4.1 packs without a cross-sample mask).

Examples of one row that begin alike (the samples of one prompt) may share that beginning, their stem: it stands in the
row once and they follow it as branches, each blind to the others. The numbers are those of whole examples, since
nothing before a token has changed for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.core.errors import UserError

PADDING = -1  # segment id of padding
BRANCH = 1 << 20  # segment s + j * BRANCH, j > 0, is a branch of segment s: it sees s and itself


@dataclass(slots=True)
class Example:
    """One sequence. `weight[t]` weighs the prediction OF token t (so weight[0] is never used), as do the rest."""

    ids: Sequence[int]
    weight: Sequence[float]
    advantage: float | Sequence[float] | None = None  # one for every token of a completion, or one each
    old: Sequence[float] | None = None
    ref: Sequence[float] | None = None
    entry: Sequence[int] | None = None  # where a store, or whoever fills `Batch.teacher`, keeps what it needs
    stem: int = 0  # so many first ids may be shared; weight must be 0 on them and on the one that they predict

    @property
    def start(self) -> tuple[int, ...]:
        """The ids it may share."""
        return tuple(self.ids[: self.stem])


@dataclass(slots=True)
class Batch:
    """B rows of T tokens. `target_BT[b, t]` is token t+1 with `weight_BT` 0 where it must not be learned;
    `target2_BT` is token t+2, for the MTP head. Advantages and logprobs are aligned with `target_BT`."""

    tokens_BT: Tensor
    target_BT: Tensor
    weight_BT: Tensor
    target2_BT: Tensor
    weight2_BT: Tensor
    positions_BT: Tensor | None = None
    segments_BT: Tensor | None = None
    advantage_BT: Tensor | None = None
    old_BT: Tensor | None = None
    ref_BT: Tensor | None = None
    entry_BT: Tensor | None = None  # int64, 0 where there is none
    teacher: Any = None  # the teacher's side of the target tokens that carry weight, in their order (losses/_teacher)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        there: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in there.items()}
        return Batch(**moved)

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return self.tokens_BT.numel() if self.segments_BT is None else int((self.segments_BT != PADDING).sum())

    @property
    def weight(self) -> float:
        return float(self.weight_BT.sum(dtype=torch.float64))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of examples for each row, no row over `capacity`: best fit, longest first. Deterministic.

    Raises UserError when one example alone is longer than a row.
    """
    if lengths and max(lengths) > capacity:
        raise UserError(f"an example of {max(lengths)} tokens does not fit a row of {capacity}; raise row_tokens.")
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free room -> rows with exactly that room
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[index]
        room = next((r for r in range(need, capacity + 1) if by_room.get(r)), None)
        if room is None:
            row, room = len(rows), capacity
            rows.append([])
        else:
            row = by_room[room].pop()
        rows[row].append(index)
        by_room.setdefault(room - need, []).append(row)
    return rows


def packed_batch(examples: Sequence[Example], rows: Sequence[Sequence[int]], capacity: int, pad_id: int) -> Batch:
    """The batch whose row b holds the examples `rows[b]`, one segment each; neighbours of one stem share it."""
    shape = (len(rows), capacity)
    tokens, segments = np.full(shape, pad_id, np.int64), np.full(shape, PADDING, np.int64)
    positions, weight = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    has = {name: any(getattr(examples[i], name) is not None for row in rows for i in row) for name in _ALIGNED}
    aligned = {name: np.zeros(shape, _ALIGNED[name]) for name, present in has.items() if present}
    for b, row in enumerate(rows):
        end = 0
        for index, part, segment in _parts(examples, row):
            example, here = examples[index], slice(end, end + part.stop - part.start)
            tokens[b, here], weight[b, here] = example.ids[part], example.weight[part]
            segments[b, here], positions[b, here] = segment, np.arange(part.start, part.stop)
            for name, array in aligned.items():
                value = getattr(example, name)
                array[b, here] = value if isinstance(value, int | float) else value[part]
            end = here.stop
    return _shifted(tokens, weight, segments, positions, aligned)


def _parts(examples: Sequence[Example], row: Sequence[int]) -> Iterator[tuple[int, slice, int]]:
    """(example, a part of it, its segment) in the order of the row."""
    alike = itertools.groupby(row, key=lambda i: examples[i].start or i)
    for segment, members in enumerate(list(group) for _, group in alike):
        stem = examples[members[0]].stem if len(members) > 1 else 0
        if stem:
            yield members[0], slice(0, stem), segment
        for branch, index in enumerate(members, start=1):
            yield index, slice(stem, len(examples[index].ids)), segment + branch * BRANCH * (stem > 0)


_ALIGNED = {"advantage": np.float32, "old": np.float32, "ref": np.float32, "entry": np.int64}


def _ahead(array: np.ndarray, by: int) -> np.ndarray:
    out = np.zeros_like(array)
    out[:, :-by] = array[:, by:]
    return out


def _shifted(
    tokens: np.ndarray,
    weight: np.ndarray,
    segments: np.ndarray | None,
    positions: np.ndarray | None,
    aligned: dict[str, np.ndarray],
) -> Batch:
    def weight_ahead(by: int) -> Tensor:
        out = _ahead(weight, by)
        if segments is not None:  # a segment's end predicts nothing of the next
            other = np.full_like(segments, PADDING - 1)
            other[:, :-by] = segments[:, by:]
            out[other != segments] = 0.0
        return torch.from_numpy(out)

    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        target_BT=torch.from_numpy(_ahead(tokens, 1)),
        weight_BT=weight_ahead(1),
        target2_BT=torch.from_numpy(_ahead(tokens, 2)),
        weight2_BT=weight_ahead(2),
        positions_BT=None if positions is None else torch.from_numpy(positions),
        segments_BT=None if segments is None else torch.from_numpy(segments),
        **{f"{name}_BT": torch.from_numpy(_ahead(array, 1)) for name, array in aligned.items()},
    )


def packed_batches(
    examples: Sequence[Example], *, row_tokens: int, tokens_per_microbatch: int, pad_id: int
) -> list[Batch]:
    """All examples in as few rows as best fit finds, cut into micro-batches of at most `tokens_per_microbatch`.

    Rows are `row_tokens` long, or shorter where one shorter row holds them all (in steps of 8, to keep shapes few).
    """
    if not examples:
        return []
    longest = max(len(e.ids) for e in examples)
    bundles = _bundles(examples, max(row_tokens, longest))
    lengths = [sum(part.stop - part.start for _, part, _ in _parts(examples, bundle)) for bundle in bundles]
    capacity = min(row_tokens, -(-sum(lengths) // 8) * 8)
    rows = [[i for bundle in row for i in bundles[bundle]] for row in pack(lengths, capacity)]
    per = max(1, tokens_per_microbatch // capacity)
    return [packed_batch(examples, rows[i : i + per], capacity, pad_id) for i in range(0, len(rows), per)]


def _bundles(examples: Sequence[Example], capacity: int) -> list[list[int]]:
    """Examples of one stem together, as many as fit a row; all others alone."""
    alike: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        alike.setdefault(example.start or index, []).append(index)
    found = []
    for members in alike.values():
        stem = examples[members[0]].stem if len(members) > 1 else 0
        for row in pack([len(examples[i].ids) - stem for i in members], capacity - stem):
            found.append([members[i] for i in row])
    return found


def stream_batch(rows_BT: np.ndarray) -> Batch:
    """A pretraining batch from B rows of T tokens cut from a stream: every next token counts."""
    return _shifted(rows_BT.astype(np.int64), np.ones(rows_BT.shape, np.float32), None, None, {})


def total_weight(batches: Iterable[Batch]) -> float:
    """The global token weight of one optimiser step: the one divisor of its loss."""
    return sum(batch.weight for batch in batches)
