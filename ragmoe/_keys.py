"""A table of keys that lies on the disk, so that what has been seen costs no memory however much it is."""

from __future__ import annotations

import errno
import sqlite3
import tempfile

_PRAGMAS = ("journal_mode = OFF", "synchronous = OFF", "cache_size = -8192")


class KeyTable:
    """Keys with a value each, in a temporary file of sqlite's own that goes with the object; 8 MB of it in memory.

    Raises:
        OSError: the temporary folder is full.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in _PRAGMAS:
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE keys (key BLOB PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def put(self, key: str | bytes, value: str = "") -> str | None:
        """Keep a value under a key that has none yet; returns the one it had, which stays."""
        raw = _raw(key)
        try:
            new = self._db.execute("INSERT OR IGNORE INTO keys VALUES (?, ?)", (raw, value)).rowcount
        except sqlite3.OperationalError as error:
            raise OSError(errno.ENOSPC, f"no room for a table of keys ({error})", tempfile.gettempdir()) from error
        return None if new else self.get(raw)

    def get(self, key: str | bytes) -> str | None:
        """The value of a key, None where it has none."""
        row = self._db.execute("SELECT value FROM keys WHERE key = ?", (_raw(key),)).fetchone()
        return None if row is None else str(row[0])


def _raw(key: str | bytes) -> bytes:
    # Names of files may hold bytes that are not UTF-8.
    return key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
