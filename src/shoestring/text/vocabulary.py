"""Learn a byte-level vocabulary: whole words where they all fit, byte-pair merges where they do not.

The base alphabet is the 243 bytes that valid UTF-8 can contain (0xC0, 0xC1 and 0xF5-0xFF never occur), so any text
round-trips and nothing is ever unknown. Byte-pair encoding (arXiv 1508.07909) reaches a word of seven letters through
up to six intermediate tokens; a vocabulary of a few hundred would be spent on those. So when every distinct
pre-token of the texts fits, the words themselves become the vocabulary and need no merges: `ignore_merges` of
`tokenizers` looks a pre-token up whole before it spells it.

Left out: unigram and WordPiece models; normalisation (it would not round-trip); several digits in one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from shoestring.core.errors import UserError, did_you_mean

# One leading space belongs to the word, digit or sign after it, so " word" costs one token. Digits stand alone.
SPLITS = {
    "words": r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Prose and code: a sign may lead a word ("(x", ".join"), line ends gather what stands around them.
    "text": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_SPACE = "Ġ"  # byte stand-in of a space
_WHITE = ("Ġ", "Ċ", "č", "ĉ")  # of space, line feed, carriage return, tab
NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def byte_alphabet() -> list[str]:
    """The printable stand-ins (GPT-2's table) of the 243 bytes that UTF-8 uses, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256) if byte not in NEVER_IN_UTF8]


def learn(texts: Iterable[str], vocab_size: int, *, split: str, specials: dict[str, bool]) -> Tokenizer:
    """A `tokenizers.Tokenizer` of at most `vocab_size` tokens; `specials` maps a token to its special flag.

    Specials come first (ids 0, 1, ...), then bytes, then words or merges.
    """
    if split not in SPLITS:
        raise UserError(f'unknown split "{split}" for the tokenizer.{did_you_mean(split, SPLITS)}')
    base = [*specials, *byte_alphabet()]
    if vocab_size < len(base):
        raise UserError(
            f"vocab_size {vocab_size} is too small: {len(specials)} special tokens and {len(base) - len(specials)} "
            f"bytes need {len(base)}; set it to {len(base)} or more."
        )
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    stream = iter(texts)
    read, counts = _read_words(pre_tokenizer, stream, limit=vocab_size)
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    if len(base) + len(words) <= vocab_size:
        # Room left goes to the form that a word seen only at the start of texts takes after a space.
        spaced = [_SPACE + word for word in sorted(counts, key=lambda word: (-counts[word], word))]
        spaced = [word for word in spaced if word not in counts and not word[1:].startswith(_WHITE)]
        vocab = {token: index for index, token in enumerate([*base, *words, *spaced][:vocab_size])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
        tokenizer.pre_tokenizer = pre_tokenizer
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(specials), initial_alphabet=byte_alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(chain(read, stream), trainer=trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in specials.items()])
    return tokenizer


def _read_words(
    pre_tokenizer: pre_tokenizers.PreTokenizer, stream: Iterator[str], *, limit: int
) -> tuple[list[str], Counter[str]]:
    """The texts read and how often each pre-token (in byte stand-ins) occurs; stops at more than `limit` of them."""
    read: list[str] = []
    counts: Counter[str] = Counter()
    for text in stream:
        read.append(text)
        counts.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
        if len(counts) > limit:
            break
    if not counts:
        raise UserError("no text to train a tokenizer on; pass at least one non-empty text.")
    return read, counts
