"""What this machine can do: its measured GEMM rate (the yardstick of the bill) and the kernels it runs best.

Both are measured once for a folder of runs and kept in `machine.json` there, so that a resumed or repeated run
computes with the same kernels and ends with the same bits. The file is keyed by the processor and the number of
threads: another machine measures anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from shoestring.core.atomic import write_json
from shoestring.core.errors import UserError
from shoestring.core.host import processor
from shoestring.nn.attention_native import why_not
from shoestring.nn.choose import attentions, between, choose_kernels
from shoestring.nn.kernels import Kernels, wait
from shoestring.train.configs import Compute


def gemm_rate(dtype: torch.dtype, device: str = "cpu", size: int | None = None, repeats: int = 7) -> float:
    """Median FLOP/s of a square product of `size` on `device` at the present number of threads.

    By default 1024, and 8192 where a product of 1024 is over before the device is busy.
    """
    size = (1024 if device == "cpu" else 8192) if size is None else size
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(repeats + 1):
        wait(a.device)
        start = time.perf_counter()
        torch.mm(a, b)
        wait(a.device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])  # the first one warms up


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads (None: as many as now) inside, and with as many as before afterwards."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Ask glibc, where it is the one, to keep what is freed instead of giving the top of its heap back: a training step
    would fault the same 10,000 pages in again, two to five percent of its time. Buffers beyond 32 MB are given back."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 1 << 30)
    mallopt(mmap_threshold, 1 << 25)


class Machine:
    """Measurements of this machine, read from and written to `root/machine.json`."""

    def __init__(self, root: Path) -> None:
        self.path = root / "machine.json"

    @property
    def key(self) -> str:
        """The processor, the threads at work now, and torch's version."""
        return f"{processor()} x{torch.get_num_threads()} torch {torch.__version__}"

    def _facts(self) -> dict[str, Any]:
        known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return known

    def _keep(self, name: str, value: Any) -> None:
        known = self._facts()
        known.setdefault(self.key, {})[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, known)

    def peak_flops(self, device: str = "cpu") -> float:
        """The best GEMM rate measured here over fp32 and bf16, FLOP/s."""
        name = f"peak_flops {device}"
        found = self._facts().get(self.key, {}).get(name)
        if found is None:
            found = max(gemm_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16))
            self._keep(name, found)
        return float(found)

    def kernels(self, config: Any, compute: Compute, *, tokens: int, seq_len: int) -> Kernels:
        """The kernels for a model: what `compute` fixes, and measured choices where it says "auto".

        Where nothing else is left to measure, attention is not measured either (nn/choose.py names the likely one), so
        that two folders of one machine compute alike. Raises UserError when attention or what lies between the products
        was recorded as native and cannot be had any more.
        """
        if not hasattr(config, "probe"):  # a model of transformers has its own kernels: only the dtype is a choice
            attention: Any = "blocks" if compute.device == "cpu" else "sdpa"
            return Kernels(dtype="bfloat16" if compute.dtype == "bfloat16" else "float32", attention=attention)
        asked = json.dumps([config.to_json(), compute.to_json(), tokens, seq_len], sort_keys=True)
        name = "kernels " + hashlib.sha256(asked.encode()).hexdigest()[:12]
        found = self._facts().get(self.key, {}).get(name)
        if found is None:
            found = _choice(config, compute, tokens, seq_len)
            self._keep(name, found)
        kernels = Kernels(
            dtype=found["dtype"], experts=found["experts"], attention=found["attention"],
            elements=found.get("elements", "torch"),  # not in the records of older versions
        )  # fmt: skip
        native = [name for name in ("attention", "elements") if found.get(name) == "native"]
        missing = why_not(kernels.torch_dtype, torch.device(compute.device)) if native else None
        if missing is not None:
            raise UserError(
                f"{self.path} says that these runs compute {' and '.join(native)} natively, which is not to be had "
                f"now: {missing}; mend that, or remove the file (what is resumed then goes on with other bits)."
            )
        return kernels


def _choice(config: Any, compute: Compute, tokens: int, seq_len: int) -> dict[str, Any]:
    """What a record of kernels holds."""
    fixed: dict[str, Any] = {"dtype": compute.dtype, "experts": compute.experts}
    given = {key: None if value == "auto" else value for key, value in fixed.items()}
    if None in given.values():
        best, record = choose_kernels(config, tokens, seq_len, device=compute.device, **given)
        return {**asdict(best), "measured": record}
    attention, elements = attentions(compute.dtype, compute.device)[0], between(compute.dtype, compute.device)
    return asdict(Kernels(**fixed, attention=attention, elements=elements))
