"""The versions of a bundle: which there are, the way back to one, and experts that may not change.

Files that a map has listed stay, so that going back is a map like any other: the next version, which lists the files of
an earlier one. Nothing is lost by it, and it can be taken back itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ragmoe._errors import BundleError
from ragmoe.bundle._map import BundleMap, LineageStep
from ragmoe.bundle.read import read_map
from ragmoe.bundle.write import write_map


def list_versions(bundle: str | Path) -> list[LineageStep]:
    """How each version of a bundle came about, first to last; the last is the current one.

    Raises:
        BundleError: there is no bundle.
    """
    return list(read_map(bundle).lineage)


def roll_back(bundle: str | Path, version: int | None = None, *, message: str = "") -> BundleMap:
    """Make an earlier version's experts, gate, base and settings those of the bundle's next version.

    Locks stay as they are: what is locked now stays so, and must be in that version what it is now.

    Args:
        version: None is the one before the current one.

    Raises:
        BundleError: there is no such version, one of its files is missing, it differs in nothing from the current one,
            or a locked expert would change or leave, its threshold included.
    """
    folder = Path(bundle)
    parent = read_map(folder)
    if version is None:
        version = parent.version - 1
        if not version:
            raise BundleError(f"{folder} is version 1: there is none before it")
    wanted = read_map(folder, version=version)
    for expert in parent.experts:
        then = wanted.expert(expert.id)
        if expert.locked and (then is None or (then.version, then.name) != (expert.version, expert.name)):
            found = "not there" if then is None else f"version {then.version}, named {then.name}"
            raise BundleError(
                f"expert {expert.id} ({expert.name}) is locked at its version {expert.version}; in version {version} "
                f"of the bundle it is {found}",
                hint=f"ragmoe experts unlock {folder} {expert.id}",
            )
    locked = {expert.id: expert.locked for expert in parent.experts}
    experts = [e.model_copy(update={"locked": locked.get(e.id, e.locked)}) for e in wanted.experts]
    said = message or f"roll back to version {version}"
    map_ = write_map(folder, parent, wanted.model_copy(update={"experts": experts}), said, restores=version)
    if map_.version == parent.version:
        raise BundleError(
            f"version {version} of {folder} is what version {parent.version} is: there is nothing to do",
            hint=f"ragmoe bundle versions {folder} lists them; --to N names one",
        )
    return map_


def lock_experts(
    bundle: str | Path, experts: Sequence[int | str], *, locked: bool = True, message: str = ""
) -> BundleMap:
    """Let experts, by id or name, no longer be changed, renamed, merged or pruned; or (``locked=False``) again.

    Where all are so already, nothing is written.

    Raises:
        BundleError: there is no such expert.
    """
    folder = Path(bundle)
    parent = read_map(folder)
    ids = {parent.find(expert).id for expert in experts}
    entries = [e.model_copy(update={"locked": locked}) if e.id in ids else e for e in parent.experts]
    names = ", ".join(e.name for e in parent.experts if e.id in ids)
    said = message or f"{'lock' if locked else 'unlock'} {names}"
    return write_map(folder, parent, parent.model_copy(update={"experts": entries}), said)
