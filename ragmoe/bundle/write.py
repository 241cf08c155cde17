"""Save a bundle: write what changed under new versions, then replace the map, which commits it all at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ragmoe._errors import BundleError
from ragmoe.bundle._config import refresh_config
from ragmoe.bundle._files import file_digest, remove_unfinished, write_text
from ragmoe.bundle._groups import Saved, make_groups, save_groups
from ragmoe.bundle._map import MAP_NAME, THRESHOLDS, BundleMap, EncoderRef, ExpertEntry, LineageStep
from ragmoe.bundle._parts import Parts, count_experts, split_state
from ragmoe.bundle._summary import SUMMARY_NAME, summary
from ragmoe.bundle.read import is_bundle, read_map

_LOCK_NAME = ".bundle.lock"
_LOCK_SECONDS = 60.0
# What a plain `save_pretrained` leaves. Hugging Face looks for `model.safetensors` before it looks for the map.
_STRAY = re.compile(
    r"(model|pytorch_model)\.(safetensors|bin)|pytorch_model\.bin\.index\.json"
    r"|(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)"
)


def write_bundle(
    folder: str | Path,
    state_dict: Mapping[str, Tensor],
    *,
    expert_tensors: set[str],
    gate_tensors: set[str],
    expert_ids: Sequence[int] | None = None,
    expert_names: Sequence[str] | None = None,
    encoder: Mapping[str, str] | None = None,
    index: str | None = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 2 << 30,
    message: str = "",
    parent: BundleMap | None = None,
    finish: Callable[[], None] | None = None,
) -> BundleMap:
    """Save a model's tensors as a bundle, or as the next version of the bundle that is there.

    Saving over a bundle, an expert, the gate or the base whose content is unchanged keeps its file and version; what
    changed gets a new file. Files and maps of earlier versions stay and still open. Nothing is visible before the map
    is replaced, last of all; if nothing changed it is not replaced. Writers wait for each other. What a plain
    ``save_pretrained`` left in the folder is removed afterwards. Encoder, index and extra are recorded as given: what
    is left out is not carried over from the version before.

    Args:
        state_dict: any tensors; those that share memory entirely are saved once.
        expert_tensors: names whose first dimension is E; each expert's part goes into that expert's file.
        gate_tensors: names that go into the gate's file.
        expert_ids: one an expert, in the order of the first dimension; by default those that the bundle has, or
            0 to E-1. New ones must be at least the bundle's ``next_expert_id``.
        expert_names: likewise; by default those that the bundle has, or ``expert<id>``.
        encoder: ``{"id": ..., "digest": ...}`` of the encoder whose embeddings the gate sees.
        index: digest of the index it was trained with.
        extra: anything else to record, as JSON.
        max_shard_bytes: largest file of the base, except where one tensor is larger.
        message: recorded in the lineage.
        parent: publish only as the next version of this map, and only if the base, the gate and the experts that stay
            keep their files, digests included; experts may join, leave or be renamed. ``config.json`` follows.
        finish: called once the map is replaced, while other writers still wait: writes copies of what it says.

    Raises:
        BundleError: the arguments contradict each other or the bundle that is there, a locked expert would change or
            leave, ``parent`` is no longer the bundle's map or would not be kept, or another writer does not finish
            within a minute.
    """
    folder = Path(folder)
    about = _About.checked(encoder, index, extra)
    with _locked(folder):
        remove_unfinished(folder)
        old = read_map(folder) if is_bundle(folder) else None
        fixed = _fixed(folder, old, parent)
        experts = _experts(old, count_experts(state_dict, expert_tensors), expert_ids, expert_names)
        parts = split_state(state_dict, expert_tensors, gate_tensors, [expert.id for expert in experts])
        saved = save_groups(folder, old, make_groups(parts, experts), max_shard_bytes, fixed)
        new = _compose(old, experts, parts, saved, about)
        new = _publish(folder, old, new, [group.change for group in saved.values() if group.change], message)
        if parent is not None:
            refresh_config(folder, new)
        if finish is not None:
            finish()
        return new


def write_map(
    folder: str | Path, parent: BundleMap, new: BundleMap, message: str, *, restores: int | None = None
) -> BundleMap:
    """Make a map over files that the bundle has already its next version, whatever version it says it is.

    ``config.json`` follows.

    Args:
        parent: the bundle's map, which must still be the current one.
        restores: the version that it goes back to, where it does.

    Raises:
        BundleError: the bundle has changed meanwhile, a file is missing, a locked expert's threshold would change, or
            another writer does not finish.
    """
    folder = Path(folder)
    with _locked(folder):
        old = read_map(folder)
        _fixed(folder, old, parent)
        if missing := sorted(file for file in new.digests if not (folder / file).is_file()):
            raise BundleError(f"{folder} lacks {', '.join(missing)}, which version {new.version} of its map lists")
        following = {"version": old.version, "lineage": old.lineage, "next_expert_id": old.next_expert_id}
        new = new.model_copy(update=following)
        new = _publish(folder, old, new, _other_files(old, new), message, restores)
        refresh_config(folder, new)
        return new


def _other_files(old: BundleMap, new: BundleMap) -> list[str]:
    """Which parts of a bundle have other files in another map of it, in words."""
    found = [
        f"{part}: version {then} in the place of {now}"
        for part, now, then in (
            ("base", old.base_version, new.base_version),
            ("gate", old.gate_version, new.gate_version),
        )
        if now != then
    ]
    for expert in new.experts:
        before = old.expert(expert.id)
        if before is None:
            found.append(f"expert {expert.id} ({expert.name}): back, version {expert.version}")
        elif before.version != expert.version:
            found.append(
                f"expert {expert.id} ({expert.name}): version {expert.version} in the place of {before.version}"
            )
    return found


def _publish(
    folder: Path, old: BundleMap | None, new: BundleMap, changed: list[str], message: str, restores: int | None = None
) -> BundleMap:
    """Put the map in force where it says anything new, and leave the folder as a reader expects it."""
    if old is not None:
        _check_locked_thresholds(folder, old, new)
    if new != old:
        new = _with_step(folder, old, new, changed, message, restores)
        _commit(folder, old, new)
    write_text(folder / SUMMARY_NAME, summary(new, folder))
    _remove_strays(folder)
    return new


def _check_locked_thresholds(folder: Path, old: BundleMap, new: BundleMap) -> None:
    """Raise BundleError where a locked expert would answer by another threshold."""
    before, after = (map_.extra.get(THRESHOLDS, {}) for map_ in (old, new))
    for expert in old.experts:
        id = str(expert.id)
        if expert.locked and new.expert(expert.id) and before.get(id) != after.get(id):
            raise BundleError(
                f"expert {id} ({expert.name}) is locked: its no-answer threshold cannot change from {before.get(id)} "
                f"to {after.get(id)}",
                hint=f"ragmoe experts unlock {folder} {id}",
            )


def _fixed(folder: Path, old: BundleMap | None, parent: BundleMap | None) -> set[str]:
    """The groups that must not change where a map is to follow ``parent``, which must still be there."""
    if parent is None:
        return set()
    if old != parent:
        raise BundleError(
            f"{folder} was changed by somebody else meanwhile: it has version {old.version if old else 'none'}, "
            f"expected {parent.version}",
            hint="Give the same command again, on what is there now.",
        )
    return {"base", "gate", *(f"expert.{id}" for id in parent.expert_ids)}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock; what the system refuses becomes a ``BundleError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / _LOCK_NAME, timeout=_LOCK_SECONDS):
            yield
    except Timeout as error:
        raise BundleError(
            f"somebody else has been writing to {folder} for {_LOCK_SECONDS:.0f} s (lock file {folder / _LOCK_NAME})",
            hint="Wait for it to finish, or save to another folder.",
        ) from error
    except OSError as error:
        raise BundleError(f"cannot write the bundle {folder}: {error}") from error


@dataclass(frozen=True)
class _About:
    """What is recorded beside the tensors."""

    encoder: EncoderRef | None
    index: str | None
    extra: dict[str, Any]

    @classmethod
    def checked(cls, encoder: Mapping[str, str] | None, index: str | None, extra: Mapping[str, Any] | None) -> _About:
        if encoder is not None and encoder.keys() != {"id", "digest"}:
            raise BundleError(f"encoder needs the keys id and digest; got {sorted(encoder)}")
        try:
            # Through JSON and back, so that what is recorded equals what will be read.
            plain = json.loads(json.dumps(dict(extra or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise BundleError(f"extra cannot be recorded as JSON: {error}") from error
        return cls(EncoderRef(**encoder) if encoder else None, index, plain)


def _experts(
    old: BundleMap | None, count: int, ids: Sequence[int] | None, names: Sequence[str] | None
) -> list[ExpertEntry]:
    """Ids, names and locks of the experts to save; the versions are those of ``old``, or 1."""
    if ids is None:
        ids = old.expert_ids if old and old.experts else list(range(count))
    if len(ids) != count or len(set(ids)) != count:
        raise BundleError(
            f"the tensors have {count} experts; the expert ids are {list(ids)}",
            hint="Name the id of each expert with expert_ids, new ones from next_expert_id on.",
        )
    known = {expert.id: expert for expert in old.experts} if old else {}
    if leaving := [expert for expert in known.values() if expert.locked and expert.id not in ids]:
        raise BundleError(f"expert {leaving[0].id} ({leaving[0].name}) is locked and cannot leave")
    first_free = old.next_expert_id if old else 0
    if reused := [id for id in ids if id not in known and id < first_free]:
        raise BundleError(f"expert ids are never reused: {reused} were used before; the next free one is {first_free}")
    if names is None:
        names = [known[id].name if id in known else f"expert{id}" for id in ids]
    if len(names) != count or len(set(names)) != count or not all(names):
        raise BundleError(f"expected {count} different expert names; got {list(names)}")
    for id, name in zip(ids, names, strict=True):
        if id in known and known[id].locked and known[id].name != name:
            raise BundleError(f"expert {id} ({known[id].name}) is locked and cannot be renamed to {name}")
    fresh = ExpertEntry(id=0, name="?", version=1)
    return [
        known.get(id, fresh).model_copy(update={"id": id, "name": name}) for id, name in zip(ids, names, strict=True)
    ]


def _compose(
    old: BundleMap | None,
    experts: Sequence[ExpertEntry],
    parts: Parts,
    saved: Mapping[str, Saved],
    about: _About,
) -> BundleMap:
    """The map of what is saved now, still with the version and lineage of ``old``."""
    entries = [expert.model_copy(update={"version": saved[f"expert.{expert.id}"].version}) for expert in experts]
    everything = (parts.base, parts.gate, *parts.experts.values())
    return BundleMap(
        version=old.version if old else 1,
        experts=entries,
        next_expert_id=max([old.next_expert_id if old else 0, *(entry.id + 1 for entry in entries)]),
        fused=parts.fused,
        aliases=parts.aliases,
        digests={file: digest for group in saved.values() for file, digest in group.digests.items()},
        gate_version=saved["gate"].version,
        base_version=saved["base"].version,
        lineage=old.lineage if old else [],
        encoder=about.encoder,
        index=about.index,
        extra=about.extra,
        total_size=sum(tensor.nbytes for tensors in everything for tensor in tensors.values()),
        weight_map={name: file for group in saved.values() for file, names in group.files.items() for name in names},
    )


def _with_step(
    folder: Path, old: BundleMap | None, new: BundleMap, changed: list[str], message: str, restores: int | None
) -> BundleMap:
    """The map as the version after ``old``, with the step that led to it."""
    version = old.version + 1 if old else 1
    step = LineageStep(
        version=version,
        parent=file_digest(folder / MAP_NAME) if old else None,
        changed=changed + (_differences(old, new) if old else []),
        message=message,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        restores=restores,
    )
    return new.model_copy(update={"version": version, "lineage": [*new.lineage, step]})


def _differences(old: BundleMap, new: BundleMap) -> list[str]:
    """What differs beside the tensors' content, in words."""
    found = [f"expert {e.id} ({e.name}): removed" for e in old.experts if e.id not in new.expert_ids]
    stay = [id for id in new.expert_ids if id in old.expert_ids]
    if stay != [id for id in old.expert_ids if id in stay]:
        found.append(f"order of the experts: {new.expert_ids}")
    for expert in new.experts:
        before = old.expert(expert.id)
        if before and before.name != expert.name:
            found.append(f"expert {expert.id}: renamed from {before.name} to {expert.name}")
        if before and before.locked != expert.locked:
            found.append(f"expert {expert.id} ({expert.name}): {'locked' if expert.locked else 'unlocked'}")
    beside = ("encoder", "index", "extra", "aliases")
    return found + [f"{name} changed" for name in beside if getattr(old, name) != getattr(new, name)]


def _commit(folder: Path, old: BundleMap | None, new: BundleMap) -> None:
    """Keep the former map, then replace it by the new one."""
    path = folder / MAP_NAME
    text = new.to_json()
    BundleMap.from_json(text, f"the map to be saved in {folder}")
    if old is not None:
        (folder / "maps").mkdir(exist_ok=True)
        write_text(folder / "maps" / f"{old.version}.json", path.read_text(encoding="utf-8"))
    write_text(path, text)


def _remove_strays(folder: Path) -> None:
    for path in folder.iterdir():
        if _STRAY.fullmatch(path.name):
            path.unlink()
