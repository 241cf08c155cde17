"""What commands share: options, what is asked, and how results leave."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe._errors import RagmoeError, UsageError
from ragmoe._words import many

if TYPE_CHECKING:
    from ragmoe.evaluation.results import Results
    from ragmoe.evaluation.tables import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
DataOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="What ${RAGMOE_DATA} stands for in the files.", show_default=False)
]

OVERRIDES = "KEY=VALUE"
OVERRIDES_HELP = "paths in them count from the current folder."


def check_question(question: str) -> None:
    """UsageError for a question with nothing to read in it, or with bytes that are no text."""
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the question holds bytes that are not UTF-8, after {question[: error.start]!r}",
            hint="is the terminal, or what wrote the question, set to UTF-8?",
        ) from error
    if not any(x.isprintable() and not x.isspace() for x in question):
        raise UsageError("the question is empty")


def set_data(data: Path | None) -> None:
    """Let ${RAGMOE_DATA} stand for a folder."""
    if data is None:
        return
    if not data.is_dir():
        raise UsageError(f"--data {data}: there is no such folder")
    os.environ["RAGMOE_DATA"] = str(data.resolve())


def complain(results: Sequence[Results], folder: Path, again: str = "the same command") -> None:
    """Questions that have no score are never passed over: of those that failed the exit code tells too."""
    from ragmoe.evaluation.perturbation import REAL

    unscored = [s for result in results for s in result.samples.get(REAL, ()) if s.status == "unscored"]
    if unscored:
        typer.echo(
            f"{many(len(unscored), 'question')} could not be scored (left out of every mean); {unscored[0].id}: "
            f"{unscored[0].error}",
            err=True,
        )
    failed = [sample for result in results for sample in result.errors]
    if failed:
        raise RagmoeError(
            f"{many(len(failed), 'question')} failed (left out of every mean); {failed[0].id}: {failed[0].error}",
            hint=f"the records are in {folder}; {again} tries only these again",
        )


def tell_problems(folder: Path, problems: Sequence[str], error: type[RagmoeError], hint: str, as_json: bool) -> None:
    """What is wrong with a folder that was verified, as an error of the kind given; or that all is well."""
    if as_json:
        print_json({"ok": not problems, "problems": list(problems)})
        if problems:
            raise typer.Exit(1)
    elif problems:
        raise error(f"{folder} is damaged: {'; '.join(problems)}", hint=hint)
    else:
        typer.echo(f"{folder}: all is well")


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables on stdout."""
    from rich.console import Console

    # Into a pipe rich would fold at 80 columns.
    width = Console().width if sys.stdout.isatty() else 160
    for table in tables:
        # A terminal that is too narrow wraps the lines of a wide table; rich would cut its figures.
        Console(width=max(width, table.width)).print(table.rich())


def print_json(content: Any) -> None:
    """Print JSON on stdout."""
    typer.echo(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False))
