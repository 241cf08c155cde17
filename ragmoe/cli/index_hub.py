"""``ragmoe index push`` and ``pull``: indexes to and from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragmoe._words import many
from ragmoe.cli._index_output import built
from ragmoe.cli._output import JsonOption, print_json
from ragmoe.cli.index_change import IndexArgument

PUSH_EXAMPLES = """Examples:

  ragmoe index push indexes/mine me/mine-index
  ragmoe index push indexes/mine me/mine-index --public"""
PULL_EXAMPLES = """Examples:

  ragmoe index pull me/mine-index --out indexes/mine
  ragmoe index pull me/mine-index --out indexes/mine --revision v1 --overwrite"""

RepoArgument = Annotated[
    str, typer.Argument(metavar="REPO", help="A data set repository: OWNER/NAME.", show_default=False)
]


def push(
    folder: IndexArgument,
    repo: RepoArgument,
    public: Annotated[
        bool, typer.Option("--public", help="Where the repository is made now: everybody may read it.")
    ] = False,
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="The encoder, where its folder has moved since the build.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify an index and put it on the Hub, in one commit."""
    from ragmoe.index.hub import push_index

    manifest = push_index(folder, repo, public=public, encoder=encoder)
    if as_json:
        print_json({"repo": repo, "passages": manifest.passages, "index": manifest.digest})
    else:
        typer.echo(f"{repo}: {many(manifest.passages, 'passage')} of {folder} ({manifest.digest[:12]})")


def pull(
    repo: RepoArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The index folder to write.", show_default=False)],
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="A branch, tag or commit.", show_default="the newest")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Get an index from the Hub; it takes its place once every digest is right."""
    from ragmoe.index.hub import pull_index

    manifest = pull_index(repo, out, revision=revision, overwrite=overwrite)
    if as_json:
        print_json({"out": str(out), "repo": repo, "passages": manifest.passages, "index": manifest.digest})
    else:
        typer.echo(built(out, manifest))
