"""What PostgreSQL is told: statements that SQLite understands too, columns for `unnest`, text without zero bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg


class PgSql:
    """A connection that takes `?` for a value. told: what one of `errors` means to a user."""

    def __init__(
        self, base: psycopg.Connection[Any], errors: type[Exception], told: Callable[[Exception], Exception]
    ) -> None:
        self._base, self._errors, self._told = base, errors, told

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """A cursor. Raises UserError for a connection that is lost."""
        try:
            return self._base.execute(_marked(statement), values)
        except self._errors as error:
            raise self._told(error) from error

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """The same for many rows."""
        try:
            with self._base.cursor() as cursor:
                cursor.executemany(_marked(statement), rows)
        except self._errors as error:
            raise self._told(error) from error


def _marked(statement: str) -> Any:
    return statement.replace("%", "%%").replace("?", "%s")


def in_columns(rows: Sequence[Sequence[Any]], width: int) -> list[list[Any]]:
    """Rows turned into `width` columns."""
    return [[row[i] for row in rows] for i in range(width)]


def cleaned(text: str) -> str:
    """Without the zero bytes that a text column cannot hold; 500 characters at most."""
    return text[:500].replace("\0", "")
