"""``ragmoe index annotate``: record which experts served the questions about each passage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def annotate(
    index: Annotated[Path, typer.Argument(metavar="DIR", help="The index folder.", show_default=False)],
    model: Annotated[Path, typer.Option(metavar="BUNDLE", help="The model whose routing counts.", show_default=False)],
    questions: Annotated[
        list[str], typer.Option(metavar="FILE", help="Question files or globs; may be repeated.", show_default=False)
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many questions.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Record which experts served the questions about each passage; gates with memory route by it from then on."""
    from ragmoe.cli.progress import progress
    from ragmoe.evaluation.annotate import annotate as record
    from ragmoe.index import Index
    from ragmoe.index.memory import memory_path
    from ragmoe.models import load
    from ragmoe.training.data import load_questions

    opened, reader = Index.open(index), load(model)
    asked = load_questions(questions, limit)
    with progress() as bars:
        memory = record(reader, opened, asked, progress=bars.stage)
    found = {
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
    typer.echo(f"written: {found['memory']}")
    if not reader.memory(opened):
        typer.echo(f"the {reader.config.gate} gate has no memory and does not use it", err=True)
