"""What a road starts from: its inputs found and checked before any work, and what of them decides a run's digest.

An input is an earlier stage, a finished run, or a checkpoint in Hugging Face layout: a folder, or a hub id.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shoestring.core import hub
from shoestring.core.atomic import disk_full
from shoestring.core.errors import UserError, did_you_mean
from shoestring.core.registry import load_part, part_hash, part_path
from shoestring.core.run import Run
from shoestring.data.traces import TraceStore
from shoestring.tasks._draw import Split
from shoestring.train.configs import PruneStage, Recipe, Stage, TaskMix, Textbook, TextFiles, is_store, is_teacher

TRACES = "traces.db"  # the file of a store of traces (data/traces.py)
OURS = ("deepseek_v2", "deepseek_v3", "llama", "qwen2", "qwen3")  # the families of models/
MANY_KINDS = 12
Found = Run | Path


def is_model(role: str) -> bool:
    """Whether an input of this role hands weights on."""
    return role == "model" or is_teacher(role)


def check_road(recipe: Recipe, runs_dir: Path, *, download: bool = True) -> dict[str, Found]:
    """The inputs of a recipe that are none of its own stages, by the name they are given.

    Models named by a hub id are downloaded (all of them, or their config.json alone). Raises UserError for an input
    that is nowhere, unfinished or of the wrong kind, an unknown part, or a corpus file that is not there.
    """
    found: dict[str, Found] = {}
    earlier: list[str] = []
    for stage in recipe.stages:
        _check_data(stage)
        for role, value in stage.inputs.items():
            if value in earlier:
                continue
            known = find_input(value, runs_dir, files=hub.CHECKPOINT if download else hub.CONFIG)
            if known is None:
                names = [*earlier, *(path.parent.name for path in runs_dir.glob("*/manifest.json"))]
                raise UserError(
                    f'stage "{stage.name}": input "{role}" is "{value}", which is neither an earlier stage, a run, a '
                    f"model folder nor a hub id.{did_you_mean(value, names)}"
                )
            _check_kind(stage, role, value, known)
            found[value] = known
        earlier.append(stage.name)
    return found


def _check_kind(stage: Stage, role: str, value: str, found: Found) -> None:
    _check_place(stage, role, value, found)
    if role == "model" and isinstance(stage, PruneStage):
        _check_prunable(stage, found)


def _check_place(stage: Stage, role: str, value: str, found: Found) -> None:
    if isinstance(found, Run):
        if not found.finished:
            raise UserError(f"input run {found.name} is not finished; run its command again first.")
        if (is_model(role) or role == "tokenizer") and found.latest_checkpoint() is None:
            raise UserError(f'stage "{stage.name}": input "{role}" is {found.name}, {found.without_checkpoint()}.')
        if role == "traces" and not (found.path / TRACES).exists():
            raise UserError(f'stage "{stage.name}": input "traces" is {found.name}, a run that made no traces.')
    elif role == "traces" and found.is_file():
        return
    elif role == "traces" and not (found / TRACES).exists():
        raise UserError(f'stage "{stage.name}": input "traces" is "{value}", a folder without {TRACES}; give a run.')
    elif is_store(role) and not (found / "store.json").exists():
        raise UserError(f'stage "{stage.name}": input "{role}" is "{value}", which holds no logits store.')
    elif role != "traces" and role in getattr(stage, "match_flops", ()):
        raise UserError(f'stage "{stage.name}": input "{role}" is "{value}", a folder; it must be a finished run.')


def _check_prunable(stage: Stage, found: Found) -> None:
    folder = checkpoint_of(found)
    assert folder is not None  # a run without a checkpoint was refused
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # said when its shape is read
    if kind in OURS:
        return
    from shoestring.models.checkpoint import borrowed  # loads torch, for types that are not known without

    if borrowed(kind) is not None:
        raise UserError(
            f'stage "{stage.name}": input "model" is of type "{kind}", which runs through transformers; only deepseek, '
            "llama, qwen2 and qwen3 can be pruned."
        )


def find_input(
    value: str, runs_dir: Path, *, files: Sequence[str] = hub.CHECKPOINT, download: bool = True
) -> Found | None:
    """The run, or the folder of a checkpoint, that `value` names; None when there is none."""
    folder = next((path for path in (Path(value), runs_dir / value) if path.is_dir()), None)
    if folder is not None:
        return Run.load(folder) if (folder / "manifest.json").exists() else folder
    if Path(value).suffix in (".jsonl", ".db") and Path(value).is_file():
        return Path(value)  # traces
    if not hub.is_id(value) or Path(value).parent == Path(runs_dir):  # a run's name, before there are any runs
        return None
    return hub.checkpoint_folder(value, files=files, download=download)


def checkpoint_of(found: Found) -> Path | None:
    """The folder of weights behind an input."""
    if isinstance(found, Path):
        return found
    latest = found.latest_checkpoint()
    return None if latest is None else latest[1]


def positions_of(found: Found) -> int | None:
    """How many positions the model behind an input has; None where its config.json does not say, or is not there."""
    folder = checkpoint_of(found)
    if folder is None:
        return None
    try:
        positions = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return positions if isinstance(positions, int) else None


# ---- digests ------------------------------------------------------------------------------------------------------


def digest_of_input(found: Found) -> str:
    """A run's own digest; or 12 hex digits of what a store of traces says, or of a folder's weights, configs and chat
    template."""
    if isinstance(found, Run):
        return found.digest
    if found.is_file() or (found / TRACES).exists():
        return TraceStore(found).digest()
    hashed = hashlib.sha256()
    for path in [path for kind in ("*.json", "*.safetensors", "*.jinja") for path in sorted(found.glob(kind))]:
        hashed.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                hashed.update(block)
    return hashed.hexdigest()[:12]


def data_of(stage: Stage) -> dict[str, str]:
    """What else decides a stage's result, by name: the files of its corpus, and the parts it names.

    Tasks, rewards and filters are data, the built-in ones too: one that has changed makes a new run. Of model families
    that holds for a user's file only; ours are code, which is recorded. Raises UserError for an unknown part.
    """
    found = {f"{kind}/{name}": part_hash(kind, name) for kind, name in dict.fromkeys(_parts(stage))}
    for name in _files(stage):
        with open(name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return found


def _check_data(stage: Stage) -> None:
    for kind, name in _parts(stage):
        part_path(kind, name)
    if (model := getattr(stage, "model", None)) is not None:
        part_path("models", model.family)
    for name in _files(stage):
        if not Path(name).is_file():
            raise UserError(f'stage "{stage.name}": corpus file {name} does not exist.')
    split: Split = "test" if stage.stage == "eval" else "train"
    for entry in _mixes(stage):
        _check_mix(entry, split, f'stage "{stage.name}"')


def _check_mix(entry: TaskMix, split: Split, where: str) -> None:
    """Make a problem of each kind at both ends of the difficulty; of a task with many kinds only look at the names."""
    task = load_part("tasks", entry.task)
    known = tuple(getattr(task, "KINDS", ()))
    try:
        if len(known) > MANY_KINDS:
            if unknown := [kind for kind in entry.kinds if kind not in known]:
                raise UserError(f'task {entry.task} has no kind "{unknown[0]}".{did_you_mean(unknown[0], known)}')
            return
        for kind in entry.kinds or known:
            for difficulty in entry.difficulty:
                task.make(0, difficulty, split, kind)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def make_runs_dir(path: Path) -> None:
    """The folder of runs. Raises UserError where there can be none, or nothing can be written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path) from error
        raise UserError(f"runs cannot be kept in {path} ({error.strerror}); --runs names another folder.") from None


def _files(stage: Stage) -> tuple[str, ...]:
    corpus = getattr(stage, "corpus", None)
    return corpus.files if isinstance(corpus, TextFiles) else ()


def _mixes(stage: Stage) -> list[TaskMix]:
    books = (getattr(stage, "corpus", None), getattr(stage, "textbook", None))
    written = [entry for book in books if isinstance(book, Textbook) for entry in book.mix]
    return [*getattr(stage, "mix", ()), *written]


def _parts(stage: Stage) -> Iterator[tuple[str, str]]:
    """(kind, name) of every part of a stage that is data."""
    for kind, names in (
        ("tasks", [entry.task for entry in _mixes(stage)]),
        ("rewards", getattr(stage, "rewards", ())),
        ("curate", getattr(stage, "curate", ())),
    ):
        yield from ((kind, name) for name in names)
    loss = getattr(stage, "loss", "")
    if loss.endswith(".py"):
        yield "losses", loss
    model = getattr(stage, "model", None)
    if model is not None and model.family.endswith(".py"):
        yield "models", model.family


def parents_of(inputs: Mapping[str, Found]) -> dict[str, str]:
    """Role -> digest of a stage's inputs."""
    return {role: digest_of_input(found) for role, found in inputs.items()}
