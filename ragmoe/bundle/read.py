"""Open a bundle: read its map, check the files against it, and put the experts back together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ragmoe._errors import BundleError
from ragmoe.bundle._files import file_digest, load_tensors, pick_tensors
from ragmoe.bundle._map import MAP_NAME, BundleMap, expert_file, expert_tensor


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder holds a bundle's map. One that cannot be parsed counts, so that opening it tells the damage."""
    path = Path(folder) / MAP_NAME
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return True
    metadata = content.get("metadata") if isinstance(content, dict) else None
    return isinstance(metadata, dict) and "format_version" in metadata


def read_map(folder: str | Path, *, version: int | None = None) -> BundleMap:
    """The map of a bundle: the current one, or an earlier version of it.

    Raises:
        BundleError: there is none, it is damaged, or there is no such version.
    """
    folder = Path(folder)
    current = _parse(_map_path(folder))
    if version is None or version == current.version:
        return current
    path = folder / "maps" / f"{version}.json"
    if not path.is_file():
        kept = sorted(int(file.stem) for file in folder.glob("maps/*.json") if file.stem.isdecimal())
        raise BundleError(f"{folder} has no version {version}; it has {[*kept, current.version]}")
    return _parse(path)


def read_bundle(
    folder: str | Path,
    *,
    version: int | None = None,
    experts: Sequence[int | str] | None = None,
    verify: bool = False,
    leave: Callable[[str], bool] | None = None,
) -> tuple[dict[str, Tensor], BundleMap]:
    """Read the tensors of a bundle, bit for bit as they were given to ``write_bundle``.

    Files that a map lists never change, so this is consistent while somebody else writes: it reads the map once, and
    then what that map lists. Fused tensors are stacked in the order of ``BundleMap.experts``; the others are
    memory-mapped (copied on write). Tensors that shared memory share it again.

    Args:
        version: an earlier version of the map instead of the current one.
        experts: ids or names of the experts to read, in the order in which they are stacked; the map that is returned
            knows of no others. None reads all.
        verify: also compare the sha256 of each file.
        leave: which fused tensors, by their names, stay in the files, for ``ExpertFiles`` to read.

    Raises:
        BundleError: the map or a file is missing or damaged, or does not hold what the map says, or an expert that was
            asked for is not there.
    """
    folder = Path(folder)
    map_ = read_map(folder, version=version)
    if experts is not None:
        map_ = with_experts(map_, experts)
    files = map_.files()
    if missing := sorted(file for file in files if not (folder / file).is_file()):
        raise BundleError(
            f"{folder} lacks {', '.join(missing)}, which its map (version {map_.version}) lists; "
            f"it has {_listing(folder)}",
            hint="Copy the whole folder again: a bundle is complete only with every file that its map lists.",
        )
    if verify:
        for file, digest in map_.digests.items():
            if (found := file_digest(folder / file)) != digest:
                raise BundleError(f"{folder / file} was changed: its sha256 is {found}, the map says {digest}")
    fused = [name for name in map_.fused if leave is None or not leave(name)]
    left = {expert_tensor(name, id) for name in set(map_.fused) - set(fused) for id in map_.expert_ids}
    state: dict[str, Tensor] = {}
    for file, names in files.items():
        state.update((name, x) for name, x in load_tensors(folder / file, names).items() if name not in left)
    for name in fused:
        state[name] = _stack(name, state, map_)
    for alias, name in map_.aliases.items():
        if name in state:
            state[alias] = state[name]
    return state, map_


def verify_bundle(folder: str | Path, *, version: int | None = None) -> list[str]:
    """What is wrong with a bundle's files, one sentence each: those that are gone, or have another sha256 than listed.

    Raises:
        BundleError: there is no map, it is damaged, or there is no such version.
    """
    folder, problems = Path(folder), []
    for file, digest in sorted(read_map(folder, version=version).digests.items()):
        if not (folder / file).is_file():
            problems.append(f"{file} is missing")
        elif (found := file_digest(folder / file)) != digest:
            problems.append(f"{file} was changed: its sha256 is {found}, the map says {digest}")
    return problems


class ExpertFiles:
    """Single experts of a bundle, read from their files when they are asked for, through a memory map.

    Files that a map lists never change: whoever publishes or rolls back meanwhile does not disturb.
    """

    def __init__(self, folder: str | Path, map_: BundleMap) -> None:
        """Read what a map lists; ``read_bundle`` returns one that may know of some experts only."""
        # Wherever the process goes later.
        self._folder, self._experts = Path(folder).resolve(), map_.experts

    def read(self, expert: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of one expert by the names of the fused ones, without the dimension E.

        They are mapped, not copied: the file is let go with the last of them.

        Args:
            expert: its place among the map's experts, not its id.

        Raises:
            BundleError: the file is missing or damaged, or lacks one of them.
        """
        entry = self._experts[expert]
        path = self._folder / expert_file(entry.id, entry.version)
        found = pick_tensors(path, [expert_tensor(name, entry.id) for name in names])
        return dict(zip(names, found.values(), strict=True))


def with_experts(map_: BundleMap, experts: Sequence[int | str]) -> BundleMap:
    """The map as if there were only some of its experts."""
    kept = [map_.find(expert) for expert in experts]
    if map_.fused and not kept:
        raise BundleError("no expert was asked for; expected at least one")
    if twice := [entry for at, entry in enumerate(kept) if entry in kept[:at]]:
        raise BundleError(f"expert {twice[0].id} ({twice[0].name}) was asked for twice; expected each expert once")
    files = {expert_file(e.id, e.version) for e in map_.experts} - {expert_file(e.id, e.version) for e in kept}
    return map_.model_copy(
        update={
            "experts": kept,
            "weight_map": {name: file for name, file in map_.weight_map.items() if file not in files},
            "digests": {file: digest for file, digest in map_.digests.items() if file not in files},
        }
    )


def _stack(name: str, state: dict[str, Tensor], map_: BundleMap) -> Tensor:
    """Take the parts of a fused tensor out of ``state`` and stack them."""
    parts = [state.pop(expert_tensor(name, id)) for id in map_.expert_ids]
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        each = ", ".join(f"expert {e.id} {tuple(x.shape)} {x.dtype}" for e, x in zip(map_.experts, parts, strict=True))
        raise BundleError(f"the experts disagree about '{name}': {each}")
    return torch.stack(parts)


def _map_path(folder: Path) -> Path:
    path = folder / MAP_NAME
    if path.is_file():
        return path
    hint = "ragmoe train CONFIG.yaml makes a bundle."
    if not folder.is_dir():
        raise BundleError(f"there is no bundle at {folder}: no such folder", hint=hint)
    raise BundleError(f"{folder} is not a bundle: it has no {MAP_NAME}, but {_listing(folder)}", hint=hint)


def _parse(path: Path) -> BundleMap:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    return BundleMap.from_json(text, str(path))


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    shown = ", ".join(names[:8]) or "nothing"
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
