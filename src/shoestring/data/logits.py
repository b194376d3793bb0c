"""The logits store: what a teacher says at every target token, kept on disk for students to learn from later.

Three kinds of record, all of fixed size so that shards are memory-mapped and a token is found by its number:
    topk     k ids of ceil(log2 V) bits, k log-probabilities and the log of the tail's mass in fp16  (k=32: 126-138 B)
    sampled  n ids drawn from the teacher, ceil(log2 V) bits each, repeats kept
    hidden   the hidden state before the head: fp16 or bf16, or int8 with an fp16 scale a token; the head lies beside

A shard is written whole (temporary, fsync, rename) and then named in `store.json`, replaced atomically with its
SHA-256 (a head's is written at the end): after a kill at any moment the store is a prefix of what it will be, and the
writer goes on behind it. A sequence is found by a hash of its ids and weights, so the order of use does not matter and
foreign traces are seen. Left out: compression beyond the packing (zstd gains little on packed bits); two writers at
once (the run directory they write into is locked).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shoestring.core.atomic import write_bytes, write_json
from shoestring.core.errors import UserError

SCHEMA = 1
INDEX = "store.json"
HEAD = "head.safetensors"  # the teacher's, beside hidden states
Kind = Literal["topk", "sampled", "hidden"]
NUMBERS = {"float16": 2, "bfloat16": 2, "int8": 1}
_SEQUENCE = np.dtype([("key", "<u8"), ("tokens", "<u8")])


@dataclass(frozen=True, slots=True)
class Spec:
    """What a store holds. `k`: ids of a token (topk, sampled) or width of the hidden state."""

    kind: Kind
    vocab: int
    k: int
    temperature: float
    teacher: str  # digest of the run or folder that answered
    tokenizer: str  # digest
    number: str = "float16"  # of hidden states

    @property
    def bits(self) -> int:
        """Bits of an id."""
        return max(1, int(self.vocab - 1).bit_length())

    @property
    def record(self) -> int:
        """Bytes of a token."""
        packed = -(-self.k * self.bits // 8)
        if self.kind == "topk":
            return packed + 2 * self.k + 2
        if self.kind == "sampled":
            return packed
        return NUMBERS[self.number] * self.k + (2 if self.number == "int8" else 0)


def sequence_key(ids: Sequence[int], weight: Sequence[float]) -> int:
    """64 bits of a sequence and of which of its tokens are targets."""
    data = np.asarray(ids, "<i8").tobytes() + (np.asarray(weight) != 0).tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


# ---- records ------------------------------------------------------------------------------------------------------


def pack_ids(ids_NK: np.ndarray, bits: int) -> np.ndarray:
    """[N, ceil(K·bits / 8)] bytes, little end first."""
    flags = (ids_NK.astype(np.uint32)[..., None] >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(flags.astype(np.uint8).reshape(len(ids_NK), -1), axis=1, bitorder="little")


def unpack_ids(packed: np.ndarray, k: int, bits: int) -> np.ndarray:
    """The ids [N, K] again: each lies within four bytes, for vocabularies up to 2^25."""
    first = np.arange(k) * bits
    padded = np.pad(packed, ((0, 0), (0, 4))).astype(np.uint32)
    word = sum(padded[:, first // 8 + i] << np.uint32(8 * i) for i in range(4))
    return ((word >> (first % 8).astype(np.uint32)) & np.uint32((1 << bits) - 1)).astype(np.int64)


def topk_records(spec: Spec, ids_NK: np.ndarray, logp_NK: np.ndarray, tail_N: np.ndarray) -> np.ndarray:
    """Raises ValueError for NaN, and for ids outside the vocabulary."""
    numbers = np.concatenate([logp_NK, tail_N[:, None]], axis=1).astype(np.float32)
    if np.isnan(numbers).any() or ids_NK.min(initial=0) < 0 or ids_NK.max(initial=0) >= spec.vocab:
        raise ValueError("top-k of a teacher with NaN logits, or with ids outside its vocabulary")
    halves = np.clip(numbers, -60000.0, 0.0).astype("<f2").view(np.uint8)
    return np.concatenate([pack_ids(ids_NK, spec.bits), halves], axis=1)


def read_topk(spec: Spec, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [N, K], log-probabilities [N, K], log of the tail's mass [N])."""
    packed = -(-spec.k * spec.bits // 8)
    numbers = np.ascontiguousarray(records[:, packed:]).view("<f2").astype(np.float32)
    return unpack_ids(records[:, :packed], spec.k, spec.bits), numbers[:, :-1], numbers[:, -1]


def hidden_records(spec: Spec, hidden_NC: np.ndarray) -> np.ndarray:
    """fp32 states in; rounded to the spec's number. Raises ValueError for NaN or infinity."""
    if not np.isfinite(hidden_NC).all():
        raise ValueError("hidden states of a teacher that are not finite")
    if spec.number == "bfloat16":  # round to nearest even on the upper half of the float
        raw = hidden_NC.astype("<f4").view(np.uint32)
        return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype("<u2").view(np.uint8)
    if spec.number == "float16":
        return np.clip(hidden_NC, -65504, 65504).astype("<f2").view(np.uint8)
    scale_N = (np.abs(hidden_NC).max(1, initial=1e-6) / 127).astype("<f2")
    whole = np.clip(np.rint(hidden_NC / np.maximum(scale_N.astype(np.float32), 1e-7)[:, None]), -127, 127)
    return np.concatenate([whole.astype(np.int8).view(np.uint8), scale_N[:, None].view(np.uint8)], axis=1)


def read_hidden(spec: Spec, records: np.ndarray) -> np.ndarray:
    """The states [N, C] in fp32."""
    if spec.number == "bfloat16":
        return (np.ascontiguousarray(records).view("<u2").astype(np.uint32) << 16).view(np.float32)
    if spec.number == "float16":
        return np.ascontiguousarray(records).view("<f2").astype(np.float32)
    scale_N1 = np.ascontiguousarray(records[:, -2:]).view("<f2").astype(np.float32)
    return np.ascontiguousarray(records[:, :-2]).view(np.int8).astype(np.float32) * scale_N1


# ---- writing ------------------------------------------------------------------------------------------------------


class LogitsWriter:
    """Appends sequences to a store, a shard at a time. Opened again after a kill it knows how many are there."""

    def __init__(self, folder: str | Path, spec: Spec, *, shard_tokens: int = 1 << 16) -> None:
        """Raises UserError when the folder holds a store of another spec, or a finished one."""
        self.folder, self.spec, self._shard_tokens = Path(folder), spec, shard_tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index: dict[str, Any] = {"schema": SCHEMA, "spec": asdict(spec), "complete": False, "shards": []}
        if (self.folder / INDEX).exists():
            self._index = _read_index(self.folder)
            if self._index["spec"] != asdict(spec) or self._index["complete"]:
                state = "finished" if self._index["complete"] else "of other settings"
                raise UserError(f"{self.folder} holds a logits store that is {state}; give another folder.")
        named = {name for shard in self._index["shards"] for name in (shard["file"], shard["sequences_file"])}
        for stray in [*self.folder.glob("shard-*"), *self.folder.glob(".*.tmp")]:
            if stray.name not in named:
                stray.unlink()  # written, but not named before the kill
        self._records: list[np.ndarray] = []
        self._sequences: list[tuple[int, int]] = []

    @property
    def sequences(self) -> int:
        """Sequences on disk for good: where a writer that was killed goes on."""
        return sum(int(shard["sequences"]) for shard in self._index["shards"])

    @property
    def tokens(self) -> int:
        return sum(int(shard["tokens"]) for shard in self._index["shards"])

    def append(self, key: int, records: np.ndarray) -> None:
        """The records [n, bytes] of one sequence; on disk once its shard is full, or at `close`."""
        if records.shape[1:] != (self.spec.record,) or records.dtype != np.uint8:
            raise ValueError(f"records of {records.shape[1:]} {records.dtype}, not of {self.spec.record} bytes")
        self._records.append(records)
        self._sequences.append((key, len(records)))
        if sum(map(len, self._records)) >= self._shard_tokens:
            self._flush()

    def close(self) -> None:
        """Write what is left and mark the store complete."""
        self._flush()
        self._index["complete"] = True
        if (self.folder / HEAD).exists():
            self._index["head_sha256"] = hashlib.sha256((self.folder / HEAD).read_bytes()).hexdigest()
        write_json(self.folder / INDEX, self._index)

    def _flush(self) -> None:
        if not self._sequences:
            return
        number = len(self._index["shards"])
        records, sequences = np.concatenate(self._records), np.array(self._sequences, dtype=_SEQUENCE)
        entry: dict[str, Any] = {"tokens": len(records), "sequences": len(sequences)}
        for name, suffix, array in (("file", "bin", records), ("sequences_file", "seq", sequences)):
            data = array.tobytes()
            entry[name], entry[f"{name}_sha256"] = f"shard-{number:05d}.{suffix}", hashlib.sha256(data).hexdigest()
            write_bytes(self.folder / entry[name], data)
        self._index["shards"].append(entry)
        write_json(self.folder / INDEX, self._index)
        self._records, self._sequences = [], []


# ---- reading ------------------------------------------------------------------------------------------------------


class LogitsStore:
    """A finished store, memory-mapped. Raises UserError for one that is unfinished, damaged or of another schema."""

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if not index["complete"]:
            raise UserError(f"{self.folder}: the logits store is unfinished; run the command that makes it again.")
        self.spec = Spec(**index["spec"])
        if self.spec.kind == "hidden":
            _check(self.folder / HEAD, index.get("head_sha256") if verify else None)  # older stores name none
        self._maps, self._starts, self._found = [], [0], dict[int, tuple[int, int]]()
        for shard in index["shards"]:
            for name in ("file", "sequences_file"):
                _check(self.folder / shard[name], shard[f"{name}_sha256"] if verify else None)
            shape = (int(shard["tokens"]), self.spec.record)
            self._maps.append(np.memmap(self.folder / shard["file"], np.uint8, "r", shape=shape))
            sequences = np.fromfile(self.folder / shard["sequences_file"], _SEQUENCE)
            first = self._starts[-1]
            for key, tokens in sequences.tolist():
                self._found[key] = (first, tokens)
                first += tokens
            self._starts.append(first)

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    @property
    def nbytes(self) -> int:
        """Of everything on disk, the index and the tables of sequences included (not a teacher's head)."""
        return sum(path.stat().st_size for path in [*self.folder.glob("shard-*"), self.folder / INDEX])

    def expect(self, *, tokenizer: str, temperature: float, teacher: str | None = None) -> None:
        """Raises UserError when the store is of another tokenizer, temperature or teacher than it is used with."""
        where = f"{self.folder}: the logits store"
        if self.spec.tokenizer != tokenizer:
            raise UserError(
                f"{where} was made with tokenizer {self.spec.tokenizer}, the student has {tokenizer}; capture again "
                "with the student's tokenizer, or use way=universal_logit, which works across tokenizers."
            )
        if teacher is not None and self.spec.teacher != teacher:
            raise UserError(f"{where} is of teacher {self.spec.teacher}, not of {teacher}; capture it again.")
        if self.spec.kind != "hidden" and self.spec.temperature != temperature:
            raise UserError(
                f"{where} was captured at temperature {self.spec.temperature:g} and cannot be used at {temperature:g}: "
                "set temperature to match, or capture kind=hidden, which serves every temperature."
            )

    def find(self, key: int) -> tuple[int, int]:
        """(first token, tokens) of a sequence. Raises KeyError."""
        return self._found[key]

    def records(self, tokens_N: np.ndarray) -> np.ndarray:
        """The records [N, bytes] of tokens by number."""
        out = np.empty((len(tokens_N), self.spec.record), np.uint8)
        shard_N = np.searchsorted(self._starts, tokens_N, side="right") - 1
        for shard in np.unique(shard_N):
            here = shard_N == shard
            out[here] = self._maps[shard][tokens_N[here] - self._starts[shard]]
        return out


def _check(path: Path, sha256: str | None) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing from its logits store; restore it, or capture again.")
    if sha256 is None:
        return
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(f"{path} is damaged (its checksum does not match); restore it, or capture again.")


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no logits store; make one with `shoestring capture`.") from None
    except ValueError as error:
        raise UserError(f"{folder / INDEX} is not valid JSON ({error}); capture again.") from None
    if not isinstance(index, dict) or index.get("schema") != SCHEMA:
        told = index.get("schema") if isinstance(index, dict) else None
        raise UserError(f"{folder / INDEX} has schema {told!r}; this version reads {SCHEMA}.")
    if lacking := [name for name in ("spec", "complete", "shards") if name not in index]:
        raise UserError(f'{folder / INDEX} lacks "{lacking[0]}": it is damaged; restore it, or capture again.')
    return index
