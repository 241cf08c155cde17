"""``ragmoe index annotate``: record which experts served the questions about each passage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ragmoe.cli._bundles import to_read
from ragmoe.cli._thrift import Thrift


def annotate(
    index: Annotated[Path, typer.Argument(metavar="DIR", help="The index folder.", show_default=False)],
    model: Annotated[
        Path,
        typer.Option(metavar="BUNDLE", help="The model whose routing counts.", callback=to_read, show_default=False),
    ],
    questions: Annotated[
        list[str], typer.Option(metavar="FILE", help="Question files or globs; may be repeated.", show_default=False)
    ],
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="At most N questions of each domain; the record is made of these alone.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Record which experts served the questions about each passage; gates with memory route by it from then on."""
    from ragmoe.cli.progress import progress
    from ragmoe.evaluation.annotate import annotate as record
    from ragmoe.evaluation.annotate import gold_in
    from ragmoe.evaluation.task import subset
    from ragmoe.index import Index
    from ragmoe.index.memory import memory_path
    from ragmoe.training.data import load_questions

    opened, given = Index.open(index), load_questions(questions)
    usable = [question for question in given if gold_in(opened, question)]
    used = subset(usable, limit)
    reader = Thrift().load(model)
    with progress() as bars:
        memory = record(reader, opened, used or given, progress=bars.stage)
    found = {
        "questions": len(given),
        "used": len(used),
        "memory": str(memory_path(opened, memory.bundle)),
        "passages": len(opened),
        "recorded": int((memory.questions_P > 0).sum()),
        "by_domain": int(((memory.questions_P == 0) & (memory.affinity_PLE.sum(axis=(1, 2)) > 0)).sum()),
        "bundle": memory.bundle,
    }
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    typer.echo(
        f"{found['recorded']:,} of {found['passages']:,} passages speak for the experts that served them, "
        f"{found['by_domain']:,} for their domain's expert, the others for none"
    )
    without = f"; {len(given) - len(usable):,} have no gold passage in this index" if len(usable) < len(given) else ""
    typer.echo(f"used: {len(used):,} of {len(given):,} questions{without}")
    typer.echo(f"written: {found['memory']}")
    if not reader.memory(opened):
        typer.echo(f"the {reader.config.gate} gate has no memory and does not use it", err=True)
