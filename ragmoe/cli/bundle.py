"""``ragmoe bundle``: a saved model as what it adds to its base, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragmoe._folders import expect_folder
from ragmoe.cli._bundles import BundleArgument, is_starter

app = typer.Typer(help="Pack a model as what it adds to its base, and unpack it.", no_args_is_help=True)

_PACK_EXAMPLES = """Example:

  ragmoe bundle pack runs/mine --out mine-packed
  ragmoe bundle unpack mine-packed --out mine"""
_UNPACK_EXAMPLES = """Example:

  ragmoe bundle unpack starter --out my-starter"""


@app.command(epilog=_PACK_EXAMPLES)
def pack(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the packed model goes.", show_default=False)],
    base: Annotated[
        str, typer.Option(metavar="BASE", help="What it was trained from: minilm, a path or Hub id.")
    ] = "minilm",
    rank: Annotated[
        int, typer.Option(min=1, metavar="N", help="Sum of the ranks of the adapters it was trained by.")
    ] = 64,
) -> None:
    """Write what a model adds to its base, in half precision: a tenth of the size.

    For models trained with train.what: lora, gate, experts or gate+experts.
    """
    from ragmoe.models.packing import pack as pack_bundle

    expect_folder(out)
    written = pack_bundle(bundle, out, base=base, rank=rank)
    typer.echo(f"{out}: {written / 1e6:.1f} MB")
    typer.echo(f"next: ragmoe bundle unpack {out} --out NEW_BUNDLE")


@app.command(epilog=_UNPACK_EXAMPLES)
def unpack(
    packed: Annotated[
        Path, typer.Argument(metavar="PACKED", help="A packed model; starter is the packaged one.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="NEW_BUNDLE", help="Where the bundle goes.", show_default=False)],
) -> None:
    """Make a bundle of your own of a packed model."""
    from ragmoe.models.packing import unpack as unpack_bundle
    from ragmoe.models.starter import packed_starter

    folder = unpack_bundle(packed_starter() if is_starter(packed) else packed, out)
    typer.echo(f"{folder}: a bundle; look at it with: ragmoe experts ls {folder}")
