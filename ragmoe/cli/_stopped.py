"""What a long command says when Ctrl-C or SIGTERM stops it: what is kept, and the command that goes on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import typer

#: The words that the program was called with, its own name left out.
WORDS: ContextVar[Sequence[str]] = ContextVar("WORDS", default=())


def again(add: str = "", without: Sequence[str] = ()) -> str:
    """The command that was given, with an option that it may lack and without those that begin again."""
    kept = [word for word in WORDS.get() if word not in without]
    return shlex.join(["ragmoe", *kept, *([add] if add and add not in kept else [])])


@contextmanager
def on_stop(say: Callable[[], str]) -> Iterator[None]:
    """Where a signal stops what runs inside, put one line on stderr: what ``say`` then gives."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        typer.echo(f"stopped; {say()}", err=True)
        raise
