"""Replies of a judge on disk, in one SQLite file: several processes may share it, and no crash damages it."""

import sqlite3
from contextlib import closing
from pathlib import Path

from cppo.errors import UserError, one_line

MAX_REPLIES = 100_000
PATIENCE_SECONDS = 30.0
"""Time that another process may lock the file."""


class Replies:
    """Texts by key, at most `limit`; the oldest are dropped first.

    Raises UserError if the file cannot be opened, or is of another kind.
    """

    def __init__(self, file: str, limit: int = MAX_REPLIES) -> None:
        self._file, self._limit = str(file), limit
        self._run("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL)")

    def get(self, key: str) -> str | None:
        """The text of a key."""
        rows = self._run("SELECT text FROM replies WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def put(self, key: str, text: str) -> None:
        """Keep a text, completely or not at all."""
        self._run("INSERT OR REPLACE INTO replies (key, text) VALUES (?, ?)", key, text)
        self._run(
            "DELETE FROM replies WHERE rowid <= (SELECT rowid FROM replies ORDER BY rowid DESC LIMIT 1 OFFSET ?)",
            self._limit,
        )

    def _run(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        try:
            with closing(sqlite3.connect(self._file, timeout=PATIENCE_SECONDS)) as connection, connection:
                return connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            where = "" if Path(self._file).parent.is_dir() else "; its folder does not exist"
            raise UserError(f"cache {self._file}: {one_line(error)}{where}: name another file, or remove it") from error
