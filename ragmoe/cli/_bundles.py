"""The argument BUNDLE, which may be ``starter``: the packaged reader, unpacked where it is first wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragmoe._errors import UsageError
from ragmoe._folders import cache_folder

STARTER_NAME = "starter"


def is_starter(bundle: Path) -> bool:
    """Whether the packaged reader is meant, and no folder of that name."""
    return str(bundle) == STARTER_NAME and not bundle.exists()


def to_read(bundle: Path) -> Path:
    """A bundle's folder, for commands that leave it as it is."""
    if not is_starter(bundle):
        return bundle
    # Not before it is needed: it brings torch, and --help should be quick.
    from ragmoe.models.starter import starter_folder

    return starter_folder()


def called(bundle: Path) -> str:
    """What to call a bundle's folder: starter for the packaged reader's, wherever it was unpacked."""
    packaged = bundle.parent == cache_folder() and bundle.name.startswith(f"{STARTER_NAME}-")
    return STARTER_NAME if packaged else str(bundle)


def to_change(bundle: Path) -> Path:
    """A bundle's folder, for commands that make a new version; UsageError for the packaged one."""
    if is_starter(bundle):
        raise UsageError(
            "the starter belongs to the package: a copy of your own can be changed",
            hint="ragmoe bundle unpack starter --out my-starter",
        )
    return bundle


WithoutOption = Annotated[
    list[str] | None,
    typer.Option("--without", metavar="EXPERT", help="Hold this expert back; may be repeated.", show_default=False),
]
_HELP = "The model; starter is the packaged one."
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help=_HELP, callback=to_read, show_default=False)]
OwnBundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="The model.", callback=to_change, show_default=False)
]
