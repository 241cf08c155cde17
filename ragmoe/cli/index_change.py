"""``ragmoe index add``, ``remove`` and ``merge``: change an index without encoding what is encoded already."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ragmoe._errors import DataError, UsageError
from ragmoe._words import many
from ragmoe.cli._index_output import built, done_summary, kept, plan_summary, print_plan, run_plan
from ragmoe.cli._output import JsonOption, print_json
from ragmoe.cli._stopped import on_stop

if TYPE_CHECKING:
    from ragmoe.index.plan import BuildPlan

ADD_EXAMPLES = """Examples:

  ragmoe index add indexes/mine new/*.md
  ragmoe index add indexes/mine more.jsonl --domain law --dry-run"""
REMOVE_EXAMPLES = """Examples:

  ragmoe index remove indexes/mine --ids gone.txt
  ragmoe index remove indexes/mine --domain law"""
MERGE_EXAMPLES = """Examples:

  ragmoe index merge indexes/mine indexes/yours --out indexes/ours"""


class OnErrorChoice(StrEnum):
    """What to do about a bad line."""

    fail = "fail"
    skip = "skip"


IndexArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The index folder.", show_default=False)]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Read, check and estimate; write nothing.")]
EncodingOption = Annotated[
    str, typer.Option(metavar="NAME", help="Of text files: utf-8, latin-1, cp1252, utf-16 and others.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with what was stopped.")]


def add(
    folder: IndexArgument,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="jsonl, parquet, csv, txt, md or html files, folders of them, globs, or hub:NAME[:CONFIG][:SPLIT].",
            show_default=False,
        ),
    ],
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="The encoder, where its folder has moved since the build.")
    ] = None,
    domain: Annotated[str | None, typer.Option(metavar="NAME", help="The domain of records that name none.")] = None,
    on_error: Annotated[
        OnErrorChoice, typer.Option(help="At a bad line: stop, or skip and count it.")
    ] = OnErrorChoice.fail,
    encoding: EncodingOption = "utf-8",
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add passages to an index, cut and encoded as it was built.

    A passage that is there already, by the digest of its title and text, is passed over and counted. What `annotate`
    recorded of the others stays.
    """

    def plan() -> BuildPlan:
        from ragmoe.index.change import plan_add

        return plan_add(
            folder,
            sources,
            encoder=encoder,
            domain=domain,
            on_error=on_error.value,
            encoding=encoding,
            resume=resume,
        )

    run_command(folder, plan, "nothing to add: all of it is there already", dry_run, as_json)


def remove(
    folder: IndexArgument,
    ids: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with an id a line: these go.", show_default=False)
    ] = None,
    domain: Annotated[
        str | None, typer.Option(metavar="NAME", help="All passages of this domain go.", show_default=False)
    ] = None,
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove passages from an index; nothing is encoded, and what is left keeps what `annotate` recorded of it."""
    if (ids is None) == (domain is None):
        raise UsageError(f"{'neither' if ids is None else 'both'} of --ids and --domain given; expected one of them")
    names = _read_ids(ids) if ids else frozenset()

    def plan() -> BuildPlan:
        from ragmoe.index.change import plan_remove

        return plan_remove(folder, ids=names, domain=domain, resume=resume)

    run_command(folder, plan, "nothing to remove: all of it is gone already", dry_run, as_json)


def merge(
    first: Annotated[Path, typer.Argument(metavar="A", help="An index folder.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="C", help="The index folder to write.", show_default=False)],
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make one index of two that were made in the same way; both stay as they are, and nothing is encoded.

    A passage that both have under one id comes once where its title and text are the same, and is an error otherwise.
    """

    def plan() -> BuildPlan:
        from ragmoe.index.change import plan_merge

        return plan_merge(first, second, out, resume=resume, overwrite=overwrite)

    run_command(out, plan, "", dry_run, as_json)


def run_command(folder: Path, make: Callable[[], BuildPlan], nothing: str, dry_run: bool, as_json: bool) -> None:
    """Plan, show the plan, and do it.

    Args:
        nothing: said in place of the plan where the index stays as it is.
    """
    with on_stop(lambda: kept(folder)):
        plan = make()
        if nothing and plan.done is not None:
            skipped = plan.rows.skipped
            bad = f"; {many(len(skipped), 'bad line')} skipped, the first: {skipped[0]}" if skipped else ""
            typer.echo(f"{folder}: {nothing}{bad}", err=True)
        else:
            print_plan(plan)
            plan.check_room()
        if dry_run:
            if as_json:
                print_json(plan_summary(plan))
            return
        manifest = run_plan(plan)
    if as_json:
        print_json(done_summary(plan, manifest))
    else:
        typer.echo(built(folder, manifest))


def _read_ids(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start + 1}") from None
    ids = frozenset(line.strip() for line in lines if line.strip())
    if not ids:
        raise DataError(f"{path} holds no ids; expected one a line")
    return ids
