"""``ragmoe experts add``: a new expert for a domain that a bundle does not know, without forgetting what it knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ragmoe._errors import UsageError
from ragmoe._folders import expect_folder
from ragmoe.cli._bundles import is_starter, to_read
from ragmoe.cli._output import (
    OVERRIDES,
    OVERRIDES_HELP,
    DataOption,
    JsonOption,
    print_json,
    print_tables,
)
from ragmoe.cli._stopped import again, on_stop
from ragmoe.cli.progress import progress

if TYPE_CHECKING:
    from ragmoe.training import TrainingConfig
    from ragmoe.training.adding import Added

Bundle = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="The model; starter is the packaged one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar=OVERRIDES, help=f"For the training, as in ragmoe train; {OVERRIDES_HELP}", show_default=False
    ),
]
Name = Annotated[
    str, typer.Option(metavar="NAME", help="Of the expert: its domain's, where it has one.", show_default=False)
]
Index = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Holds the new passages, best beside the known; a token gate needs none.",
        show_default=False,
    ),
]
Questions = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="A reader's, to learn from; may be repeated.", show_default="made of --corpus"),
]
Corpus = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE", help="The new documents; a language model learns from them.", show_default="by --questions"
    ),
]
Start = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="shared|nearest|EXPERT", help="What it starts as.", show_default="shared, or nearest"
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, metavar="N", help="Optimiser steps.", show_default="300")]
Others = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Questions (or documents) it is not for.", show_default="the index's others"),
]
Dev = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Questions (or documents) to judge it by.", show_default="a tenth, kept aside"),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="TASK", help="What the bundle must not forget.", show_default=False),
]
Known = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE", help="Documents that a language model must not forget, for --task.", show_default=False
    ),
]
TaskIndex = Annotated[Path | None, typer.Option(metavar="DIR", help="For the tasks.", show_default="--index")]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Judge by N questions (documents) a domain.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="NEW_BUNDLE", help="A copy that gets it.", show_default="BUNDLE's next version"),
]


def add(
    bundle: Bundle,
    overrides: Overrides = None,
    *,
    name: Name,
    index: Index = None,
    questions: Questions = None,
    corpus: Corpus = None,
    start: Start = None,
    steps: Steps = None,
    others: Others = None,
    dev: Dev = None,
    tasks: Tasks = None,
    known: Known = None,
    task_index: TaskIndex = None,
    data: DataOption = None,
    limit: Limit = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what did not finish.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin again what did not finish.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Describe the training, then stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train one expert for a new domain and publish it with its certificate; all else stays as it is, to the bit.

    Its gate rows learn when to call it from documents alone: those it is for, and the others in the index. Without
    questions it learns to read from the documents as well: sentences with a gap, as `ragmoe data cloze` makes them.
    An expert of a causal language model learns to predict the documents of --corpus.
    """
    from ragmoe.cli.experts import find_tasks
    from ragmoe.training import Judges, add_expert, new_expert_config

    if out is not None:
        expect_folder(out)
        bundle = to_read(bundle)
    elif is_starter(bundle):
        raise UsageError(
            "the starter belongs to the package: a copy of your own can get an expert",
            hint="--out NEW_BUNDLE makes one",
        )
    if task_index is not None and not tasks:
        raise UsageError("--task-index says where a task is read, but no --task was given")
    judges = Judges(dev or (), find_tasks(tasks, data, None), known or (), task_index, limit)
    config = new_expert_config(
        bundle,
        name,
        index=index,
        questions=questions or (),
        start=start,
        corpus=corpus or (),
        others=others or (),
        judges=judges,
        steps=steps,
        overrides=overrides or (),
    )
    if dry_run:
        _describe(config, as_json)
        return
    go_on = again("--resume", without=["--overwrite"])
    with on_stop(lambda: f"what is trained so far is kept; go on with: {go_on}"), progress() as show:
        added = add_expert(bundle, config, judges, out=out, resume=resume, overwrite=overwrite, show=show)
    _tell(added, as_json)


def _describe(config: TrainingConfig, as_json: bool) -> None:
    from ragmoe.training import prepare
    from ragmoe.training.describe import describe

    report = describe(prepare(config))
    print_json(report) if as_json else typer.echo(report["text"])


def _tell(added: Added, as_json: bool) -> None:
    from ragmoe.cli.experts import certificate_table

    expert = added.map.experts[-1]
    if as_json:
        print_json({"bundle": str(added.bundle), "version": added.map.version, "id": expert.id, **added.certificate})
        return
    print_tables([certificate_table(added.certificate)])
    typer.echo(f"{added.bundle}: version {added.map.version} has the expert {expert.id} ({expert.name})")
    typer.echo(f"next: ragmoe experts show {added.bundle} {expert.id}")
