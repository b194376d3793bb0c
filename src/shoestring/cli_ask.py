"""`ask`: questions to a teacher, every answer kept."""

# ruff: noqa: E501 (options and tables, one a line)
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli_options import (
    ROAD,
    RUNS,
    Again,
    Json,
    Quiet,
    RunsDir,
    Sets,
    described,
    emit_json,
    print_table,
    short,
)
from shoestring.cli_road import Inputs, stage_verb
from shoestring.core.errors import UserError, without_password

if TYPE_CHECKING:
    from shoestring.data.claims import Budget
    from shoestring.teachers._job import Api
    from shoestring.teachers._session import Job, Outcome

KEYS = {  # host -> the environment variable its users know
    "api.deepseek.com": "DEEPSEEK_API_KEY", "api.openai.com": "OPENAI_API_KEY", "openrouter.ai": "OPENROUTER_API_KEY",
    "api.together.xyz": "TOGETHER_API_KEY", "api.mistral.ai": "MISTRAL_API_KEY", "api.x.ai": "XAI_API_KEY",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add `ask`."""
    text = described(
        "Ask a teacher many questions and keep every answer. Killed, the same command goes on; nothing is asked twice.",
        "shoestring ask --teacher https://api.deepseek.com/v1 --model deepseek-reasoner --questions q.jsonl "
        "--budget 20 --out traces/",
        "shoestring ask --teacher http://127.0.0.1:8000 --model mine --questions logic --count 100 --samples 4 "
        "--out traces/ --dry-run",
        "shoestring ask --from teacher=runs/rl-mine-0123",
    )
    app.command("ask", help=text, rich_help_panel=ROAD)(ask)


def ask(
    teacher: Annotated[str | None, typer.Option(help="An OpenAI-compatible API's address; or a checkpoint, a run, recorded traces.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    teachers: Annotated[Path | None, typer.Option(help="Several teachers: a JSON or YAML list of their options.")] = None,
    questions: Annotated[str | None, typer.Option(help="A .jsonl, .jsonl.gz or .txt file, a task, or hf:NAME.")] = None,
    samples: Annotated[int, typer.Option(help="Answers to each question.")] = 1,
    out: Annotated[str, typer.Option(help="The folder of the traces store; or postgresql://… for workers on many machines.")] = "traces",
    workers: Annotated[int, typer.Option(help="Ask from so many processes, by Ray (--out is then in PostgreSQL).")] = 0,
    ray: Annotated[str | None, typer.Option(help="A Ray cluster's address; none: this machine.")] = None,
    copy_to: Annotated[Path | None, typer.Option(help="A folder to copy a store in PostgreSQL to, for curate and export.")] = None,
    budget: Annotated[str | None, typer.Option(help="Dollars this store may ever cost.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="Tokens in and out it may ever take.")] = None,
    budget_answers: Annotated[int | None, typer.Option(help="Answers it may ever hold.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most, reasoning included.")] = 4096,
    temperature: Annotated[float | None, typer.Option(help="Of decoding; the API's own when not given.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of decoding.")] = None,
    seed: Annotated[int | None, typer.Option(help="Sample i is asked with seed + i.")] = None,
    extra: Annotated[str | None, typer.Option(help="More of the request's body, as a JSON object.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt before every question that has none.")] = None,
    count: Annotated[int | None, typer.Option(help="Questions at most.")] = None,
    difficulty: Annotated[int, typer.Option(help="Of a task's questions.")] = 3,
    n: Annotated[int, typer.Option("--n", help="Samples in one request (the API's n).")] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Receive answers as event streams.")] = False,
    concurrency: Annotated[int, typer.Option(help="Requests at once, at most.")] = 64,
    rpm: Annotated[float, typer.Option(help="Requests a minute, at most; 0: no limit.")] = 0,
    tpm: Annotated[float, typer.Option(help="Tokens a minute, at most; 0: no limit.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds of one request.")] = 1800.0,
    patience: Annotated[float | None, typer.Option(help="Seconds to wait for a server that went away: 600, with --batch 3600.")] = None,
    tries: Annotated[int, typer.Option(help="Attempts at a question whose request fails.")] = 5,
    price: Annotated[str | None, typer.Option(help="IN,OUT[,CACHED] dollars a million tokens, or a row of the list.")] = None,
    truncated: Annotated[str, typer.Option(help="An answer cut off at --max-tokens: keep it, marked; drop it; or ask once with more (longer).")] = "keep",
    longer_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer asked longer: four times --max-tokens when not given.")] = None,
    key: Annotated[str | None, typer.Option(help="The environment variable that holds the API key.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call the teacher, whatever its address.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of its answers.")] = None,
    i_have_permission: Annotated[str | None, typer.Option(help="What allows training on answers whose terms forbid it.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave broken lines of the file out, counted.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed for good.")] = False,
    share: Annotated[bool, typer.Option("--share", help="Other processes ask into the same store.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask 20 of the questions (kept), and price the rest.")] = False,
    batch: Annotated[bool, typer.Option("--batch", help="Through the provider's batch API: within a day, at a discount.")] = False,
    discount: Annotated[int, typer.Option(help="Per cent off with --batch.")] = 50,
    poll: Annotated[float, typer.Option(help="Seconds between looks at a batch.")] = 30.0,
    inputs: Inputs = None,
    sets: Sets = None,
    runs: RunsDir = RUNS,
    again: Again = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Ask over HTTP into a store, or (--from) run the stage that asks a model of ours."""
    if inputs:
        stage_verb("ask")(inputs, sets, runs, dry_run, again, json, quiet)
        return
    _ask(SimpleNamespace(**locals()))


def _ask(given: SimpleNamespace) -> None:
    """Ask as the options of `ask` say."""
    from shoestring.data.places import is_url
    from shoestring.data.questions import Skipped, source_of
    from shoestring.teachers._local import is_local
    from shoestring.teachers._session import Job

    far = is_url(given.out)
    given.out = given.out if far else Path(given.out)
    if not far and (given.copy_to is not None or given.workers or given.ray):
        raise UserError(
            "--workers, --ray and --copy-to are for a store in PostgreSQL: --out postgresql://HOST/DATABASE."
        )
    if given.questions is None:
        raise UserError("say what to ask: --questions FILE, or the name of a task (`shoestring list tasks`).")
    if given.samples < 1:
        raise UserError(f"--samples is {given.samples}; it must be at least 1.")
    skipped = Skipped() if given.skip_bad else None
    source, identity = source_of(
        given.questions, system=given.system, count=given.count, difficulty=given.difficulty, skipped=skipped
    )
    if given.teacher is not None and is_local(given.teacher):
        if given.truncated != "keep":
            raise UserError("a teacher in this process keeps answers that were cut off; leave out --truncated.")
        if far:
            raise UserError("a teacher in this process keeps its answers in a folder; give one as --out.")
        outcome = _ask_here(given, source, identity)
    else:
        budget = budget_of(given.budget, given.budget_tokens, given.budget_answers)
        job = Job(
            given.out, source, identity, _apis(given), given.samples, budget, given.share, given.retry_failed,
            given.dry_run, skipped, given.quiet,
        )  # fmt: skip
        outcome = _run(given, job)
    if skipped and skipped.count:
        typer.echo(f"{skipped.count} line(s) left out, the first: {skipped.first}.", err=True)
    if given.copy_to is not None:
        from shoestring.data.pg_worker import copy_down

        copy_down(given.out, given.copy_to)
    if not far or given.copy_to is not None:
        _page(given.copy_to or given.out)
    _show(outcome, given.out, given.json)


def _run(given: SimpleNamespace, job: Job) -> Outcome:
    """Ask over HTTP: from this process, from many, or by batches."""
    if given.batch:
        if given.workers or given.ray:
            raise UserError("--batch asks from one process; leave out --workers and --ray.")
        from shoestring.teachers._batch import run_batch

        return run_batch(job, poll_s=given.poll)
    if given.workers or given.ray:
        from shoestring.teachers._ray import run_many

        return run_many(job, given.workers or 2, given.ray)
    from shoestring.teachers._session import run

    return run(job)


def _page(out: Path) -> None:
    """The page of plots, beside the store."""
    from shoestring.data.store import Store
    from shoestring.report.asked import write_asked

    store = Store(out, share=True)
    try:
        write_asked(store, out / "summary.html")
    finally:
        store.close()


def _ask_here(given: SimpleNamespace, source: Any, identity: str) -> Outcome:
    """Ask a model in this process, or recorded answers."""
    from shoestring.core.nouns import Sampling
    from shoestring.teachers._local import load_local, run_local

    local = load_local(given.teacher, name=given.name, licence=given.licence)
    decoding = Sampling(
        max_new_tokens=given.max_tokens, temperature=1.0 if given.temperature is None else given.temperature,
        top_p=1.0 if given.top_p is None else given.top_p, seed=given.seed or 0,
    )  # fmt: skip
    return run_local(given.out, local, source, identity, given.samples, decoding, quiet=given.quiet)


def budget_of(usd: str | None, tokens: int | None, answers: int | None) -> Budget:
    """The limits over a store's life. Raises UserError for what is no amount of money."""
    from shoestring.data.claims import Budget
    from shoestring.teachers._price import pico

    return Budget(None if usd is None else pico(usd), tokens, answers)


def _apis(given: SimpleNamespace) -> list[Api]:
    from shoestring.teachers._job import Api
    from shoestring.teachers._send import Limits

    shared = {
        "max_tokens": given.max_tokens, "n": given.n, "stream": given.stream, "most": given.concurrency,
        "rpm": given.rpm, "tpm": given.tpm, "tries": given.tries, "patience_s": given.patience,
        "permission": given.i_have_permission, "limits": Limits(total_s=given.timeout), "price": given.price,
        "truncated": given.truncated, "longer_tokens": given.longer_tokens,
        "licence": given.licence, "discount": given.discount if given.batch else 0, "decoding": decoding_of(given.temperature, given.top_p, given.seed, given.extra),
    }  # fmt: skip
    return [Api(**shared | own) for own in whom(given.teacher, given.model, given.teachers, given.key, given.name)]


def whom(
    teacher: str | None, model: str | None, teachers: Path | None, key: str | None, name: str | None
) -> list[dict[str, Any]]:
    """The teachers' own options, from what was given. Raises UserError."""
    if teachers is not None:
        return [_with_key(given) for given in _listed(teachers)]
    if teacher is None or model is None:
        raise UserError("say whom to ask: --teacher URL --model NAME, --teachers FILE, or --from teacher=RUN.")
    return [_with_key({"url": teacher, "model": model, "key": key, "name": name})]


def decoding_of(temperature: float | None, top_p: float | None, seed: int | None, extra: str | None) -> dict[str, Any]:
    """Parameters of decoding as a body holds them. Raises UserError for an `extra` that is no JSON object."""
    import json

    given = {"temperature": temperature, "top_p": top_p, "seed": seed}
    values = {key: value for key, value in given.items() if value is not None}
    if extra:
        try:
            more = json.loads(extra)
        except ValueError as error:
            raise UserError(f"--extra is not JSON ({error}).") from None
        if not isinstance(more, dict):
            raise UserError("--extra must be a JSON object, as in --extra '{\"top_k\": 20}'.")
        values |= more
    return values


def _with_key(given: dict[str, Any]) -> dict[str, Any]:
    from urllib.parse import urlsplit

    return given | {"key": given.get("key") or KEYS.get(urlsplit(str(given.get("url"))).hostname or "")}


def _listed(path: Path) -> list[dict[str, Any]]:
    """The teachers of a file. Raises UserError for a field that does not exist."""
    from dataclasses import fields

    from shoestring.core.errors import did_you_mean
    from shoestring.core.yaml12 import read_yaml
    from shoestring.teachers._job import Api

    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    rows = read_yaml(path.read_text(encoding="utf-8"), path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must be a list of teachers, each with url and model.")
    known = [field.name for field in fields(Api) if field.name != "limits"]
    for row in rows:
        for key in row:
            if key not in known:
                raise UserError(f'{path}: a teacher has no option "{key}".{did_you_mean(key, known)}')
        if not row.get("url") or not row.get("model"):
            raise UserError(f"{path}: every teacher needs url and model.")
    return rows


def _show(outcome: Outcome, out: Path | str, json: bool) -> None:
    """What came of it; a session that was stopped exits with 2 for a mistake of the user's, else 1."""
    if json:
        emit_json(outcome.report())
    else:
        _print(outcome, out)
    if outcome.told.stopped:
        typer.echo(f"Stopped: {outcome.told.stopped}.", err=True)
        raise typer.Exit(2 if outcome.told.mistake else 1)


def _print(outcome: Outcome, out: Path | str) -> None:
    report = outcome.report()
    counts, purse = outcome.counts, outcome.purse
    rows = [
        {"what": state, "rows": counts[state]} for state in ("answered", "planned", "sent", "failed") if counts[state]
    ]
    print_table(rows, title=f"{without_password(out)}: {sum(counts.values()):,} answers wanted")
    usd = report["spent_usd"]
    print(f"{report['answers_now']:,} answers now in {short(outcome.seconds, 'seconds')} "
          f"({report['answers_per_s']:,.0f}/s), {short(report['tokens_in'])} tokens in, {short(report['tokens_out'])} out")  # fmt: skip
    print(f"spent in all: ${usd:,.6f} for {purse.answers:,} answers, {purse.sends:,} requests")
    if report["accepted"] is not None:
        of = f"of {report['graded_sample']:,} that were graded" if report["graded_sample"] else "ended by themselves"
        print(f"accepted:     {100 * report['accepted']:.1f} % {of}")
    if report["asked_longer"]:
        print(
            f"asked longer: {report['asked_longer']:,} that were cut off, {report['whole_longer']:,} of them whole now"
        )
    if purse.doubts:
        print(
            f"in doubt:     ${report['in_doubt_usd']:,.6f} at most, {purse.doubts:,} requests perhaps billed and not answered"
        )
    for kind, (number, words) in outcome.troubles.items():
        print(f"  {kind}: {number:,}, the last: {words}")
    for other, number in outcome.told.other_models.items():
        print(f"  {number:,} answers say they are from {other}")
    if outcome.forecast and outcome.forecast["usd"] is not None:
        told = outcome.forecast
        print(f"all {told['questions']:,} would cost ${told['usd']:,.4f} (95 %: ${told['usd_95'][0]:,.4f} to "
              f"${told['usd_95'][1]:,.4f}), from {told['answers']} answers of {told['tokens_out']:.0f} tokens")  # fmt: skip
