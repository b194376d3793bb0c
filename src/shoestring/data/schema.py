"""The tables of a traces store, and how its file is opened. One SQLite file, readable with any SQLite.

questions  what is asked, once each, by the hash of its messages
hows       how it is asked: the teacher, its endpoint, decoding parameters, price and licence
rows       question x how x sample: planned -> sent -> answered | failed
answers    what came back, with its bill in pico-dollars (whole numbers: 1 $/M tokens = 10^6 pico-dollars a token)
purse      what is spent, what is reserved for requests in flight, and what is in doubt
batches    what lies at a provider's batch API; its rows have -id as their worker
troubles   errors by kind; marks: what curation says of an answer

No index beside the keys: every change of state would pay for it, and a session reads the rows once, in order.
WAL with synchronous=FULL: a commit that returned survives a kill and a power cut.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from shoestring.core.atomic import disk_full
from shoestring.core.errors import UserError

SCHEMA = 1
APPLICATION = 0x73686F65  # "shoe": a file of ours says so in its header
FILE = "traces.db"
PLANNED, SENT, ANSWERED, FAILED = range(4)
STATES = ("planned", "sent", "answered", "failed")
PICO = 10**12

TABLES = """
CREATE TABLE questions(
  id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, messages TEXT NOT NULL, ref TEXT, problem TEXT);
CREATE TABLE hows(id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, fields TEXT NOT NULL);
CREATE TABLE jobs(id INTEGER PRIMARY KEY, signature TEXT NOT NULL UNIQUE, planned INTEGER NOT NULL DEFAULT 0);
CREATE TABLE rows(
  id INTEGER PRIMARY KEY, trace TEXT NOT NULL UNIQUE, question INTEGER NOT NULL, how INTEGER NOT NULL,
  sample INTEGER NOT NULL, state INTEGER NOT NULL DEFAULT 0, job INTEGER NOT NULL DEFAULT 0,
  worker INTEGER NOT NULL DEFAULT 0, reserved INTEGER NOT NULL DEFAULT 0,
  reserved_tokens INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0,
  turn INTEGER NOT NULL DEFAULT 0, doubts INTEGER NOT NULL DEFAULT 0, kind TEXT, told TEXT);
CREATE TABLE answers(
  row INTEGER PRIMARY KEY, finish TEXT NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL,
  pico INTEGER NOT NULL, date TEXT NOT NULL, body TEXT NOT NULL, correct INTEGER);
CREATE TABLE purse(
  id INTEGER PRIMARY KEY CHECK (id = 0), spent INTEGER NOT NULL, reserved INTEGER NOT NULL, doubt INTEGER NOT NULL,
  tokens INTEGER NOT NULL, tokens_reserved INTEGER NOT NULL, tokens_doubt INTEGER NOT NULL,
  answers INTEGER NOT NULL, in_flight INTEGER NOT NULL, sends INTEGER NOT NULL, doubts INTEGER NOT NULL);
INSERT INTO purse VALUES (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
CREATE TABLE troubles(kind TEXT PRIMARY KEY, count INTEGER NOT NULL, told TEXT);
CREATE TABLE workers(id INTEGER PRIMARY KEY, pid INTEGER NOT NULL, started TEXT NOT NULL);
CREATE TABLE batches(id INTEGER PRIMARY KEY, made TEXT NOT NULL, remote TEXT, done INTEGER NOT NULL DEFAULT 0);
CREATE TABLE filters(id INTEGER PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, upto INTEGER NOT NULL);
CREATE TABLE marks(filter INTEGER, row INTEGER, why TEXT NOT NULL, PRIMARY KEY (filter, row)) WITHOUT ROWID;
"""


def file_of(path: str | Path) -> Path:
    """The file of the store named by a folder, or by the file itself."""
    path = Path(path)
    return path if path.suffix == ".db" else path / FILE


def open_file(file: Path, *, create: bool, writable: bool = True) -> sqlite3.Connection:
    """A connection in autocommit mode. Raises UserError for what is no store, or one of a newer version."""
    if not create and not file.is_file():
        raise UserError(f"There is no traces store {file}; `shoestring ask --out {file.parent}` makes one.")
    try:
        if create:
            file.parent.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(file, timeout=30, isolation_level=None, check_same_thread=False, cached_statements=512)
        _check(base, file)
        base.execute("PRAGMA journal_mode = WAL" if writable else "PRAGMA query_only = ON")
        base.execute("PRAGMA synchronous = FULL")
        if writable:
            _make(base)
    except sqlite3.DatabaseError as error:
        raise told(error, file) from error
    return base


def told(error: sqlite3.Error, file: Path) -> Exception:
    """What an error of the database means to a user; the error itself when it is ours."""
    text = str(error)
    if "full" in text or "disk I/O" in text:
        return disk_full(file)
    if "not a database" in text or "malformed" in text:
        return UserError(f"{file} is not a traces store ({text}); give another folder, or restore it from a copy.")
    if "unable to open" in text:
        return UserError(f"{file} cannot be opened ({text}); check the folder and its permissions.")
    return error


def _check(base: sqlite3.Connection, file: Path) -> None:
    version, application = (base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id"))
    if version > SCHEMA and application == APPLICATION:
        raise UserError(f"{file} was made by a newer version (schema {version}; this one reads {SCHEMA}): update.")
    tables = base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and application != APPLICATION:
        raise UserError(f"{file} is a database of something else; give another folder for the traces.")


def _make(base: sqlite3.Connection) -> None:
    """The tables, when the file is new; a kill in between leaves an empty file, and it is made then."""
    if base.execute("PRAGMA user_version").fetchone()[0] == SCHEMA:
        return
    base.execute("BEGIN EXCLUSIVE")
    if base.execute("PRAGMA user_version").fetchone()[0] != SCHEMA:
        for statement in TABLES.split(";\n"):
            if statement.strip():
                base.execute(statement)
        base.execute(f"PRAGMA application_id = {APPLICATION}")
        base.execute(f"PRAGMA user_version = {SCHEMA}")
    base.execute("COMMIT")
