"""Safetensors files of a checkpoint folder: read one tensor at a time, written in shards. Knows no model."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoestring.core.atomic import TEMPORARY, disk_full, fsync_path, is_disk_full, write_json
from shoestring.core.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PIECE_ELEMENTS = 1 << 18  # of a tensor that are in memory beside their copy
MAPPED = 1 << 25  # bytes read of a file before it is opened anew: what was read of a mapped file counts as memory held


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises UserError when it is not there or not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} holds no {path.name}: it is no checkpoint, or its saving was cut short."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold one JSON object, not {type(value).__name__}.")
    return value


def open_safetensors(path: Path) -> Any:
    """A safetensors file for reading. Raises UserError when it is damaged or cut short."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy it again.") from None


class Files:
    """The tensors of a folder by name, whichever shard holds them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._read: dict[str, int] = {}
        if (folder / INDEX).exists():
            self.file_of: dict[str, str] = read_json(folder / INDEX).get("weight_map", {})
            if not isinstance(self.file_of, dict) or not all(isinstance(n, str) for n in self.file_of.values()):
                raise UserError(f"{folder / INDEX}: weight_map must say for each tensor which file holds it.")
            for name in sorted(set(self.file_of.values())):
                if not (folder / name).exists():
                    raise UserError(f"{folder} lacks {name}, which its index names; copy the checkpoint again.")
        elif (folder / SINGLE).exists():
            self.file_of = dict.fromkeys(open_safetensors(folder / SINGLE).keys(), SINGLE)
        else:
            raise UserError(f"{folder} holds no {SINGLE}; give the folder of a checkpoint in Hugging Face layout.")

    @property
    def names(self) -> list[str]:
        return list(self.file_of)

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        with self._file_of(name) as file:
            tensor: Tensor = file.get_tensor(name)
        self._count(name, tensor)
        return tensor

    def shape(self, name: str) -> list[int]:
        with self._file_of(name) as file:
            shape: list[int] = file.get_slice(name).get_shape()
        return shape

    def pieces(self, name: str) -> Iterator[tuple[slice | EllipsisType, Tensor]]:
        """(rows, the tensor's part) for all of its rows, a few megabytes at a time: a whole table would be there twice
        while it is copied."""
        shape = self.shape(name)
        step = max(1, PIECE_ELEMENTS // max(1, math.prod(shape[1:])))
        if not shape or shape[0] <= step:
            yield ..., self.read(name)
            return
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            with self._file_of(name) as file:
                part: Tensor = file.get_slice(name)[rows]
            self._count(name, part)
            yield rows, part

    def _count(self, name: str, part: Tensor) -> None:
        """Let go of a file of which much was read; who reads on opens it again."""
        file = self.file_of[name]
        self._read[file] = self._read.get(file, 0) + part.nbytes
        if self._read[file] > MAPPED:
            del self._handles[file], self._read[file]

    @contextmanager
    def _file_of(self, name: str) -> Iterator[Any]:
        """The open file that holds it."""
        file = self.file_of[name]
        if file not in self._handles:
            self._handles[file] = open_safetensors(self.folder / file)
        try:
            yield self._handles[file]
        except SafetensorError as error:
            raise UserError(f"{self.folder / file} does not hold {name} ({error}); copy it again.") from None


def write_shards(tensors: dict[str, Tensor], folder: Path, max_bytes: float) -> None:
    """Write the tensors in their order, one file or several with an index; then remove files of an earlier save."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    n = len(shards)
    files = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    for file, names in zip(files, shards, strict=True):
        write_tensors({name: tensors[name] for name in names}, folder / file)
    if n > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX)
    for stale in folder.glob("model*.safetensors*"):
        if stale.name not in files:
            stale.unlink()


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file, old or new and nothing between. Raises DiskFull."""
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with _replacing(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt"})


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill within `folder`, whose files take their places there once all are whole, config.json last and
    removed first: for writers that know no such order. Weights of an earlier save go. Raises DiskFull."""
    part = Path(tempfile.mkdtemp(prefix=".", suffix=TEMPORARY, dir=folder))
    try:
        yield part
        (folder / "config.json").unlink(missing_ok=True)
        made = sorted(part.iterdir(), key=lambda path: path.name == "config.json")
        for stale in folder.glob("model*.safetensors*"):
            stale.unlink()
        for path in made:
            fsync_path(path)
            os.replace(path, folder / path.name)
        fsync_path(folder)
    except BaseException as error:
        if is_disk_full(error, folder):
            raise disk_full(folder) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException as error:
        full = is_disk_full(error, path.parent)
        with suppress(FileNotFoundError):
            temporary.unlink()
        if full:
            raise disk_full(path) from error
        raise
