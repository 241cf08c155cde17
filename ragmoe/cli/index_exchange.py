"""``ragmoe index export`` and ``import``: indexes for and from other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ragmoe._words import many
from ragmoe.cli._output import JsonOption, print_json
from ragmoe.cli.index_change import (
    DryRunOption,
    EncodingOption,
    IndexArgument,
    OnErrorChoice,
    ResumeOption,
    run_command,
)

if TYPE_CHECKING:
    from ragmoe.index.plan import BuildPlan

EXPORT_EXAMPLES = """Examples:

  ragmoe index export indexes/mine mine.parquet --to parquet
  ragmoe index export indexes/mine mine-beir --to beir"""
IMPORT_EXAMPLES = """Examples:

  ragmoe index import vectors.npy corpus.jsonl --encoder minilm --out indexes/mine
  ragmoe index import vectors.parquet corpus.jsonl --encoder BAAI/bge-small-en-v1.5 --out indexes/mine"""


def export(
    folder: IndexArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What to write.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="parquet (a file with embeddings) or beir (a folder with corpus.jsonl).",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Write the passages of an index for other programs, with their embeddings in parquet."""
    from ragmoe.index.export import export_index

    manifest = export_index(folder, out, to=to)
    if as_json:
        print_json({"out": str(out), "form": to, "passages": manifest.passages, "index": manifest.digest})
    else:
        typer.echo(f"{out}: {many(manifest.passages, 'passage')} of {folder} ({manifest.digest[:12]})")


def import_(
    vectors: Annotated[
        Path,
        typer.Argument(
            metavar="VECTORS", help="A .npy of floats, or a .parquet with id and embedding.", show_default=False
        ),
    ],
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help="The passages, as for build.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The index folder to write.", show_default=False)],
    encoder: Annotated[str, typer.Option(metavar="NAME", help="What made the vectors.", show_default=False)],
    ids: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With .npy: an id a line; without it, rows stand as the passages do."),
    ] = None,
    domain: Annotated[str | None, typer.Option(metavar="NAME", help="The domain of records that name none.")] = None,
    windows: Annotated[
        bool, typer.Option("--windows", help="Longer passages are means of windows, as of build; else they were cut.")
    ] = False,
    on_error: Annotated[
        OnErrorChoice, typer.Option(help="At a bad line: stop, or skip and count it.")
    ] = OnErrorChoice.fail,
    encoding: EncodingOption = "utf-8",
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make an index of passages and of vectors that something else made.

    Some passages are encoded again by the encoder that is named: other vectors than its own are refused.
    """

    def plan() -> BuildPlan:
        from ragmoe.index.given import ImportOptions, plan_import

        options = ImportOptions(
            vectors,
            tuple(sources),
            out,
            ids=ids,
            encoder=encoder,
            domain=domain,
            on_error=on_error.value,
            long_passages="windows" if windows else "truncate",
            encoding=encoding,
            resume=resume,
            overwrite=overwrite,
        )
        return plan_import(options)

    run_command(out, plan, "", dry_run, as_json)
