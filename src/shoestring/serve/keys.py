"""Keys, usage and remembered answers, in SQLite (WAL) or any database SQLAlchemy speaks to, by one schema.

A key is shown once, when it is made; kept is its SHA-256. Limits are None where there is none. Credit is in dollars:
`credit_usd` less `spent_usd` is what is left. Every finished or broken-off call is one row of `usage`, written in the
same transaction as what its key has spent. `version` counts changes made to keys, so that a running server notices
what `shoestring keys` did. Left out: several servers over one database sharing their limits per minute.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from shoestring.core.errors import UserError, did_you_mean, without_password

PREFIX = "sk-"
SHOWN = 11  # first characters of a key that lists may show
_metadata = sa.MetaData()
KEYS = sa.Table(
    "keys", _metadata,
    sa.Column("id", sa.String(24), primary_key=True), sa.Column("hash", sa.String(64), unique=True, nullable=False),
    sa.Column("shown", sa.String(16), nullable=False), sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False), sa.Column("org", sa.String(200), nullable=False),
    sa.Column("rpm", sa.Integer), sa.Column("tpm", sa.Integer), sa.Column("concurrency", sa.Integer),
    sa.Column("daily_tokens", sa.BigInteger), sa.Column("credit_usd", sa.Float),
    sa.Column("spent_usd", sa.Float, nullable=False), sa.Column("models", sa.Text), sa.Column("flags", sa.Text),
    sa.Column("created", sa.Float, nullable=False), sa.Column("revoked", sa.Float), sa.Column("blocked", sa.Text),
)  # fmt: skip
USAGE = sa.Table(
    "usage", _metadata,
    sa.Column("id", sa.Integer, primary_key=True), sa.Column("key_id", sa.String(24), nullable=False, index=True),
    sa.Column("request_id", sa.String(128), nullable=False), sa.Column("time", sa.Float, nullable=False, index=True),
    sa.Column("model", sa.String(200), nullable=False), sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("prompt", sa.Integer, nullable=False), sa.Column("cached", sa.Integer, nullable=False),
    sa.Column("completion", sa.Integer, nullable=False), sa.Column("reasoning", sa.Integer, nullable=False),
    sa.Column("usd", sa.Float, nullable=False), sa.Column("status", sa.Integer, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
)  # fmt: skip
ANSWERS = sa.Table(
    "answers", _metadata,
    sa.Column("key_id", sa.String(24), primary_key=True), sa.Column("idempotency", sa.String(255), primary_key=True),
    sa.Column("body_hash", sa.String(64), nullable=False), sa.Column("content_type", sa.String(64), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False), sa.Column("time", sa.Float, nullable=False),
)  # fmt: skip
META = sa.Table("meta", _metadata, sa.Column("name", sa.String(32), primary_key=True), sa.Column("value", sa.Integer))
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Key:
    """One key as the server sees it: never the key itself."""

    id: str
    hash: str
    shown: str
    name: str
    owner: str = ""
    org: str = ""
    rpm: int | None = None  # requests a minute
    tpm: int | None = None  # tokens a minute, prompt and completion
    concurrency: int | None = None
    daily_tokens: int | None = None  # of a day in UTC
    credit_usd: float | None = None
    spent_usd: float = 0.0
    models: tuple[str, ...] | None = None  # None: all
    flags: Mapping[str, Any] | None = None  # logprobs: bool, max_n: int, distillation: bool
    created: float = 0.0
    revoked: float | None = None
    blocked: str | None = None  # why

    def public(self) -> dict[str, Any]:
        """What lists and --json show."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "hash"}


CHANGEABLE = ("owner", "org", "rpm", "tpm", "concurrency", "daily_tokens", "credit_usd", "models", "flags", "blocked")


def hashed(secret: str) -> str:
    """SHA-256 of a key: keys are random, so no salt is needed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class KeyStore:
    """The database. Every method is one short transaction; the server calls them from one thread of their own."""

    def __init__(self, where: str | Path, *, create: bool = True) -> None:
        """Raises UserError for what cannot be opened, is a database of something else, or (`create` False) is not
        there."""
        url = str(where)
        if "://" not in url:
            url = f"sqlite:///{_own_file(Path(url).expanduser(), create)}"
        try:
            self._engine = sa.create_engine(url, connect_args={"timeout": 10} if url.startswith("sqlite") else {})
            if url.startswith("sqlite"):
                sa.event.listen(self._engine, "connect", _pragmas)
                there = set(sa.inspect(self._engine).get_table_names())
                if there and KEYS.name not in there:
                    raise UserError(f"{where} is a database of something else; give another file for the keys.")
            _metadata.create_all(self._engine)
            self._check_schema()
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise UserError(
                f"the store of keys {without_password(where)} cannot be opened: {without_password(reason)}."
            ) from error

    def close(self) -> None:
        self._engine.dispose()

    def _check_schema(self) -> None:
        with self._engine.begin() as db:
            found = db.scalar(sa.select(META.c.value).where(META.c.name == "schema"))
            if found is None:
                db.execute(sa.insert(META), [{"name": "schema", "value": SCHEMA}, {"name": "version", "value": 0}])
            elif found != SCHEMA:
                raise UserError(f"the store of keys has schema {found}; this version reads schema {SCHEMA}.")

    # ---- keys
    def create(self, name: str, **limits: Any) -> tuple[str, Key]:
        """Make a key; the secret is returned here and never again. Raises UserError for a name in use."""
        secret = PREFIX + secrets.token_urlsafe(32)
        row = {
            "id": f"k-{secrets.token_hex(5)}", "hash": hashed(secret), "shown": secret[:SHOWN], "name": name,
            "owner": "", "org": "", "spent_usd": 0.0, "created": time.time(),
        } | _row(limits)  # fmt: skip
        try:
            with self._engine.begin() as db:
                db.execute(sa.insert(KEYS).values(row))
                _changed(db)
        except sa.exc.IntegrityError:
            raise UserError(f'there is a key called "{name}" already; choose another name.') from None
        return secret, self.find(name)

    def find(self, name: str) -> Key:
        """By name or id. Raises UserError."""
        keys = self.all()
        for key in keys:
            if name in (key.name, key.id):
                return key
        raise UserError(f'there is no key called "{name}".{did_you_mean(name, [key.name for key in keys])}')

    def all(self) -> list[Key]:
        with self._engine.connect() as db:
            return [_key(dict(row)) for row in db.execute(sa.select(KEYS).order_by(KEYS.c.created)).mappings()]

    def change(self, name: str, **values: Any) -> Key:
        """Set limits or flags, block or unblock."""
        key = self.find(name)
        with self._engine.begin() as db:
            db.execute(sa.update(KEYS).where(KEYS.c.id == key.id).values(_row(values)))
            _changed(db)
        return self.find(key.id)

    def add_credit(self, name: str, usd: float) -> Key:
        """Top up: what had no limit gets one. Raises UserError for what is no amount."""
        if not math.isfinite(usd):
            raise UserError(f"{usd} is no amount of dollars.")
        key = self.find(name)
        more = sa.func.coalesce(KEYS.c.credit_usd, KEYS.c.spent_usd) + usd
        with self._engine.begin() as db:
            db.execute(sa.update(KEYS).where(KEYS.c.id == key.id).values(credit_usd=more))
            _changed(db)
        return self.find(key.id)

    def revoke(self, name: str) -> Key:
        """For good."""
        key = self.find(name)
        with self._engine.begin() as db:
            db.execute(sa.update(KEYS).where(KEYS.c.id == key.id).values(revoked=time.time()))
            _changed(db)
        return self.find(key.id)

    def version(self) -> int:
        with self._engine.connect() as db:
            return int(db.scalar(sa.select(META.c.value).where(META.c.name == "version")) or 0)

    # ---- usage
    def record(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Usage rows, and what their keys have spent by them."""
        rows = list(rows)
        with self._engine.begin() as db:
            db.execute(sa.insert(USAGE), [dict(row) for row in rows])
            for row in rows:
                if row["usd"] and row["key_id"]:
                    spent = KEYS.c.spent_usd + row["usd"]
                    db.execute(sa.update(KEYS).where(KEYS.c.id == row["key_id"]).values(spent_usd=spent))

    def tokens_since(self, moment: float) -> dict[str, int]:
        """Tokens by key since a moment (for the daily limit, when a server starts)."""
        total = sa.func.sum(USAGE.c.prompt + USAGE.c.completion)
        with self._engine.connect() as db:
            rows = db.execute(sa.select(USAGE.c.key_id, total).where(USAGE.c.time >= moment).group_by(USAGE.c.key_id))
            return {key: int(tokens or 0) for key, tokens in rows}

    def totals(self, since: float = 0.0) -> list[dict[str, Any]]:
        """Per key and model: requests, tokens, dollars."""
        sums = [
            sa.func.sum(USAGE.c[name]).label(name) for name in ("prompt", "cached", "completion", "reasoning", "usd")
        ]
        query = (
            sa.select(KEYS.c.name.label("key"), USAGE.c.model, sa.func.count().label("requests"), *sums)
            .select_from(USAGE.outerjoin(KEYS, KEYS.c.id == USAGE.c.key_id))
            .where(USAGE.c.time >= since)
            .group_by(KEYS.c.name, USAGE.c.model)
            .order_by(KEYS.c.name, USAGE.c.model)
        )
        with self._engine.connect() as db:
            return [dict(row) for row in db.execute(query).mappings()]

    # ---- answers to requests that may be repeated
    def remembered(self, key_id: str, idempotency: str, since: float) -> tuple[str, str, bytes] | None:
        """(hash of the request, content type, body) of an answer given before."""
        query = sa.select(ANSWERS.c.body_hash, ANSWERS.c.content_type, ANSWERS.c.body).where(
            ANSWERS.c.key_id == key_id, ANSWERS.c.idempotency == idempotency, ANSWERS.c.time >= since
        )
        with self._engine.connect() as db:
            row = db.execute(query).first()
        return None if row is None else (row[0], row[1], row[2])

    def remember(
        self, key_id: str, idempotency: str, body_hash: str, content_type: str, body: bytes, keep: float
    ) -> None:
        """Keep an answer, and drop those older than `keep` (a moment)."""
        row = {
            "key_id": key_id, "idempotency": idempotency, "body_hash": body_hash, "content_type": content_type,
            "body": body, "time": time.time(),
        }  # fmt: skip
        same = (ANSWERS.c.key_id == key_id) & (ANSWERS.c.idempotency == idempotency)
        with self._engine.begin() as db:
            db.execute(sa.delete(ANSWERS).where(same | (ANSWERS.c.time < keep)))
            db.execute(sa.insert(ANSWERS).values(row))


def _own_file(path: Path, create: bool) -> Path:
    """The SQLite file, for its owner's eyes only when it is made here: remembered answers lie in it."""
    if path.exists():
        return path
    if not create:
        raise UserError(f"There is no store of keys {path}; `shoestring keys create NAME --store {path}` makes one.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise UserError(f"the store of keys {path} cannot be made: {error.strerror}.") from error
    return path


def _pragmas(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _changed(db: sa.Connection) -> None:
    db.execute(sa.update(META).where(META.c.name == "version").values(value=META.c.value + 1))


def _row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked values as the table keeps them."""
    row = dict(values)
    for name, value in row.items():
        if name not in CHANGEABLE:
            raise UserError(f'a key has no "{name}".{did_you_mean(name, CHANGEABLE)}')
        amount = name in ("rpm", "tpm", "concurrency", "daily_tokens", "credit_usd") and value is not None
        if amount and not 0 <= value < math.inf:  # NaN too: every comparison with it would let the key through
            raise UserError(f"{name} is {value}; it must not be negative or endless (leave it out for no limit).")
        if name in ("models", "flags"):
            row[name] = None if value is None else json.dumps(list(value) if name == "models" else dict(value))
    return row


def _key(row: Mapping[str, Any]) -> Key:
    values = dict(row)
    values["models"] = tuple(json.loads(values["models"])) if values["models"] else None
    values["flags"] = json.loads(values["flags"]) if values["flags"] else None
    return Key(**values)
