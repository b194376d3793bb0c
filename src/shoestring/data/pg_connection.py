"""A connection to a store in PostgreSQL: its address, its tables, and what errors of the database mean to a user.

The address is libpq's, with the store's name behind "#" (a schema of the database; "shoestring" when not given). The
password comes from PGPASSWORD or ~/.pgpass.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from shoestring.core.errors import UserError, without_password
from shoestring.data.pg_sql import PgSql
from shoestring.data.schema import ADDED, SCHEMA, pg_tables

GONE_S = 30  # seconds of silence after which a connection is looked after, and lost a few tries later
STORE_LOCK, PLAN_LOCK = 0, -1  # advisory locks beside those of workers, which have their numbers
OPTIONS = {
    "keepalives": 1, "keepalives_idle": GONE_S, "keepalives_interval": 10, "keepalives_count": 3, "connect_timeout": 20,
}  # fmt: skip


def is_url(out: object) -> bool:
    """Whether a store's place is an address of PostgreSQL."""
    return str(out).startswith(("postgresql://", "postgres://"))


class PgConnection:
    """Two connections to a store in PostgreSQL, its tables made or brought up to date. Raises UserError."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        try:
            import psycopg
        except ModuleNotFoundError:
            raise UserError('a store in PostgreSQL needs psycopg: pip install "shoestring[postgres]".') from None
        self._errors, self._lost = psycopg.Error, (psycopg.OperationalError, psycopg.InterfaceError)
        self.url, _, name = url.partition("#")
        self.name = name or "shoestring"
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,50}", self.name):
            raise UserError(f'"{self.name}" cannot be the name of a store; use small letters, digits and _.')
        self.place = zlib.crc32(self.name.encode()) - 2**31  # the first half of its advisory locks
        self.base: Any = None
        self._side: Any = None
        try:
            self._connect(psycopg.connect, create)
        except psycopg.Error as error:
            self.close()
            raise self._told(error) from error
        except BaseException:
            self.close()
            raise

    def _connect(self, connect: Any, create: bool) -> None:
        options: dict[str, Any] = dict(OPTIONS)
        self.base = connect(self.url, autocommit=True, **options)
        self.sql = PgSql(self.base, self._errors, self._told)
        self.base.execute("SET synchronous_commit = on")
        for option, value in (("idle", GONE_S), ("interval", 10), ("count", 3)):
            self.base.execute(f"SET tcp_keepalives_{option} = {value}")
        self._open(create)
        # a connection of its own for leases: `base` is in the middle of the journal's transaction most of the time
        self._side = connect(self.url, autocommit=True, **options)
        self._side.execute(f"SET search_path TO {self.name}")

    def _open(self, create: bool) -> None:
        found = self.base.execute("SELECT to_regclass(%s)", (f"{self.name}.stores",)).fetchone()
        if found == (None,):
            if not create:
                raise UserError(f'There is no traces store "{self.name}" in this database; `shoestring ask` makes one.')
            with self.base.transaction():
                self.base.execute("SELECT pg_advisory_xact_lock(%s, %s)", (self.place, PLAN_LOCK))
                self.base.execute(f"CREATE SCHEMA IF NOT EXISTS {self.name}")
                self.base.execute(f"SET search_path TO {self.name}")
                if self.base.execute("SELECT to_regclass(%s)", (f"{self.name}.stores",)).fetchone() == (None,):
                    for statement in pg_tables():
                        self.base.execute(statement)
        self.base.execute(f"SET search_path TO {self.name}")
        (schema,) = self._one("SELECT schema FROM stores")
        if schema < SCHEMA:
            with self.base.transaction():
                self.base.execute(ADDED.replace("COLUMN", "COLUMN IF NOT EXISTS"))
                self.base.execute("UPDATE stores SET schema = %s", (SCHEMA,))
        if schema > SCHEMA:
            raise UserError(
                f"the store was made by a newer version (schema {schema}; this one reads {SCHEMA}): update."
            )

    @property
    def title(self) -> str:
        return self.name

    def close(self) -> None:
        for connection in (self.base, self._side):
            if connection is not None:
                connection.close()

    def _one(self, statement: str, values: Sequence[Any] = ()) -> Any:
        return self.base.execute(statement, values).fetchone()

    def _all(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        return self.base.execute(statement, values).fetchall()

    def _many(self, statement: str, rows: Sequence[Any]) -> None:
        with self.base.cursor() as cursor:
            cursor.executemany(statement, rows)

    def _leased(self, statement: str, values: Sequence[Any]) -> list[Any]:
        """On the connection of its own: whatever the journal is at."""
        try:
            return self._side.execute(statement, values).fetchall()
        except self._errors as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        """What an error of the database means to a user, without the address's password; ours stay as they are."""
        if not isinstance(error, self._lost):
            return error
        host = urlsplit(self.url).hostname or "its socket"
        words = without_password(" ".join(str(error).split()))
        if password := urlsplit(self.url).password:
            for form in {password, unquote(password)}:  # as it is written in the address, and as it is sent
                words = words.replace(form, "…")
        return UserError(f"PostgreSQL at {host}: {words[:300]}; what is kept is kept, and the same command goes on.")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, on the server's disk when it ends."""
        try:
            with self.base.transaction():
                yield
        except self._errors as error:
            raise self._told(error) from error
