"""The groups of tensors that have a version each (base, gate, every expert), and the files they are in."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ragmoe._errors import BundleError
from ragmoe.bundle._files import load_tensors, same_bits, write_tensors
from ragmoe.bundle._map import MAP_NAME, BundleMap, ExpertEntry, base_file, expert_file, gate_file, version_of
from ragmoe.bundle._parts import Parts


@dataclass(frozen=True)
class Group:
    """Tensors that have one version: the base, the gate, or an expert."""

    kind: str
    label: str
    tensors: dict[str, Tensor]
    locked: bool = False


@dataclass(frozen=True)
class Saved:
    """Where the tensors of a group are."""

    version: int
    files: dict[str, list[str]]
    digests: dict[str, str]
    change: str | None = None


def make_groups(parts: Parts, experts: Sequence[ExpertEntry]) -> list[Group]:
    """Base, gate and experts, each with a label for messages."""
    groups = [Group("base", "base", parts.base), Group("gate", "gate", parts.gate)]
    for expert in experts:
        label = f"expert {expert.id} ({expert.name})"
        groups.append(Group(f"expert.{expert.id}", label, parts.experts[expert.id], expert.locked))
    return groups


def save_groups(
    folder: Path, old: BundleMap | None, groups: Sequence[Group], max_shard_bytes: int, fixed: Container[str] = ()
) -> dict[str, Saved]:
    """Write the groups that differ from what the folder has; by kind, where each one is now.

    Args:
        fixed: kinds of groups that must not differ.
    """
    taken = _versions_taken(folder)
    kept = {group.kind: _kept(folder, old, group) for group in groups}
    for group in groups:
        if group.locked and kept[group.kind] is None:
            raise BundleError(f"{group.label} is locked, and the tensors to be saved differ from those it has")
        if group.kind in fixed and kept[group.kind] is None:
            raise BundleError(f"{group.label} must stay as it is, but the tensors to be saved differ from those it has")
    return {
        group.kind: kept[group.kind] or _write_group(folder, group, taken.get(group.kind, 0), max_shard_bytes)
        for group in groups
    }


def _kept(folder: Path, old: BundleMap | None, group: Group) -> Saved | None:
    """Where the group is already, bit for bit; None where it is not."""
    files = {file: names for file, names in old.files().items() if _kind(file) == group.kind} if old else {}
    if {name for names in files.values() for name in names} != group.tensors.keys():
        return None
    if not files:
        return Saved(0, {}, {})
    try:
        for file, names in files.items():
            have = load_tensors(folder / file, names)
            if not all(same_bits(have[name], group.tensors[name]) for name in names):
                return None
    except BundleError:
        # A damaged or missing file is not what is to be saved, so it is written anew.
        return None
    version = version_of(next(iter(files)))
    assert old is not None and version is not None
    return Saved(version[1], files, {file: old.digests[file] for file in files})


def _write_group(folder: Path, group: Group, last_version: int, max_shard_bytes: int) -> Saved:
    if not group.tensors:
        return Saved(0, {}, {}, change=f"{group.label}: removed")
    version = last_version + 1
    shards = _shards(group.tensors, max_shard_bytes) if group.kind == "base" else [group.tensors]
    files, digests = {}, {}
    for part, tensors in enumerate(shards, start=1):
        file = _file(group.kind, version, part, len(shards))
        digests[file] = write_tensors(folder / file, tensors)
        files[file] = list(tensors)
    return Saved(version, files, digests, change=f"{group.label}: version {version}")


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _versions_taken(folder: Path) -> dict[str, int]:
    """By kind the highest version that any map lists or any file carries, committed or not; none is written twice."""
    names = [path.name for path in folder.iterdir()]
    for path in (*folder.glob(MAP_NAME), *folder.glob("maps/*.json")):
        names += re.findall(r'"([^"/]+\.safetensors)"', path.read_text(encoding="utf-8", errors="replace"))
    taken: dict[str, int] = {}
    for found in map(version_of, names):
        if found:
            taken[found[0]] = max(taken.get(found[0], 0), found[1])
    return taken


def _kind(file: str) -> str:
    found = version_of(file)
    return found[0] if found else ""


def _file(kind: str, version: int, part: int, parts: int) -> str:
    if kind == "base":
        return base_file(version, part, parts)
    return gate_file(version) if kind == "gate" else expert_file(int(kind.removeprefix("expert.")), version)
