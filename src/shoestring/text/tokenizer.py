"""Text to token ids and back, in the files `transformers` reads.

A Tokenizer holds two matchers over one vocabulary. `encode(text)` uses the one that knows no special tokens: the
string "<|end|>" typed by a user becomes ordinary tokens, never the token that ends a turn. Only `specials=True`,
meant for text the program itself wrote (a chat template), turns special strings into special ids.

Left out: truncation, padding and tensors (callers pack ids themselves), slow tokenizers, SentencePiece files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Matcher

from shoestring.core.errors import UserError
from shoestring.text.chat import DEFAULT_TEMPLATE
from shoestring.text.vocabulary import learn

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
THINK, END_THINK = "<think>", "</think>"
SPECIALS = (BEGIN, END, PAD, "<|user|>", "<|assistant|>", "<|system|>", THINK, END_THINK)
# As in R1's tokenizer the thinking tags are added tokens but not "special": skipping specials keeps them in the text.
_VISIBLE = (THINK, END_THINK)
_NOT_TEXT = "text to encode must be str that UTF-8 can hold (no lone surrogates)."

# transformers 5 takes every tokenizer of a qwen2 model for Qwen2's and splits text its way, whatever tokenizer.json
# says; a class named in auto_map it leaves alone. With trust_remote_code it loads this one, without, its general one.
_GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")
_OWN_MAP = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
_OWN_SPLIT = '''"""This model's text is split as tokenizer.json says, not as Qwen2's tokenizer does."""

from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    """All of it is in tokenizer.json."""
'''


class Tokenizer:
    """A byte-level BPE tokenizer with a chat template.

    Attributes: `vocab_size` (largest id + 1), `begin_id`, `end_id`, `pad_id` (int or None when a foreign tokenizer
    has none), `chat_template` (Jinja source or None), `config` (tokenizer_config.json as a dict).
    """

    def __init__(self, matcher: Matcher, *, config: dict[str, Any], chat_template: str | None) -> None:
        self.config = config
        self.chat_template = chat_template
        self._full = matcher
        self._full.no_truncation()
        self._full.no_padding()
        self.specials = _control_tokens(matcher, chat_template)  # content -> id
        self._plain = _without(matcher, self.specials)
        self.vocab_size = max(matcher.get_vocab(with_added_tokens=True).values()) + 1
        self.begin_id = self._id_in_config("bos_token")
        self.end_id = self._id_in_config("eos_token")
        self.pad_id = self._id_in_config("pad_token")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, split: str = "words") -> Tokenizer:
        """Learn at most `vocab_size` tokens from `texts`; see `text.vocabulary` for `split` and what is learnt."""
        specials = {token: token not in _VISIBLE for token in SPECIALS}
        matcher = learn(texts, vocab_size, split=split, specials=specials)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 10**30,  # what transformers writes for "no limit"
        }
        return cls(matcher, config=config, chat_template=DEFAULT_TEMPLATE)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template from a folder (Hugging Face layout)."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"no tokenizer.json in {folder}; point to a folder saved by shoestring or transformers.")
        try:
            matcher = Matcher.from_file(str(file))
        except Exception as error:  # `tokenizers` raises bare Exception for every malformed file
            raise UserError(f"{file} is not a readable tokenizer ({error}); save or download it again.") from error
        config = _read_config(folder / "tokenizer_config.json")
        template_file = folder / "chat_template.jinja"
        template = template_file.read_text("utf-8") if template_file.is_file() else config.pop("chat_template", None)
        config.pop("chat_template", None)
        if isinstance(template, list):  # several named templates, an older layout
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        return cls(matcher, config=config, chat_template=template)

    def save(self, path: str | Path, *, model_type: str = "") -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja into a folder.

        The template stands both in its own file (read by transformers 5) and in the config (read by older tools).
        Beside a model of `model_type` "qwen2", a tokenizer that is not Qwen's own says so: see `_OWN_SPLIT`.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if (key, value) != ("auto_map", _OWN_MAP)}
        if model_type == "qwen2" and config.get("tokenizer_class") in _GENERAL and "auto_map" not in config:
            config["auto_map"] = _OWN_MAP
            (folder / "tokenization_own.py").write_text(_OWN_SPLIT, "utf-8")
        names = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(key)}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            (folder / "chat_template.jinja").write_text(self.chat_template, "utf-8")
        else:
            (folder / "chat_template.jinja").unlink(missing_ok=True)  # of a tokenizer that was saved here before
        (folder / "tokenizer.json").write_text(self._full.to_str(pretty=True), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2, ensure_ascii=False), "utf-8")

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Token ids of `text`. Special strings in it become special ids only with `specials=True`."""
        try:
            return (self._full if specials else self._plain).encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError(_NOT_TEXT) from error

    def decode(self, ids: Sequence[int], specials: bool = True) -> str:
        """Text of `ids`; with `specials=False` special tokens are left out (thinking tags stay)."""
        return self.decode_batch([ids], specials=specials)[0]

    def decode_batch(self, batch: Sequence[Sequence[int]], specials: bool = True) -> list[str]:
        """`decode` of many sequences at once."""
        return self._full.decode_batch([list(ids) for ids in batch], skip_special_tokens=not specials)

    def id_of(self, token: str) -> int:
        """The id of one token as spelt in the vocabulary ("<|end|>"; ordinary tokens in byte stand-ins)."""
        index = self._full.token_to_id(token)
        if index is None:
            raise UserError(f'the tokenizer has no token "{token}".')
        return index

    def piece(self, index: int) -> str | None:
        """One token as spelt in the vocabulary, the reverse of `id_of`; None for an id without a token."""
        return self._full.id_to_token(index)

    @property
    def end(self) -> int:
        """The id that ends a turn. Raises UserError for a foreign tokenizer that names none."""
        if self.end_id is None:
            raise UserError("the tokenizer names no end-of-turn token; set eos_token in its tokenizer_config.json.")
        return self.end_id

    @property
    def pad(self) -> int:
        """An id to fill rows with; what it is never matters, for filled places carry no weight."""
        return self.end if self.pad_id is None else self.pad_id

    def backend(self) -> str:
        """The contents of tokenizer.json."""
        return str(self._full.to_str())

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token as spelt in the vocabulary, with its id."""
        return dict(self._full.get_vocab(with_added_tokens=True))

    def digest(self) -> str:
        """12 hex digits of what the tokenizer does to text: equal digests give equal ids."""
        return hashlib.sha256(self._full.to_str().encode("utf-8")).hexdigest()[:12]

    def check_vocab(self, model_vocab: int) -> None:
        """Raise UserError when this tokenizer can produce ids that a model of `model_vocab` tokens does not know.

        A larger model vocabulary is fine: published models pad theirs (V3: 129,280 rows for 128,815 tokens).
        """
        if model_vocab < self.vocab_size:
            raise UserError(
                f"the tokenizer has {self.vocab_size} tokens but the model only {model_vocab}; they do not belong "
                f"together: use the tokenizer saved with the model, or a model of vocab_size {self.vocab_size}."
            )

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... by name, as chat templates expect them."""
        names = [key for key in self.config if key.endswith("_token")]
        return {name: token for name in names if (token := _content(self.config[name]))}

    def _id_in_config(self, key: str) -> int | None:
        token = _content(self.config.get(key))
        return None if token is None else self._full.token_to_id(token)


def _content(token: Any) -> str | None:
    """A token in tokenizer_config.json is a string or a serialised AddedToken."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); save or download it again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a JSON object; save or download it again.")
    return config


def _control_tokens(matcher: Matcher, template: str | None) -> dict[str, int]:
    """Added tokens that steer a model: special ones, the thinking tags, and tags the chat template writes.

    Other added tokens (runs of spaces in some vocabularies) are ordinary text and stay matched everywhere.
    """
    control = {}
    for index, token in matcher.get_added_tokens_decoder().items():
        tag = token.content.startswith("<") and token.content.endswith(">") and token.content in (template or "")
        if token.special or token.content in _VISIBLE or tag:
            control[token.content] = index
    return control


def _without(matcher: Matcher, specials: dict[str, int]) -> Matcher:
    """The same tokenizer, blind to `specials`."""
    tree = json.loads(matcher.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in specials]
    tree["post_processor"] = None
    return Matcher.from_str(json.dumps(tree))
