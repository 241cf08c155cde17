"""Every error that ragmoe raises on purpose.

RagmoeError                     exit code 1
 ├── UsageError                 exit code 2: the command's own words are off
 ├── ConfigError                a configuration, recipe, task or experiment file
 ├── DataError                  a corpus or question file, with file and line
 ├── IndexFolderError           an index folder: missing, damaged, half built
 │    ├── EncoderMismatchError  opened with an encoder that did not make it
 │    └── IndexLockedError      somebody else is building it
 ├── BundleError                a saved model: missing, damaged, written by somebody else meanwhile
 └── ModelError                 a model that cannot be built, or does not fit what it is given

A message says what was got, what was expected, what exists, and the next command.
"""

from __future__ import annotations


class RagmoeError(Exception):
    """Base of all errors that ragmoe raises on purpose.

    Args:
        message: what was got and what was expected.
        hint: what to do next, best a command; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(RagmoeError):
    """The command's own words are off."""

    exit_code = 2


class ConfigError(RagmoeError):
    """A configuration, recipe, task or experiment file is wrong."""


class DataError(RagmoeError):
    """A corpus or question file is wrong; the message names file and line."""


class IndexFolderError(RagmoeError):
    """An index folder is missing, damaged or half built."""


class EncoderMismatchError(IndexFolderError):
    """An index was opened with an encoder that did not make it; the message names both."""


class IndexLockedError(IndexFolderError):
    """Somebody else is writing to this index."""


class BundleError(RagmoeError):
    """A saved model is missing, damaged, or was changed by somebody else meanwhile."""


class ModelError(RagmoeError):
    """A model cannot be built as asked, or does not fit what it is given."""
