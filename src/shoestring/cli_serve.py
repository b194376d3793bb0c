"""`serve` and `keys`: models behind an OpenAI-compatible API with a chat page, and who may ask them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoestring.cli_options import RESULTS, Json, described, emit_json, print_table
from shoestring.core.errors import UserError

STORE = Path("shoestring-keys.db")
Store = Annotated[str, typer.Option(help="SQLite file (or database URL) with keys and usage.", metavar="FILE|URL")]
NEEDED = "serving needs more packages; pip install 'shoestring[serve]'."


def register(app: typer.Typer) -> None:
    """Add `serve` and `keys`."""
    text = described(
        "Serve models: an OpenAI-compatible API, metrics, and a chat page.",
        "shoestring serve runs/rl-mine-0123",
        "shoestring serve teacher=runs/rl-mine student=runs/distill-mine --store keys.db --price 0.27,0.07,1.10",
        "shoestring serve --upstream http://localhost:8001/v1 --store keys.db --require-keys",
    )
    app.command("serve", help=text, rich_help_panel=RESULTS)(serve)
    keys = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    for name, function, summary, examples in (
        ("create", create, "Make a key; it is shown once.", ("shoestring keys create ann --rpm 60 --credit 5",)),
        ("list", list_keys, "Keys, their limits and what they spent.", ("shoestring keys list --json",)),
        ("set", set_key, "Change a key's limits, block or unblock it.", ("shoestring keys set ann --tpm 100000",)),
        ("credit", credit, "Top a key up.", ("shoestring keys credit ann 10",)),
        ("revoke", revoke, "Revoke a key for good.", ("shoestring keys revoke ann",)),
        ("usage", usage, "Requests, tokens and dollars by key and model.", ("shoestring keys usage --days 7",)),
    ):
        keys.command(name, help=described(summary, *examples))(function)
    text = described(
        "Keys for the API: make, list, limit, top up, revoke; and what they used.",
        "shoestring keys create ann --rpm 60 --credit 5 --store keys.db",
        "shoestring keys usage --store keys.db --json",
    )
    app.add_typer(keys, name="keys", help=text, rich_help_panel=RESULTS)


def serve(
    models: Annotated[list[str] | None, typer.Argument(help="Runs, checkpoints or ids; or NAME=PATH.")] = None,
    upstream: Annotated[str | None, typer.Option(help="Another provider's address, ending in /v1.")] = None,
    upstream_key_file: Annotated[Path | None, typer.Option(help="A file that holds the key to send to it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    store: Annotated[str | None, typer.Option(help="Keys and usage: a SQLite file or a database URL.")] = None,
    require_keys: Annotated[bool, typer.Option("--require-keys", help="Refuse who has no key.")] = False,
    audit: Annotated[str | None, typer.Option(help="Append one JSON line a call to this file (no texts).")] = None,
    hook: Annotated[list[str] | None, typer.Option(help="A Python file: before(call), after(call, outcome).")] = None,
    cors: Annotated[list[str] | None, typer.Option(help="An origin whose pages may call the API.")] = None,
    price: Annotated[str, typer.Option(help="Dollars a million tokens: prompt,cached,completion.")] = "0,0,0",
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    threads: Annotated[int, typer.Option(help="Of each engine; 0 shares the machine's cores.")] = 0,
    tls_cert: Annotated[str | None, typer.Option(help="Certificate file (PEM).")] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its key file (PEM).")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE: any other setting.")] = None,
) -> int:  # fmt: skip
    """Serve until interrupted."""
    try:
        from shoestring.serve.run import serve as start
        from shoestring.serve.settings import ModelSpec, ServeConfig, UpstreamSpec
    except ImportError as error:
        raise UserError(f"{NEEDED} ({error.name} is missing)") from None
    prices = _prices(price)
    specs = tuple(
        ModelSpec(name=name, path=path, dtype=dtype, device=device, threads=threads, **prices)
        for name, path in map(_named, models or [])
    )
    other = None
    if upstream is not None:
        key = _key_in(upstream_key_file) if upstream_key_file else None
        other = UpstreamSpec(url=upstream, key=key, **prices)
    config = ServeConfig(
        models=specs, upstream=other, host=host, port=port, store=store, require_keys=require_keys, audit=audit,
        hooks=tuple(hook or ()), cors=tuple(cors or ()), tls_cert=tls_cert, tls_key=tls_key,
    )  # fmt: skip
    return start(config.with_sets(sets) if sets else config)


def _named(model: str) -> tuple[str, str]:
    """("teacher", "runs/x") of teacher=runs/x; else the folder's own name."""
    name, mark, path = model.partition("=")
    if mark and "/" not in name and name:
        return name, path
    return Path(model).resolve().name if Path(model).exists() else model, model


def _prices(text: str) -> dict[str, Any]:
    names = ("usd_per_million_prompt", "usd_per_million_cached", "usd_per_million_completion")
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 3:
        raise UserError(f'--price is "{text}"; give three numbers: prompt,cached,completion.')
    return dict(zip(names, values, strict=True))


def _key_in(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError as error:
        raise UserError(f"the key file {path} cannot be read: {error.strerror}.") from error


def _store(where: str, *, create: bool = False) -> Any:
    try:
        from shoestring.serve.keys import KeyStore
    except ImportError as error:
        raise UserError(f"{NEEDED} ({error.name} is missing)") from None
    return KeyStore(where, create=create)


def _limits(**values: Any) -> dict[str, Any]:
    """What was given; models as a list."""
    found = {name: value for name, value in values.items() if value is not None}
    flags = {name: found.pop(name) for name in ("logprobs", "max_n", "distillation") if name in found}
    if "models" in found:
        found["models"] = [name.strip() for name in found["models"].split(",")]
    return found | ({"flags": flags} if flags else {})


Name = Annotated[str, typer.Argument(help="The key's name or id.")]
Rpm = Annotated[int | None, typer.Option(help="Requests a minute.")]
Tpm = Annotated[int | None, typer.Option(help="Tokens a minute, prompt and answer.")]
Concurrency = Annotated[int | None, typer.Option(help="Requests at once.")]
Daily = Annotated[int | None, typer.Option(help="Tokens a day (UTC).")]
Models = Annotated[str | None, typer.Option(help="Only these models, separated by commas.")]
Owner = Annotated[str | None, typer.Option(help="Whose key it is.")]
Org = Annotated[str | None, typer.Option(help="Of which organisation.")]
Logprobs = Annotated[bool | None, typer.Option(help="May it ask for logprobs?")]
MaxN = Annotated[int | None, typer.Option(help="Largest n it may ask for.")]
Distillation = Annotated[bool | None, typer.Option(help="May answers be used to train other models?")]


def create(
    name: Name, credit: Annotated[float | None, typer.Option(help="Dollars it may spend.")] = None, rpm: Rpm = None,
    tpm: Tpm = None, concurrency: Concurrency = None, daily_tokens: Daily = None, models: Models = None,
    owner: Owner = None, org: Org = None, logprobs: Logprobs = None, max_n: MaxN = None,
    distillation: Distillation = None, store: Store = str(STORE), json: Json = False,
) -> None:  # fmt: skip
    """Make a key and print it, once."""
    limits = _limits(
        credit_usd=credit, rpm=rpm, tpm=tpm, concurrency=concurrency, daily_tokens=daily_tokens, models=models,
        owner=owner, org=org, logprobs=logprobs, max_n=max_n, distillation=distillation,
    )  # fmt: skip
    secret, key = _store(store, create=True).create(name, **limits)
    if json:
        emit_json(key.public() | {"key": secret})
    else:
        print(secret)
        typer.echo("Kept is only its hash: store it now, it is not shown again.", err=True)


def list_keys(store: Store = str(STORE), json: Json = False) -> None:
    """All keys."""
    keys = _store(store).all()
    if json:
        emit_json([key.public() for key in keys])
        return
    if keys:
        print_table([_row(key) for key in keys])
    else:
        print("There are no keys; `shoestring keys create NAME` makes one.")


def _row(key: Any) -> dict[str, Any]:
    state = "revoked" if key.revoked else f"blocked: {key.blocked}" if key.blocked else "good"
    return {
        "name": key.name, "key": f"{key.shown}…", "owner": key.owner, "state": state, "rpm": key.rpm, "tpm": key.tpm,
        "at once": key.concurrency, "tokens/day": key.daily_tokens, "credit usd": key.credit_usd,
        "spent usd": key.spent_usd, "models": ", ".join(key.models or ["all"]),
    }  # fmt: skip


def set_key(
    name: Name, rpm: Rpm = None, tpm: Tpm = None, concurrency: Concurrency = None, daily_tokens: Daily = None,
    models: Models = None, owner: Owner = None, org: Org = None, logprobs: Logprobs = None, max_n: MaxN = None,
    distillation: Distillation = None, block: Annotated[str | None, typer.Option(help="Block it, saying why.")] = None,
    unblock: Annotated[bool, typer.Option("--unblock", help="Let it in again.")] = False, store: Store = str(STORE),
    json: Json = False,
) -> None:  # fmt: skip
    """Change what is given; the rest stays."""
    keys = _store(store)
    changes = _limits(
        rpm=rpm, tpm=tpm, concurrency=concurrency, daily_tokens=daily_tokens, models=models, owner=owner, org=org,
        logprobs=logprobs, max_n=max_n, distillation=distillation, blocked=block,
    )  # fmt: skip
    if unblock:
        changes["blocked"] = None
    if "flags" in changes:
        changes["flags"] = {**(keys.find(name).flags or {}), **changes["flags"]}
    if not changes:
        raise UserError("there is nothing to change; give a limit, --block or --unblock.")
    _show(keys.change(name, **changes), json)


def credit(
    name: Name,
    usd: Annotated[float, typer.Argument(help="Dollars to add.")],
    store: Store = str(STORE),
    json: Json = False,
) -> None:
    """Top up."""
    _show(_store(store).add_credit(name, usd), json)


def revoke(name: Name, store: Store = str(STORE), json: Json = False) -> None:
    """For good."""
    _show(_store(store).revoke(name), json)


def _show(key: Any, json: bool) -> None:
    if json:
        emit_json(key.public())
    else:
        print_table([_row(key)])


def usage(
    days: Annotated[float | None, typer.Option(help="Of the last so many days; all time by default.")] = None,
    store: Store = str(STORE), json: Json = False,
) -> None:  # fmt: skip
    """What was used."""
    import time

    rows = _store(store).totals(time.time() - 86400 * days if days else 0.0)
    if json:
        emit_json(rows)
    elif rows:
        print_table([{**row, "key": row["key"] or "(none)"} for row in rows])
    else:
        print("Nothing was asked" + (f" in the last {days:g} days." if days else "."))
