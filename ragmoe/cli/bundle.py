"""``ragmoe bundle``: a saved model's versions, and the model as what it adds to its base, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragmoe._errors import BundleError
from ragmoe._folders import expect_folder
from ragmoe.cli._bundles import STARTER_NAME, BundleArgument, OwnBundleArgument, called, is_starter
from ragmoe.cli._output import JsonOption, print_json, print_tables, tell_problems

app = typer.Typer(
    help="Show and check a model's versions, go back to one; pack it, and unpack it.", no_args_is_help=True
)

_ROLLBACK_EXAMPLES = """Example:

  ragmoe experts prune runs/mine clinic
  ragmoe bundle rollback runs/mine"""
_PACK_EXAMPLES = """Example:

  ragmoe bundle pack runs/mine --out mine-packed
  ragmoe bundle unpack mine-packed --out mine"""
_UNPACK_EXAMPLES = """Example:

  ragmoe bundle unpack starter --out my-starter"""


@app.command()
def versions(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """List a model's versions and how each came about; the last is the current one."""
    from ragmoe.bundle import list_versions
    from ragmoe.evaluation.tables import Table

    steps = list_versions(bundle)
    if as_json:
        print_json([step.model_dump(exclude={"parent"}) for step in steps])
        return
    rows = [[str(s.version), s.time.removesuffix("+00:00").replace("T", " "), s.message] for s in steps]
    name = called(bundle)
    note = f"Any of them: load({name!r}, version=N)."
    if name != STARTER_NAME:
        note += f" Back to one: ragmoe bundle rollback {name} --to N"
    print_tables([Table(f"Versions of {name}", ["version", "time (UTC)", "what"], rows, note=note, labels=3)])


@app.command(epilog=_ROLLBACK_EXAMPLES)
def rollback(
    bundle: OwnBundleArgument,
    to: Annotated[
        int | None, typer.Option("--to", metavar="N", help="The version.", show_default="the one before")
    ] = None,
) -> None:
    """Make an earlier version the next one: its experts, gate, base and settings. Nothing is lost by it."""
    from ragmoe.bundle import roll_back

    map_ = roll_back(bundle, to)
    typer.echo(f"{bundle}: version {map_.version}, {map_.lineage[-1].message}")
    for said in map_.lineage[-1].changed:
        typer.echo(f"  {said}")


@app.command()
def verify(
    bundle: BundleArgument,
    version: Annotated[
        int | None, typer.Option("--version", metavar="N", help="The version.", show_default="the current one")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare each file of a model with its digest in the map, which opening it does not do."""
    from ragmoe.bundle import verify_bundle

    problems = verify_bundle(bundle, version=version)
    hint = f"copy the whole folder again, or see what there is: ragmoe bundle versions {bundle}"
    tell_problems(bundle, problems, BundleError, hint, as_json)


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
