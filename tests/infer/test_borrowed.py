"""Models of transformers behind the generator's contract: the engine's draws, harmless padding, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.contracts import Generator
from shoestring.core.errors import UserError
from shoestring.core.nouns import Sampling
from shoestring.infer.borrowed import ROWS, BorrowedGenerator
from shoestring.infer.engine import Engine
from shoestring.infer.generator import generator_of
from shoestring.models import any as any_model
from shoestring.models import checkpoint
from shoestring.models.dense import Dense, DenseConfig
from shoestring.nn.kernels import Kernels
from shoestring.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

VOCAB = 64
PROMPTS = [[5, 6, 7], [9], [11, 3, 8, 20, 33, 2, 41], [5, 6], [17, 4, 4, 12, 60]]
TINY = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def _theirs(folder: Path, kind: str) -> BorrowedGenerator:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model, _ = checkpoint.load(folder)
    return BorrowedGenerator(model)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, BorrowedGenerator]:
    """A Llama, once in the engine and once behind transformers."""
    config = DenseConfig(
        model_type="llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model = Dense(config, generator=torch.Generator().manual_seed(3))
    folder = checkpoint.save(model, None, tmp_path_factory.mktemp("llama") / "m")
    return Engine(model), BorrowedGenerator(any_model.load(folder, dtype=torch.float32, device=None))


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0, "stop_ids": (3, 7)},
        {"n": 3, "stop_ids": (1, 9, 30)},
        {"temperature": 0.6, "top_k": 5},
        {"top_p": 0.7, "min_p": 0.02, "n": 2},
        {"min_new_tokens": 6, "stop_ids": tuple(range(0, 60, 2))},
        {"logit_bias": {5: float("-inf"), 6: 4.0, 40: -2.0}},
    ],
    ids=str,
)
def test_the_same_tokens_as_the_engine(pair: tuple[Engine, BorrowedGenerator], given: dict[str, Any]) -> None:
    engine, borrowed = pair
    sampling = Sampling(**{"seed": 7, "max_new_tokens": 12, **given})
    for ours, theirs in zip(engine.generate(PROMPTS, sampling), borrowed.generate(PROMPTS, sampling), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
            assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
    assert any(len(c.token_ids) > 3 for group in borrowed.generate(PROMPTS, sampling) for c in group)


@pytest.mark.parametrize("kind", ["gpt_neox", "olmo2", "mistral", "mamba", "rwkv"])
def test_padding_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Greedy in a batch padded on the left against transformers' generate, each prompt alone; samples likewise."""
    borrowed = _theirs(tmp_path, kind)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt, (completion,) in zip(
        PROMPTS, borrowed.generate(PROMPTS, Sampling(temperature=0.0, max_new_tokens=10, stop_ids=(1,))), strict=True
    ):
        wanted = alone.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=1)
        assert completion.token_ids == wanted[0, len(prompt) :].tolist()
    sampling = Sampling(seed=4, max_new_tokens=10, n=2)
    together = borrowed.generate(PROMPTS, sampling)
    assert together == borrowed.generate(PROMPTS, sampling)
    assert together != borrowed.generate(PROMPTS, Sampling(seed=5, max_new_tokens=10, n=2))
    assert borrowed.generate(PROMPTS[:1], sampling)[0][1].token_ids == together[0][1].token_ids
    assert len({tuple(group[0].token_ids) for group in borrowed.generate([[5]] * 4, sampling)}) == 4
    for prompt, group in zip(PROMPTS, together, strict=True):
        for completion in group:
            scored = borrowed.score([[*prompt, *completion.token_ids]])[0]
            assert completion.logprobs == pytest.approx(scored[len(prompt) - 1 :], abs=1e-4)


def test_more_rows_than_one_call_holds(pair: tuple[Engine, BorrowedGenerator]) -> None:
    engine, borrowed = pair
    prompts = [[i % VOCAB] * (1 + i % 5) for i in range(ROWS + 9)]
    sampling = Sampling(seed=1, max_new_tokens=4)
    got = [group[0].token_ids for group in borrowed.generate(prompts, sampling)]
    assert got == [group[0].token_ids for group in engine.generate(prompts, sampling)]


def test_a_checkpoints_own_settings_do_not_join_in(tmp_path: Path) -> None:
    borrowed = _theirs(tmp_path, "olmo2")
    sampling = Sampling(seed=2, max_new_tokens=8)
    plain = borrowed.generate(PROMPTS, sampling)
    own = transformers.GenerationConfig(
        repetition_penalty=9.0, temperature=0.01, do_sample=True, max_length=3, no_repeat_ngram_size=1,
        suppress_tokens=[plain[0][0].token_ids[0]],
    )  # fmt: skip
    borrowed.model.hf.generation_config = own
    borrowed.model.hf.train()
    assert borrowed.generate(PROMPTS, sampling) == plain
    assert borrowed.model.hf.generation_config is own and borrowed.model.hf.training


def test_the_tokenizer_says_where_it_ends_and_what_it_says(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["0123456789 abc"], 256)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("olmo2", **TINY | {"vocab_size": tokenizer.vocab_size})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model, _ = checkpoint.load(tmp_path)
    borrowed = generator_of(model, tokenizer)
    assert isinstance(borrowed, BorrowedGenerator) and isinstance(borrowed, Generator)
    sure = {tokenizer.end: 50.0}
    ((ended,), (went_on,)) = (
        borrowed.generate([[5, 6]], Sampling(seed=0, max_new_tokens=5, logit_bias=sure, ignore_eos=ignored))[0]
        for ignored in (False, True)
    )
    assert ended.token_ids == [tokenizer.end] and ended.text == "" and ended.finish_reason == "stop"
    assert len(went_on.token_ids) == 5 and went_on.finish_reason == "length"
    ((said,),) = borrowed.generate([[5, 6]], Sampling(seed=0, max_new_tokens=5, logit_bias={tokenizer.end: -1e9}))
    assert said.text == tokenizer.decode(said.token_ids)


def test_bf16_and_new_weights(tmp_path: Path) -> None:
    borrowed = _theirs(tmp_path / "a", "olmo2")
    sampling = Sampling(seed=2, max_new_tokens=8)
    before = borrowed.generate(PROMPTS, sampling)
    model = borrowed.model
    model.kernels = Kernels(dtype="bfloat16")
    rounded = borrowed.generate(PROMPTS, sampling)
    apart = [
        a - b for x, y in zip(before, rounded, strict=True) for a, b in zip(x[0].logprobs, y[0].logprobs, strict=False)
    ]
    assert 0 < max(map(abs, apart[:1])) < 0.2
    model.kernels = Kernels(dtype="float32")
    with torch.no_grad():
        model.head_weight.mul_(-1)
    borrowed.update_weights(model)
    assert borrowed.generate(PROMPTS, sampling) != before


@pytest.mark.parametrize(
    ("prompts", "given", "words"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[5], [VOCAB]], {}, "outside the model's vocabulary"),
        ([[5] * 60], {}, "64 positions"),
        ([[5]], {"stop": ("x",)}, "sampling.stop is not followed"),
        ([[5]], {"regex": "[0-9]"}, "sampling.regex is not followed"),
        ([[5]], {"repetition_penalty": 2.0}, "repetition_penalty is not followed"),
        ([[5]], {"stop_ids": (99,)}, "token id 99"),
    ],
)
def test_what_cannot_be_done_is_said(
    prompts: list[list[int]], given: dict[str, Any], words: str, pair: tuple[Engine, BorrowedGenerator]
) -> None:
    with pytest.raises(UserError, match=words):
        pair[1].generate(prompts, Sampling(**{"max_new_tokens": 8, **given}))


def test_the_engine_refuses_and_says_who_samples_it(pair: tuple[Engine, BorrowedGenerator]) -> None:
    with pytest.raises(UserError, match="not sampled by this engine"):
        Engine(pair[1].model)


def test_nan_is_not_sampled(tmp_path: Path) -> None:
    borrowed = _theirs(tmp_path, "olmo2")
    with torch.no_grad():
        borrowed.model.head_weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        borrowed.generate(PROMPTS, Sampling(max_new_tokens=3))
