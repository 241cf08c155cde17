"""Paths in files that users write: ``${NAME}`` or ``$NAME`` is an environment variable, ``~`` somebody's home."""

from __future__ import annotations

import os
import re

from ragmoe._errors import ConfigError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand(text: str, where: str = "", *, given: str | None = None) -> str:
    """A path with its variables and its home put in.

    Args:
        where: what names the path, for the error.
        given: an option of the command that sets RAGMOE_DATA, for the hint.

    Raises:
        ConfigError: a variable is not set, or empty, which would make another path of it.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if not os.environ.get(name):
            raise ConfigError(
                f"{where}{': ' if where else ''}{text!r} needs the environment variable {name}, which is not set",
                hint=f"export {name}=FOLDER{f', or give {given}' if given and name == 'RAGMOE_DATA' else ''}",
            )
        return os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(value, text))
