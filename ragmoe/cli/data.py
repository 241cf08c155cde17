"""``ragmoe data``: check question files against an index, and move them onto chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ragmoe._errors import DataError

app = typer.Typer(help="Check question files against an index.", no_args_is_help=True)

IndexOption = Annotated[Path, typer.Option("--index", metavar="DIR", help="The index folder.", show_default=False)]
# Without a limit one wrong index would print a line for every question.
_SHOWN = 50


@app.callback()
def _data() -> None:
    """Check question files against an index, and move them onto chunks."""


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Question files (jsonl).", show_default=False)],
    index: IndexOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Check that gold ids exist, spans are verbatim, ids are unique and splits disjoint; exit 1 if not."""
    from ragmoe.corpus.check import check_questions
    from ragmoe.index.folder import Index

    report = check_questions(files, Index.open(index).find)
    total = sum(report.questions.values())
    if as_json:
        problems = [{"place": problem.place, "reason": problem.reason} for problem in report.problems]
        content = {"ok": not problems, "questions": report.questions, "spans": report.spans, "problems": problems}
        typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
        if problems:
            raise typer.Exit(1)
        return
    if report.problems:
        shown = [str(problem) for problem in report.problems[:_SHOWN]]
        more = len(report.problems) - len(shown)
        typer.echo("\n".join([*shown, f"and {more} more (--json lists all)"] if more else shown))
        raise DataError(f"{len(report.problems)} problems in {total} questions")
    typer.echo(f"all is well: {total} questions in {len(files)} files, {report.spans} spans verbatim")


@app.command()
def remap(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Questions about the uncut passages (jsonl).", show_default=False)
    ],
    index: IndexOption,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write them.", show_default=False)],
) -> None:
    """Move gold ids and spans onto the chunks of an index built with chunking; each span is checked verbatim."""
    from ragmoe.corpus.chunking import remap_questions
    from ragmoe.corpus.questions import read_questions, write_questions
    from ragmoe.index.folder import Index

    questions = remap_questions(read_questions(file), list(Index.open(index).chunks()))
    write_questions(out, questions)
    typer.echo(f"{out}: {len(questions)} questions")
