"""The tokenizer: round trips, whole words in tiny vocabularies, specials never parsed from user text, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UserError
from shoestring.text.tokenizer import SPECIALS, Tokenizer
from shoestring.text.vocabulary import byte_alphabet

TEXTS = ["A is honest . B says A lies .", "last digit of 3 + 8 + 4 ? def f(x): return (2*x+1)%10", "0 1 2 5 6 7 9"]
PROSE = ["the cat sat on the mat, and the other thesis didn't.\n", "if (x): return self.value\n" * 3] * 50


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def merges() -> Tokenizer:
    return Tokenizer.train(PROSE, 265, split="text")


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_round_trips_with_words(words: Tokenizer, text: str) -> None:
    assert words.decode(words.encode(text)) == text


@given(st.text() | st.sampled_from([*SPECIALS, "<|end", "\r\n\t \u3000", "🧮é" * 3]))
@settings(max_examples=100, deadline=None)
def test_any_text_round_trips_with_merges(merges: Tokenizer, text: str) -> None:
    assert merges.decode(merges.encode(text)) == text


def test_characters_of_all_planes_round_trip(words: Tokenizer) -> None:
    codes = [*range(0x3000), *range(0x3000, 0x110000, 61)]
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    assert words.decode(words.encode(text)) == text


def test_the_alphabet_is_the_bytes_of_utf8() -> None:
    assert len(byte_alphabet()) == 243
    assert len(set(byte_alphabet())) == 243


def test_a_word_of_a_tiny_vocabulary_is_one_token(words: Tokenizer) -> None:
    text = "is honest . B says A lies . last digit of 3 + 8 + 4 ?"
    assert len(words.encode(" " + text)) == len(text.split())
    assert words.vocab_size <= 320  # 8 specials, 243 bytes, the words: no token spent on parts of words


def test_a_word_seen_only_at_the_start_has_its_form_after_a_space(words: Tokenizer) -> None:
    assert [words.decode([i]) for i in words.encode("last last")] == ["last", " last"]


def test_digits_stand_alone(words: Tokenizer, merges: Tokenizer) -> None:
    for tokenizer in (words, merges):
        assert [tokenizer.decode([i]) for i in tokenizer.encode("x123")] == ["x", "1", "2", "3"]
    big = Tokenizer.train(["12345 12345 99 99"] * 100, 600)
    assert [big.decode([i]) for i in big.encode(" 123")] == [" 1", "2", "3"]


def test_merges_when_the_words_do_not_fit(merges: Tokenizer) -> None:
    assert merges.vocab_size == 265
    assert len(merges.encode("the thesis")) < len("the thesis")


@pytest.mark.parametrize("split", ["words", "text"])
def test_training_repeats_and_ignores_the_order_of_texts(split: str) -> None:
    one, two = Tokenizer.train(PROSE, 265, split=split), Tokenizer.train(PROSE[::-1], 265, split=split)
    assert one._full.to_str() == two._full.to_str()


@pytest.mark.parametrize("special", SPECIALS)
def test_specials_typed_by_a_user_are_text(words: Tokenizer, special: str) -> None:
    ids = words.encode(f"x {special} y")
    assert not set(ids) & set(words.specials.values())
    assert words.decode(ids) == f"x {special} y"
    assert words.encode(special, specials=True) == [words.id_of(special)]


def test_ids_of_specials_come_first(words: Tokenizer) -> None:
    assert [words.id_of(token) for token in SPECIALS] == list(range(8))
    assert (words.begin_id, words.end_id, words.pad_id) == (0, 1, 2)


def test_decode_without_specials_keeps_thinking_tags(words: Tokenizer) -> None:
    ids = words.encode("<|assistant|><think>3</think>7<|end|>", specials=True)
    assert words.decode(ids, specials=False) == "<think>3</think>7"
    assert words.decode(ids) == "<|assistant|><think>3</think>7<|end|>"


def test_saved_and_loaded_again_is_the_same(words: Tokenizer, tmp_path: Path) -> None:
    words.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode("A lies . 12 é") == words.encode("A lies . 12 é")
    assert (again.specials, again.chat_template, again.end_id) == (words.specials, words.chat_template, words.end_id)
    assert again.config == words.config


@pytest.mark.parametrize("trusting", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "deepseek_v3"])
def test_beside_a_model_transformers_reads_the_same_tokens(
    family: str, trusting: bool, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives some families a split of its own."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    words.save(tmp_path, model_type=family)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trusting)
    for text in [*TEXTS, "What is 17 + 25 ?"]:
        assert theirs.encode(text, add_special_tokens=False) == words.encode(text)
    again = Tokenizer.load(tmp_path)
    again.save(tmp_path / "other", model_type="llama")
    assert "auto_map" not in json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())


def test_transformers_reads_the_same_tokens(words: Tokenizer, merges: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for tokenizer, texts in ((words, TEXTS), (merges, PROSE[:2])):
        tokenizer.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in [*texts, "  naïve\n\n 世界 \t12", ""]:
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text
        assert len(theirs) == tokenizer.vocab_size
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
        ids = tokenizer.encode("<think>3</think>7<|end|>", specials=True)
        assert theirs.encode("<think>3</think>7<|end|>", add_special_tokens=False) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == "<think>3</think>7"


def test_what_transformers_saves_we_read(words: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words.save(tmp_path / "ours")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert again.chat_template == words.chat_template
    assert (again.begin_id, again.end_id, again.pad_id, again.specials) == (0, 1, 2, words.specials)
    assert again.encode(TEXTS[0]) == words.encode(TEXTS[0])


def test_the_template_in_the_config_is_found_when_it_has_no_file(words: Tokenizer, tmp_path: Path) -> None:
    words.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.load(tmp_path).chat_template == words.chat_template
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).chat_template == "y"


def test_check_vocab(words: Tokenizer) -> None:
    words.check_vocab(words.vocab_size)
    words.check_vocab(words.vocab_size + 64)  # padded, as published models are
    with pytest.raises(UserError, match="do not belong together"):
        words.check_vocab(words.vocab_size - 1)


def test_mistakes_get_one_sentence(words: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set it to 251 or more"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(UserError, match='Did you mean "words"'):
        Tokenizer.train(TEXTS, 400, split="word")
    with pytest.raises(UserError, match="no text"):
        Tokenizer.train([], 400)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="surrogates"):
        words.encode("\ud800")
    with pytest.raises(UserError, match="no token"):
        words.id_of("<|nope|>")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(UserError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)
    words.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(UserError, match="not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match="JSON object"):
        Tokenizer.load(tmp_path)
