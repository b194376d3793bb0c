"""`export` and `provenance`: a model leaves the house with its papers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli_options import RESULTS, RUNS, Json, RunsDir, described, emit_json, print_table
from shoestring.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from shoestring.core.run import Run
    from shoestring.report.provenance import Source


def register(app: typer.Typer) -> None:
    """Add `export` and `provenance`."""
    text = described(
        "Write a run's model in Hugging Face layout, with model card, provenance and checksums.",
        "shoestring export runs/distill-mine-0123 my-student",
        "shoestring export runs/distill-mine-0123 my-student --dtype bfloat16 --license mit --push me/my-student",
    )
    app.command("export", help=text, rich_help_panel=RESULTS)(export)
    text = described(
        "List every teacher, data set and base model behind a model, with licence and terms.",
        "shoestring provenance runs/distill-mine-0123",
        "shoestring provenance my-student --json",
    )
    app.command("provenance", help=text, rich_help_panel=RESULTS)(provenance)


DTYPES = ("float32", "bfloat16", "float16")
Permission = Annotated[
    bool, typer.Option("--i-have-permission", help="Export though a teacher's terms forbid it or are not known.")
]


def export(
    run: Annotated[str, typer.Argument(help="A finished run that made a model.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")],
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Upload to the hub as owner/name.")] = None,
    license: Annotated[str, typer.Option(help="Of the weights, as the hub names it.")] = "other",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as trained when not given.")] = None,
    permission: Permission = False,
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """Exit 2 when a teacher's terms stand in the way and permission is not stated."""
    from shoestring.core.atomic import check_place
    from shoestring.core.run import Run
    from shoestring.report.provenance import hindrances, sources

    made = Run.load(_found(run, runs))
    latest = made.latest_checkpoint()
    if not made.finished:
        raise UserError(f"run {made.name} is not finished; run its command again first, then export it.")
    if latest is None:
        raise UserError(f"{made.name} cannot be exported: it is {made.without_checkpoint()}.")
    if folder.exists():
        raise UserError(f"{folder} exists; give a folder that does not, so that nothing is overwritten.")
    check_place(folder)
    if push:
        _check_repo(push)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f'--dtype is "{dtype}".{did_you_mean(dtype, DTYPES)}')
    found = sources(made.path)
    if (said := hindrances(found)) and not permission:
        raise UserError(f"{'; '.join(said)}: export with --i-have-permission if you do, and the card will say so.")
    _write(made, latest[1], folder, found, license, dtype, permission)
    if push:
        _push(folder, push)
    document = {"folder": str(folder), "pushed": push, "warnings": said, "files": len(list(folder.iterdir()))}
    emit_json(document) if json else print(f"{folder}: {document['files']} files; read README.md before you share it.")


def _write(
    run: Run, checkpoint: Path, folder: Path, found: list[Source], license: str, dtype: str | None, permission: bool
) -> None:  # fmt: skip
    """All files in a temporary folder, then the folder appears whole."""
    import hashlib
    import shutil

    from shoestring.core.atomic import commit_dir
    from shoestring.models.checkpoint import load, save
    from shoestring.report import provenance as papers
    from shoestring.report.card import card

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model, tokenizer = load(checkpoint)
        save(model, tokenizer, temporary, dtype=dtype)
        (temporary / "README.md").write_text(
            card(run, found, name=folder.name, licence=license, permission=permission), encoding="utf-8"
        )
        papers.write(temporary, found, permission)
        sums = []
        for path in sorted(temporary.iterdir()):
            with open(path, "rb") as file:
                sums.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
        (temporary / "SHA256SUMS").write_text("".join(sums))
        commit_dir(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_repo(repo: str) -> None:
    try:
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ImportError:
        raise UserError("to upload, pip install 'shoestring[hf]'.") from None
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(f'--push is "{repo}"; a repository is owner/name in letters, digits and ".-_".') from None


def _push(folder: Path, repo: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder))
    except Exception as error:
        raise UserError(
            f"{folder} is written, but uploading to {repo} failed ({type(error).__name__}); once that is mended (`hf "
            f"auth login`?), `hf upload {repo} {folder}` does it."
        ) from error


def provenance(
    model: Annotated[str, typer.Argument(help="A run, or an exported folder.")],
    runs: RunsDir = RUNS,
    json: Json = False,
) -> None:
    """A row a source; the last line says what stands in the way of sharing."""
    from dataclasses import asdict

    from shoestring.report.provenance import hindrances, sources

    found = sources(_found(model, runs))
    rows: list[dict[str, Any]] = [asdict(source) for source in found]
    if json:
        emit_json({"schema": 1, "sources": rows, "hindrances": hindrances(found)})
        return
    print_table(rows)
    for sentence in hindrances(found) or ["nothing known stands in the way of sharing it"]:
        print(f"- {sentence}")


def _found(name: str, runs: Path) -> Path:
    """The folder of a run or export by path, or of a run by name."""
    for path in (Path(name), runs / name):
        if (path / "manifest.json").exists() or (path / "provenance.json").exists():
            return path
        if path.is_dir():
            raise UserError(f"{path} was neither made by a run nor exported from one: what is behind it is not known.")
    raise UserError(f"{name} is neither a run directory nor an exported model.")
