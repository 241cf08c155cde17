"""The reader that comes with the package: ``load("starter")``, and ``starter`` wherever a command wants a bundle."""

from __future__ import annotations

import os
from pathlib import Path

from ragmoe._errors import BundleError
from ragmoe._folders import cache_folder
from ragmoe.bundle import is_bundle
from ragmoe.models.packing import is_packed, read_about, unpack

STARTER = "starter"
PACKED = Path(__file__).parents[1] / STARTER


def resolve_bundle(bundle: str | os.PathLike[str]) -> Path:
    """The folder of a bundle; that of the packaged reader for ``starter``, where no folder has that name."""
    path = Path(bundle)
    return starter_folder() if str(bundle) == STARTER and not path.exists() else path


def starter_folder() -> Path:
    """Where the packaged reader lies as an ordinary bundle; it is unpacked there when it is first wanted.

    The place is ``ragmoe`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, or ``$RAGMOE_CACHE``; about 100 MB.

    Raises:
        BundleError: the package has none, its files are damaged, or there is no place to write.
    """
    packed = packed_starter()
    digest = read_about(packed).digest
    folder = cache_folder() / f"{STARTER}-{digest[:12]}"
    if is_bundle(folder):
        return folder
    try:
        return unpack(packed, folder)
    except OSError as error:
        raise BundleError(
            f"the starter cannot be unpacked in {folder.parent}: {error.strerror}",
            hint="export RAGMOE_CACHE=DIR names another place",
        ) from None


def packed_starter() -> Path:
    """Where the package keeps it; BundleError where this installation has none."""
    if not is_packed(PACKED):
        raise BundleError(
            f"this installation of ragmoe comes without its starter, which would lie in {PACKED}",
            hint="ragmoe train eval/experiments/halvern.yaml --out runs/mine makes a bundle in minutes",
        )
    return PACKED
