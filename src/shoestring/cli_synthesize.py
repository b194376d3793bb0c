"""`synthesize`: new questions, written by a teacher, for `ask` to put."""

# ruff: noqa: E501 (options, one a line)
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli_options import ROAD, Json, Quiet, described, emit_json, print_table
from shoestring.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from shoestring.curate._sieve import Filter
    from shoestring.curate._synthesis import Ask, Made, Wish
    from shoestring.curate._writing import Pool, Stream


def register(app: typer.Typer) -> None:
    """Add `synthesize`."""
    text = described(
        "Have a teacher write new questions, each with where it is from. Killed, the same command goes on.",
        "shoestring synthesize --method evolve --seeds q.jsonl --count 5000 --teacher https://api.deepseek.com/v1 "
        "--model deepseek-chat --budget 5 --against gsm8k_test.jsonl --out prompts/ --dry-run",
        "shoestring synthesize --method nothing --teacher http://127.0.0.1:8000 --model mine --template mine/ "
        "--count 1000 --out prompts/",
    )
    app.command("synthesize", help=text, rich_help_panel=ROAD)(synthesize)


def synthesize(
    method: Annotated[str, typer.Option(help="self_instruct, evolve, persona, or nothing (the teacher writes the user's turn).")],
    count: Annotated[int, typer.Option(help="Questions wanted.")] = 1000,
    seeds: Annotated[str | None, typer.Option(help="Questions to begin from: a .jsonl, .jsonl.gz or .txt file, a task, or hf:NAME.")] = None,
    seeds_count: Annotated[int | None, typer.Option(help="Seeds at most.")] = None,
    personas: Annotated[Path | None, typer.Option(help='People to ask as: a line each, or .jsonl with "persona". Without: guessed from the seeds.')] = None,
    about: Annotated[str | None, typer.Option(help="What the questions are to be about, in a few words.")] = None,
    teacher: Annotated[str | None, typer.Option(help="An OpenAI-compatible API's address; or a checkpoint, a run, recorded traces.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    teachers: Annotated[Path | None, typer.Option(help="Several teachers: a JSON or YAML list of their options.")] = None,
    template: Annotated[str | None, typer.Option(help="For `nothing`: the folder of the teacher's tokenizer, a run, or chatml, llama3, deepseek.")] = None,
    system: Annotated[str | None, typer.Option(help="For `nothing`: a system prompt before the user's turn, to steer what is asked.")] = None,
    prefix: Annotated[str | None, typer.Option(help="For `nothing`: the text itself that opens the user's turn.")] = None,
    stop: Annotated[str | None, typer.Option(help="With --prefix: what ends the user's turn.")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="Evaluation sets to keep out (adds decontaminate).")] = None,
    filters: Annotated[str | None, typer.Option(help="curate's, in order. Usually: refused,one_language,repeated,dedup,near_duplicates.")] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="FILTER.OPTION=VALUE", help="An option of a filter.")] = None,
    fewest_words: Annotated[int, typer.Option(help="Words of a question at least.")] = 3,
    most_words: Annotated[int, typer.Option(help="Words of a question at most.")] = 1000,
    judge: Annotated[bool, typer.Option("--judge", help="For `evolve`: the teacher judges whether a new question asks something else, and can be answered.")] = False,
    out: Annotated[Path, typer.Option(help="The folder of the store and of questions.jsonl.")] = Path("prompts"),
    budget: Annotated[str | None, typer.Option(help="Dollars this store may ever cost.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="Tokens in and out it may ever take.")] = None,
    budget_answers: Annotated[int | None, typer.Option(help="Answers it may ever hold.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most, reasoning included.")] = 2048,
    temperature: Annotated[float, typer.Option(help="Of decoding.")] = 1.0,
    top_p: Annotated[float | None, typer.Option(help="Of decoding.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn for the requests, and of decoding where the API has seeds.")] = 0,
    extra: Annotated[str | None, typer.Option(help="More of the request's body, as a JSON object.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once, at most.")] = 64,
    rpm: Annotated[float, typer.Option(help="Requests a minute, at most; 0: no limit.")] = 0,
    tpm: Annotated[float, typer.Option(help="Tokens a minute, at most; 0: no limit.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds of one request.")] = 1800.0,
    patience: Annotated[float, typer.Option(help="Seconds to wait for a server that went away.")] = 600.0,
    tries: Annotated[int, typer.Option(help="Attempts at a request that fails.")] = 5,
    price: Annotated[str | None, typer.Option(help="IN,OUT[,CACHED] dollars a million tokens, or a row of the list.")] = None,
    key: Annotated[str | None, typer.Option(help="The environment variable that holds the API key.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call the teacher, whatever its address.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of its answers.")] = None,
    i_have_permission: Annotated[str | None, typer.Option(help="What allows training on answers whose terms forbid it.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed for good.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Make 20 requests (kept), and price the rest.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write new questions into OUT/questions.jsonl."""
    _synthesize(SimpleNamespace(**locals()))


def _synthesize(given: SimpleNamespace) -> None:
    from shoestring.curate._synthesis import Wish, synthesize
    from shoestring.curate._writing import METHODS

    given.method = given.method.replace("-", "_")
    if given.method not in METHODS:
        raise UserError(f'There is no method "{given.method}".{did_you_mean(given.method, METHODS)}')
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"{given.out} is a file; --out is a folder.")
    if given.method != "nothing" and (given.template or given.system or given.prefix or given.stop):
        raise UserError("--template, --system, --prefix and --stop belong to --method nothing.")
    pool = _pool(given)
    stream, stops, ids = _stream(given)
    wish = Wish(
        given.method, stream, given.count, given.out, _filters(given), stops, given.seed, given.fewest_words,
        given.most_words, given.judge, given.dry_run,
    )  # fmt: skip
    _show(given, wish, synthesize(wish, pool, _teacher(given, stops, ids)))


def _pool(given: SimpleNamespace) -> Pool:
    """What the questions are written from. Raises UserError where there is nothing."""
    from shoestring.curate._synthesis import people_of, seeds_of
    from shoestring.curate._synthesis_ask import questions_of
    from shoestring.curate._writing import Pool
    from shoestring.data.questions import source_of

    pool = Pool()
    if given.personas is not None:
        if given.method != "persona":
            raise UserError("--personas belong to --method persona.")
        pool.people = people_of(given.personas)
    if given.seeds is not None:
        source, _ = source_of(given.seeds, count=given.seeds_count)
        pool.items = seeds_of(questions_of(source()))
    if given.method != "nothing" and not pool.items and not pool.people:
        what = "--personas FILE or --seeds FILE" if given.method == "persona" else "--seeds FILE"
        raise UserError(f"--method {given.method} writes from something: give {what}.")
    return pool


def _stream(given: SimpleNamespace) -> tuple[Stream, tuple[str, ...], tuple[int, ...]]:
    """(the requests, what ends a user's turn, the ids of that)."""
    from shoestring.cli_chat import weights_of
    from shoestring.curate import _writing
    from shoestring.curate._synthesis_ask import opening_of

    if given.method != "nothing":
        made: Stream = getattr(_writing, given.method)(given.about)
        return made, (), ()
    if given.about:
        raise UserError("--method nothing gives the teacher no words; steer it with --system.")
    if given.temperature == 0:
        raise UserError("--method nothing sends one request again and again; it needs a --temperature above 0.")
    if given.prefix is not None:
        return _writing.nothing(given.prefix), (given.stop,) if given.stop else (), ()
    template = given.template or given.teacher
    if template is None or "://" in template:
        raise UserError(
            "--method nothing needs the teacher's template: --template FOLDER or a known name, or --prefix TEXT."
        )
    before, after, ids = opening_of(weights_of(template), given.system)
    return _writing.nothing(before), (after,) if after else (), ids


def _filters(given: SimpleNamespace) -> list[Filter]:
    """The filters of new questions; those of `curate` by its own words."""
    from shoestring.cli_curate import chain_of
    from shoestring.curate._synthesis import USUAL

    usual = {one.name: dict(one.options) for one in USUAL}
    names = [name.strip().replace("-", "_") for name in (given.filters or ",".join(usual)).split(",") if name.strip()]
    own = [f"{name}.{key}={value}" for name in names for key, value in usual.get(name, {}).items()]
    return chain_of(names, given.against or [], own + (given.option or []))


def _teacher(given: SimpleNamespace, stops: tuple[str, ...], ids: tuple[int, ...]) -> Ask:
    from shoestring.curate._synthesis_ask import in_process, over_http
    from shoestring.teachers._local import is_local

    if given.teacher is None or not is_local(given.teacher):
        return over_http(
            given.out, _apis(given, stops, ids), _budget(given), retry_failed=given.retry_failed, quiet=given.quiet
        )
    from shoestring.cli_chat import weights_of
    from shoestring.core.nouns import Sampling
    from shoestring.teachers._local import load_local
    from shoestring.text.tokenizer import Tokenizer

    ends = (*ids, Tokenizer.load(weights_of(given.teacher)).end) if ids else ()
    decoding = Sampling(
        max_new_tokens=given.max_tokens, temperature=given.temperature, top_p=1.0 if given.top_p is None else given.top_p,
        seed=given.seed, stop_ids=ends,
    )  # fmt: skip
    return in_process(
        given.out,
        load_local(given.teacher, name=given.name, licence=given.licence, thinking=False),
        decoding,
        quiet=given.quiet,
    )


def _budget(given: SimpleNamespace) -> Any:
    from shoestring.cli_ask import budget_of

    return budget_of(given.budget, given.budget_tokens, given.budget_answers)


def _apis(given: SimpleNamespace, stops: tuple[str, ...], ids: tuple[int, ...]) -> list[Any]:
    """The teachers; for `nothing` through their text completions, with what ends a user's turn."""
    from shoestring.cli_ask import decoding_of, whom
    from shoestring.teachers._job import Api
    from shoestring.teachers._send import Limits

    raw = given.method == "nothing"
    ending: dict[str, Any] = {"add_special_tokens": False} if raw else {}
    if stops:
        ending["stop"] = list(stops)
    if ids:
        ending["stop_token_ids"] = list(ids)
    shared = {
        "max_tokens": given.max_tokens, "most": given.concurrency, "rpm": given.rpm, "tpm": given.tpm, "tries": given.tries,
        "patience_s": given.patience, "permission": given.i_have_permission, "limits": Limits(total_s=given.timeout),
        "price": given.price, "licence": given.licence, "raw": raw,
        "decoding": decoding_of(given.temperature, given.top_p, given.seed, given.extra) | ending,
    }  # fmt: skip
    return [Api(**shared | own) for own in whom(given.teacher, given.model, given.teachers, given.key, given.name)]


def _show(given: SimpleNamespace, wish: Wish, made: Made) -> None:
    """What came of it; a session that was stopped exits with 2 for a mistake of the user's, else 1."""
    from shoestring.curate._synthesis import FILE

    report = made.report(wish)
    if given.json:
        emit_json(report)
    else:
        print(f"{given.out / FILE}: {report['questions']:,} questions of {wish.count:,}")
        print_table([{"dropped because": why, "texts": number} for why, number in report["dropped"].items()])
        print(f"{report['requests']:,} requests in {report['rounds']:,} rounds, {report['answers_now']:,} answered now")
        _print_forecast(report["forecast"], wish.count)
    if made.ended:
        typer.echo(f"Stopped: {made.ended}.", err=True)
        raise typer.Exit(2 if made.told is not None and made.told.mistake else 1)


def _print_forecast(told: dict[str, Any] | None, count: int) -> None:
    if told is None:
        return
    if told["usd"] is None:
        print(f"no question came of {told['requests']} requests: nothing to price the rest by")
        return
    print(f"all {count:,} would take about {told['requests_in_all']:,} requests and cost ${told['usd']:,.4f} (95 %: "
          f"${told['usd_95'][0]:,.4f} to ${told['usd_95'][1]:,.4f}), from {told['questions']} questions of {told['requests']} requests")  # fmt: skip
