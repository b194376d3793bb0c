"""The tokenizer stage: byte-level BPE learnt from the corpus that will be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from shoestring.data.corpus import file_documents
from shoestring.data.textbook import solved
from shoestring.text.tokenizer import Tokenizer
from shoestring.train.configs import Textbook, TokenizerStage
from shoestring.train.context import Context, Outcome


def run(stage: TokenizerStage, ctx: Context) -> Outcome:
    """Train on the first `documents` documents and save it as checkpoint 0."""
    texts = list(islice(_texts(stage), stage.documents))
    tokenizer = Tokenizer.train(texts, stage.vocab_size)
    ids = sum(len(tokenizer.encode(text)) for text in texts)
    characters = sum(len(text) for text in texts)
    folder = ctx.run.begin_checkpoint(0)
    tokenizer.save(folder)
    path = ctx.run.commit_checkpoint(0)
    ctx.run.note(vocab_size=tokenizer.vocab_size, characters_per_token=characters / max(1, ids))
    metric = {"name": "characters per token", "value": characters / max(1, ids), "stderr": None}
    return Outcome([path], metric, tokens=ids, flops=0.0)


def _texts(stage: TokenizerStage) -> Iterator[str]:
    if not isinstance(stage.corpus, Textbook):
        yield from file_documents(stage.corpus.files)
        return
    for problem, voice in solved(stage.corpus.mix, stage.seed, stage.corpus.long_share):
        solution = problem.voices[voice]
        yield " ".join((problem.prompt, solution.thinking, solution.answer))
