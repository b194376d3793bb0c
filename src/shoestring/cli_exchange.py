"""All-to-all between the devices of this machine, measured: GPUs by nccl, processes of a CPU by gloo.

Each device is a process of its own, as in training. An all-to-all of several sizes is timed between barriers, and the
slowest process counts, for nobody can go on before it. Left out: devices of several machines.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from shoestring.core.errors import UserError
from shoestring.cost.calibrate import ALONE, Exchange

SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 23, 1 << 25)  # bytes a process sends in all, its own share included
REPEATS = 7
SECONDS = 120  # for all processes together


def measure_exchange(device: str, processes: int = 0, sizes: tuple[int, ...] = SIZES) -> Exchange:
    """All devices of this kind together; `processes` of a CPU, 2 if 0. With one GPU nothing is measured, and why is
    said. Raises UserError when the processes fail."""
    if device == "cpu":
        return _run("gloo", device, processes or 2, sizes)
    count = torch.accelerator.device_count() if device == "cuda" else 1
    if count < 2:
        return Exchange(1, "", (), ALONE)
    return _run("nccl", device, count, sizes)


def _run(backend: str, device: str, count: int, sizes: tuple[int, ...]) -> Exchange:
    import torch.distributed as dist
    import torch.multiprocessing as mp

    if not dist.is_available() or not getattr(dist, f"is_{backend}_available")():
        return Exchange(count, backend, (), f"this torch was built without {backend}")
    with tempfile.TemporaryDirectory() as folder:
        meet = Path(folder) / "meet"
        context = mp.start_processes(
            _worker, (backend, device, count, str(meet), sizes), nprocs=count, join=False, start_method="spawn"
        )
        end = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > end:
                    raise UserError(f"all-to-all of {count} processes did not end in {SECONDS} s; give --no-messages.")
        except mp.ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"all-to-all by {backend} failed ({last}); give --no-messages.") from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return Exchange(count, backend, read(meet, count, sizes))


def read(meet: Path, count: int, sizes: tuple[int, ...]) -> tuple[tuple[float, float], ...]:
    """(bytes that go to others, seconds of the slowest process) from what the processes wrote beside `meet`."""
    rows = [[float(x) for x in Path(f"{meet}.{rank}").read_text().split()] for rank in range(count)]
    others = 1 - 1 / count
    return tuple((size * others, max(times)) for size, times in zip(sizes, zip(*rows, strict=True), strict=True))


def _worker(rank: int, backend: str, device: str, count: int, meet: str, sizes: tuple[int, ...]) -> None:
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # processes of one machine: no need to look for its address
    torch.set_num_threads(1)
    where = torch.device(device, rank) if device != "cpu" else torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group(backend, init_method=f"file://{meet}", rank=rank, world_size=count)
    try:
        times = [exchange_seconds(dist, where, count, size) for size in sizes]
        Path(f"{meet}.{rank}").write_text(" ".join(map(repr, times)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def exchange_seconds(dist: Any, where: torch.device, count: int, size: int) -> float:
    """The best of several all-to-alls of `size` bytes a process, each from when all are there."""
    from shoestring.nn.kernels import wait

    each = max(1, size // (4 * count))
    sent = torch.ones(each * count, device=where)
    got = torch.empty_like(sent)
    best = float("inf")
    for _ in range(REPEATS + 1):
        dist.barrier()
        wait(where)
        start = time.perf_counter()
        dist.all_to_all_single(got, sent)
        wait(where)
        best = min(best, time.perf_counter() - start)
    return best
