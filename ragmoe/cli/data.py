"""``ragmoe data``: check question files against an index, and move them onto chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragmoe._errors import DataError
from ragmoe.cli._output import JsonOption, print_json

app = typer.Typer(help="Check question files against an index, and move them onto chunks.", no_args_is_help=True)

IndexOption = Annotated[Path, typer.Option("--index", metavar="DIR", help="The index folder.", show_default=False)]
# Without a limit one wrong index would print a line for every question.
_SHOWN = 50


_CHECK_EXAMPLES = """Example:

  ragmoe data check data/*/train.jsonl data/*/dev.jsonl --index indexes/demo"""
_REMAP_EXAMPLES = """Example:

  ragmoe index build data/bank/corpus.jsonl --rechunk --chunk-words 60 --chunk-overlap 20 --out indexes/chunked
  ragmoe data remap data/bank/dev.jsonl --index indexes/chunked --out dev.chunked.jsonl"""


@app.command(epilog=_CHECK_EXAMPLES)
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Question files (jsonl).", show_default=False)],
    index: IndexOption,
    as_json: JsonOption = False,
) -> None:
    """Check that gold ids exist, spans are verbatim, ids are unique and splits disjoint; exit 1 if not."""
    from ragmoe.corpus.check import ONLY_CHUNKS, check_questions
    from ragmoe.index.folder import Index

    report = check_questions(files, Index.open(index).find)
    total = sum(report.questions.values())
    if as_json:
        problems = [{"place": problem.place, "reason": problem.reason} for problem in report.problems]
        content = {"ok": not problems, "questions": report.questions, "spans": report.spans, "problems": problems}
        print_json(content)
        if problems:
            raise typer.Exit(1)
        return
    if report.problems:
        shown = [str(problem) for problem in report.problems[:_SHOWN]]
        more = len(report.problems) - len(shown)
        typer.echo("\n".join([*shown, f"and {more} more (--json lists all)"] if more else shown))
        cut = any(problem.reason.endswith(ONLY_CHUNKS) for problem in report.problems)
        raise DataError(
            f"{len(report.problems)} problems in {total} questions",
            hint=f"move them onto the chunks: ragmoe data remap FILE --index {index} --out NEW.jsonl" if cut else None,
        )
    plural = "" if len(files) == 1 else "s"
    typer.echo(f"all is well: {total} questions in {len(files)} file{plural}, {report.spans} spans verbatim")


@app.command(epilog=_REMAP_EXAMPLES)
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
