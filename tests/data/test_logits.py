"""The logits store: exact records, bytes a token, checksums, and going on after kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UserError
from shoestring.data import logits
from shoestring.data.logits import LogitsStore, LogitsWriter, Spec

SPEC = Spec("topk", vocab=151_936, k=32, temperature=1.0, teacher="t", tokenizer="k")


@settings(max_examples=40, deadline=None)
@given(vocab=st.integers(2, 1 << 25), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_ids_of_any_width_come_back(vocab: int, k: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, vocab, (5, k))
    ids[0], ids[1] = 0, vocab - 1
    bits = replace(SPEC, vocab=vocab).bits
    packed = logits.pack_ids(ids, bits)
    assert packed.shape == (5, -(-k * bits // 8))
    assert (logits.unpack_ids(packed, k, bits) == ids).all()


def _topk(n: int, spec: Spec = SPEC, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(spec.vocab, spec.k, replace=False) for _ in range(n)])
    return ids, -rng.uniform(0, 16, (n, spec.k)).astype(np.float32), -rng.uniform(0, 9, n).astype(np.float32)


def test_top_k_records_come_back_within_fp16() -> None:
    ids, logp, tail = _topk(50)
    records = logits.topk_records(SPEC, ids, logp, tail)
    back = logits.read_topk(SPEC, records)
    assert (back[0] == ids).all()
    assert np.abs(back[1] - logp).max() <= 0.004 and np.abs(back[2] - tail).max() <= 0.004
    with pytest.raises(ValueError, match="NaN"):
        logits.topk_records(SPEC, ids, logp * np.nan, tail)


@pytest.mark.parametrize(("number", "limit"), [("float16", 1e-3), ("bfloat16", 8e-3), ("int8", 2e-2)])
def test_hidden_records_come_back_rounded(number: str, limit: float) -> None:
    import torch

    spec = replace(SPEC, kind="hidden", k=64, number=number)
    hidden = np.random.default_rng(1).normal(size=(20, 64)).astype(np.float32)
    records = logits.hidden_records(spec, hidden)
    assert records.shape == (20, spec.record)
    back = logits.read_hidden(spec, records)
    assert np.abs(back - hidden).max() <= limit * np.abs(hidden).max()
    if number == "bfloat16":
        assert (back == torch.from_numpy(hidden).bfloat16().float().numpy()).all()
    with pytest.raises(ValueError, match="not finite"):
        logits.hidden_records(spec, hidden * np.inf)


@pytest.mark.parametrize(("vocab", "limit"), [(151_936, 138), (129_280, 134), (32_768, 126)])
def test_bytes_a_token_measured_on_disk(tmp_path: Path, vocab: int, limit: int) -> None:
    """k = 32, answers of 200 tokens: everything on disk over the tokens kept."""
    spec = replace(SPEC, vocab=vocab)
    writer = LogitsWriter(tmp_path, spec)
    ids, logp, tail = _topk(200, spec)
    for key in range(40):
        writer.append(key, logits.topk_records(spec, ids, logp, tail))
    writer.close()
    store = LogitsStore(tmp_path)
    assert spec.record == limit and store.tokens == 8000
    assert limit < store.nbytes / store.tokens < limit + 0.3 < 150


def test_sequences_are_found_whatever_the_order(tmp_path: Path) -> None:
    writer = LogitsWriter(tmp_path, SPEC, shard_tokens=7)
    kept = {}
    for key, n in enumerate((3, 5, 1, 9, 4)):
        kept[key] = logits.topk_records(SPEC, *_topk(n, seed=key))
        writer.append(key, kept[key])
    writer.close()
    store = LogitsStore(tmp_path)
    wanted = [4, 0, 3]
    tokens = np.concatenate([np.arange(n) + first for first, n in map(store.find, wanted)])
    assert (store.records(tokens) == np.concatenate([kept[key] for key in wanted])).all()
    with pytest.raises(KeyError):
        store.find(99)


def test_a_key_is_of_ids_and_targets() -> None:
    keys = {logits.sequence_key([1, 2, 3], w) for w in ([0, 1, 1], [0, 0, 1])} | {
        logits.sequence_key([1, 2, 4], [0, 1, 1])
    }
    assert len(keys) == 3 and logits.sequence_key((1, 2, 3), (0.0, 0.5, 2.0)) in keys


CHILD = """
import sys, numpy as np
from shoestring.data import logits
from shoestring.data.logits import LogitsWriter, Spec
spec = Spec("topk", vocab=1000, k=4, temperature=1.0, teacher="t", tokenizer="k")
writer = LogitsWriter(sys.argv[1], spec, shard_tokens=50)
for key in range(writer.sequences, 400):
    rng = np.random.default_rng(key)
    ids = np.stack([rng.choice(1000, 4, replace=False) for _ in range(5)])
    writer.append(key, logits.topk_records(spec, ids, -rng.random((5, 4)), -rng.random(5)))
    print(key, flush=True)
writer.close()
"""


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_kill_9_then_the_same_command_ends_with_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD]
    assert subprocess.run([*command, str(tmp_path / "whole")], stdout=subprocess.DEVNULL).returncode == 0
    for stop in (60, 170, 300):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= stop:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
        process.stdout.close()
    (tmp_path / "killed" / "shard-00777.bin").write_bytes(b"renamed, but not named before the kill")
    with pytest.raises(UserError, match="unfinished"):
        LogitsStore(tmp_path / "killed")
    assert subprocess.run([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL).returncode == 0
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


def _made(folder: Path, spec: Spec = SPEC) -> Path:
    writer = LogitsWriter(folder, spec)
    writer.append(1, logits.topk_records(spec, *_topk(3, spec)))
    writer.close()
    return folder


def test_damage_and_mismatch_are_said(tmp_path: Path) -> None:
    folder = _made(tmp_path / "a")
    store = LogitsStore(folder)
    store.expect(tokenizer="k", temperature=1.0, teacher="t")
    with pytest.raises(UserError, match="universal_logit"):
        store.expect(tokenizer="other", temperature=1.0)
    with pytest.raises(UserError, match="teacher t, not of x"):
        store.expect(tokenizer="k", temperature=1.0, teacher="x")
    with pytest.raises(UserError, match="temperature 1 and cannot be used at 2"):
        store.expect(tokenizer="k", temperature=2.0)
    with pytest.raises(UserError, match="finished"):
        LogitsWriter(folder, SPEC)
    data = bytearray((folder / "shard-00000.bin").read_bytes())
    data[5] ^= 1
    (folder / "shard-00000.bin").write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        LogitsStore(folder)
    (folder / "shard-00000.bin").unlink()
    with pytest.raises(UserError, match="missing"):
        LogitsStore(folder)
    with pytest.raises(UserError, match="no logits store"):
        LogitsStore(tmp_path / "nowhere")


def test_a_damaged_head_or_index_is_said(tmp_path: Path) -> None:
    """A flipped bit in the head would be learnt from like any other number."""
    spec = replace(SPEC, kind="hidden", k=8)
    writer = LogitsWriter(tmp_path, spec)
    head = tmp_path / logits.HEAD
    head.write_bytes(bytes(range(200)))
    writer.append(1, logits.hidden_records(spec, np.ones((3, 8), np.float32)))
    writer.close()
    assert LogitsStore(tmp_path).tokens == 3
    head.write_bytes(bytes(range(199)) + b"x")
    with pytest.raises(UserError, match="checksum"):
        LogitsStore(tmp_path)
    head.unlink()
    with pytest.raises(UserError, match="missing"):
        LogitsStore(tmp_path)
    for text, words in (("[]", "schema None"), ('{"schema": 1, "complete": true}', 'lacks "spec"')):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(UserError, match=words):
            LogitsStore(tmp_path)
