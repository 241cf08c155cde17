"""``ragmoe data``: check question files against an index, move them onto chunks, and make some where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragmoe._errors import DataError, UsageError
from ragmoe._words import many
from ragmoe.cli._output import JsonOption, print_json

app = typer.Typer(
    help="Check question files, move them onto chunks, or make some from documents.", no_args_is_help=True
)

IndexOption = Annotated[Path, typer.Option("--index", metavar="DIR", help="The index folder.", show_default=False)]
# Without a limit one wrong index would print a line for every question.
_SHOWN = 50


_CHECK_EXAMPLES = """Example:

  ragmoe data check data/*/train.jsonl data/*/dev.jsonl --index indexes/demo"""
_REMAP_EXAMPLES = """Example:

  ragmoe index build data/bank/corpus.jsonl --rechunk --chunk-words 60 --chunk-overlap 20 --out indexes/chunked
  ragmoe data remap data/bank/dev.jsonl --index indexes/chunked --out dev.chunked.jsonl"""
_CLOZE_EXAMPLES = """Example:

  ragmoe data cloze --index indexes/demo --domain bank --split train --out runs/cloze.jsonl"""


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
            f"{many(len(report.problems), 'problem')} in {many(total, 'question')}",
            hint=f"move them onto the chunks: ragmoe data remap FILE --index {index} --out NEW.jsonl" if cut else None,
        )
    typer.echo(
        f"all is well: {many(total, 'question')} in {many(len(files), 'file')}, {many(report.spans, 'span')} verbatim"
    )


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
    typer.echo(f"{out}: {many(len(questions), 'question')}")


@app.command(epilog=_CLOZE_EXAMPLES)
def cloze(
    index: IndexOption,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write them.", show_default=False)],
    domain: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only of this domain; may be repeated.", show_default="all")
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only of documents of this split.", show_default="all")
    ] = None,
    per_passage: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many a passage answers.")] = 3,
    seed: Annotated[int, typer.Option(metavar="N", help="Other spans for another seed.")] = 0,
) -> None:
    """Make questions to train on from documents alone: a sentence with a gap that another passage fills.

    Only documents of several passages give any. They teach reading; to evaluate, ask real questions.
    """
    from ragmoe.corpus.cloze import cloze_questions
    from ragmoe.corpus.questions import write_questions
    from ragmoe.index.folder import Index

    opened = Index.open(index)
    passages = [opened.passage(name) for name in opened.passage_ids]
    kept = [p for p in passages if (not domain or p.domain in domain) and (split is None or p.split == split)]
    if not kept:
        domains, splits = (
            ", ".join(sorted({x or "(none)" for x in of})) for of in zip(*((p.domain, p.split) for p in passages))
        )
        raise UsageError(f"no passage of {index} is of that domain and split; there are: {domains}; splits: {splits}")
    questions = cloze_questions(kept, per_passage=per_passage, seed=seed)
    if not questions:
        documents = len({passage.doc_id or passage.id for passage in kept})
        raise DataError(
            f"{many(len(kept), 'passage')} of {many(documents, 'document')} gave no question: "
            "no two passages of one document speak of the same thing",
            hint="cut documents into several passages: ragmoe index build SOURCE --rechunk --chunk-words 100 --out DIR",
        )
    write_questions(out, questions)
    typer.echo(
        f"{out}: {many(len(questions), 'question')} of {many(len({q.gold_ids[0] for q in questions}), 'passage')}"
    )
