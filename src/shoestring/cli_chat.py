"""`chat`: talk to a model in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoestring.cli_options import RESULTS, described
from shoestring.core.errors import UserError

if TYPE_CHECKING:
    from shoestring.core.nouns import Sampling
    from shoestring.infer.engine import Engine


def register(app: typer.Typer) -> None:
    """Add `chat`."""
    text = described(
        "Talk to a model in the terminal. /new begins anew, Ctrl-D ends.",
        "shoestring chat runs/rl-mine-0123",
        "shoestring chat some/hf-folder --temperature 0 --system 'Answer briefly.'",
    )
    app.command("chat", help=text, rich_help_panel=RESULTS)(chat)


def chat(
    model: Annotated[str, typer.Argument(help="A run directory, a checkpoint folder, or a model id.")],
    system: Annotated[str | None, typer.Option(help="What the system turn says.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Make the draw repeatable.")] = None,
) -> None:
    """Read a line, answer it, and remember both."""
    from shoestring.core.nouns import Sampling
    from shoestring.infer.engine import Engine
    from shoestring.models.checkpoint import load
    from shoestring.text.chat import render_turns, split_thinking, whole_answer

    network, tokenizer = load(weights_of(model))
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer.json; a chat needs the model's tokenizer beside its weights.")
    engine = Engine(network, tokenizer)
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    opening = [{"role": "system", "content": system}] if system else []
    turns = list(opening)
    while (line := _line()) is not None:
        if line.strip() == "/new":
            turns = list(opening)
            continue
        if not line.strip():
            continue
        turns.append({"role": "user", "content": line.strip()})
        prompt = render_turns(turns, tokenizer)
        text = _speak(engine, prompt, sampling)
        _, answer = split_thinking(whole_answer(text, prompt, tokenizer))
        turns.append({"role": "assistant", "content": answer or text})  # thoughts are not remembered


def _speak(engine: Engine, prompt: list[int], sampling: Sampling) -> str:
    """Print the answer while it comes, its thinking dimmed, and return it; Ctrl-C ends it early."""
    text = ""
    name = engine.add(prompt, sampling)
    while engine.has_work:
        try:
            events = engine.step()
        except KeyboardInterrupt:
            engine.cancel(name)
            continue
        for event in events:
            text += event.text
            thinks = text.startswith("<think>") and "</think>" not in text
            shown = event.text.replace("<think>", "").replace("</think>", "\n")
            typer.secho(shown, dim=thinks, nl=False)
    print(flush=True)
    return text


def weights_of(model: str) -> str:
    """The last checkpoint of a run directory; anything else as it is given."""
    if not (Path(model) / "manifest.json").exists():
        return model
    from shoestring.core.run import Run

    run = Run.load(model)
    latest = run.latest_checkpoint()
    if latest is None:
        raise UserError(f"{model} holds nothing to talk to: it is {run.without_checkpoint()}.")
    return str(latest[1])


def _line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None
