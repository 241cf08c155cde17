"""Files of text: unpacked as they are read, decoded, and never more of one in memory than a line or a page may have."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from ragmoe._errors import UsageError

#: Compression by suffix, by pyarrow's name for it.
CODECS = {".gz": "gzip", ".zst": "zstd"}
#: Characters that a line, or a file of running text, may have: a small packed file can unpack to any size.
MOST = 2**28
_BUFFER = 2**18


class UnreadableError(Exception):
    """A file cannot be read from here on; says why."""


def stem(path: Path) -> str:
    """The name without the suffixes of format and compression."""
    return path.with_suffix("").stem if path.suffix.lower() in CODECS else path.stem


def check_encoding(name: str) -> None:
    """Refuse an encoding that is none.

    Raises:
        UsageError: it is unknown, or not one of text.
    """
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=name).close()
    except (LookupError, ValueError):
        raise UsageError(
            f"encoding {name!r} is unknown", hint="known are utf-8, latin-1, cp1252, utf-16 and others of Python's"
        ) from None


def lines(path: Path, encoding: str, newline: str) -> Iterator[str]:
    """The lines with their ends; bytes that are not of the encoding come through as surrogates, for `misfit`.

    Args:
        newline: as `open` has it.

    Raises:
        UnreadableError: on reading, where the file is damaged, or a line has more than `MOST` characters.
    """
    with _opened(path, encoding, newline) as file:
        while line := file.readline(MOST + 1):
            if len(line) > MOST:
                raise UnreadableError(f"a line of more than {MOST:,} characters; nothing of it and behind it was read")
            yield line


def whole(path: Path, encoding: str) -> str:
    """All of a file of running text, line ends as ``\\n``; surrogates as in `lines`.

    Raises:
        UnreadableError: the file is damaged, or has more than `MOST` characters.
    """
    with _opened(path, encoding, None) as file:
        text = file.read(MOST + 1)
    if len(text) > MOST:
        raise UnreadableError(f"more than {MOST:,} characters of running text; cut it, or make jsonl of it")
    return text


def misfit(text: str, encoding: str, within: str = "the line") -> tuple[int, str] | None:
    """The line, from 1, and the reason, where a text that was read holds a byte that is not of the encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        first = text.rfind("\n", 0, error.start) + 1
        at = len(text[first : error.start].encode(encoding, "surrogateescape")) + 1
        reason = f"not {encoding.upper()}: byte 0x{ord(text[error.start]) & 0xFF:02x} at byte {at} of {within}"
        return text.count("\n", 0, error.start) + 1, reason
    return None


def is_text(string: str) -> bool:
    """Whether a string can be written: half of a surrogate pair cannot, nor what stands for a byte that is no text."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _opened(path: Path, encoding: str, newline: str | None) -> Iterator[TextIO]:
    with ExitStack() as stack:
        raw: Any = stack.enter_context(path.open("rb", buffering=_BUFFER))
        if codec := CODECS.get(path.suffix.lower()):
            import pyarrow as pa

            raw = stack.enter_context(io.BufferedReader(pa.CompressedInputStream(raw, codec), _BUFFER))
        name = "utf-8-sig" if _is_utf8(encoding) else encoding
        try:
            yield io.TextIOWrapper(raw, encoding=name, errors="surrogateescape", newline=newline)
        except UnicodeError as error:
            raise UnreadableError(f"not {encoding.upper()}: {getattr(error, 'reason', error)}") from error
        except OSError as error:
            # What the system says has a number, what the decompressor says has none.
            if error.errno is not None:
                raise
            raise UnreadableError(f"damaged from here on: {error}") from error


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
