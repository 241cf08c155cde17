"""Take experts that were trained in another copy of a bundle: nothing is trained, nothing else changes."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ragmoe._errors import BundleError
from ragmoe._words import many
from ragmoe.bundle._config import counted
from ragmoe.bundle._map import LOCAL, THRESHOLDS, BundleMap, expert_tensor
from ragmoe.bundle.experts import CERTIFICATES, check_name, publish, recorded_thresholds
from ragmoe.bundle.read import read_bundle, read_map, with_experts

# What copies of one model may say differently: how many experts there are, what training alone goes by (any dropout
# too), and by what the bundle itself answers.
_OWN = {
    *LOCAL, "architectures", "common_experts", "no_answer_threshold", "balance_loss", "z_loss", "losses", "gate_jitter",
    "gate_noise", "initializer_range", "vote_start", "use_cache",
}  # fmt: skip


def take_experts(
    bundle: str | Path,
    source: str | Path,
    experts: Sequence[int | str],
    *,
    version: int | None = None,
    message: str = "",
) -> BundleMap:
    """Let experts of another copy of a bundle join it, behind its own, with the gate rows that call them.

    Base and gates must be the same to the bit, as they stay where experts are added (``ragmoe experts add``): then an
    expert says in one copy what it says in the other. Experts that are trained apart and brought together without
    training are FlexOlmo's (Shi et al. 2025). Each keeps its name, its no-answer threshold and its certificate, which
    then says that it was measured elsewhere, and gets an id of its own. An earlier version of the bundle itself may be
    the source: so one that was pruned comes back.

    Args:
        experts: ids or names in ``source``.
        version: of ``source``; None is its current one.

    Raises:
        BundleError: there is no such expert, its name is taken, the bundles differ in base, gates or settings, the gate
            takes no new expert, or a file is damaged. Nothing is changed then.
    """
    folder, other = Path(bundle), Path(source)
    parent, theirs = read_map(folder), read_map(other, version=version)
    taken = with_experts(theirs, experts).experts
    _check_same_model(folder, parent, other, theirs)
    _check_gate(parent)
    for expert in taken:
        _check_name(parent, expert.name, other)
    state, _ = read_bundle(folder, version=parent.version)
    rows, _ = read_bundle(other, version=theirs.version, experts=[expert.id for expert in taken], verify=True)
    _check_same_tensors(folder, state, parent, other, rows, theirs)
    for name in parent.fused:
        state[name] = torch.cat([state[name], rows[name]])
    state |= {alias: state[name] for alias, name in parent.aliases.items()}
    ids = {expert.id: parent.next_expert_id + at for at, expert in enumerate(taken)}
    thresholds, theirs_of = recorded_thresholds(parent), recorded_thresholds(theirs)
    thresholds |= {str(new): theirs_of[str(old)] for old, new in ids.items() if str(old) in theirs_of}
    certificates = {**parent.extra.get(CERTIFICATES, {}), **_certificates(theirs, ids)}
    names = ", ".join(expert.name for expert in taken)
    map_ = publish(
        folder,
        parent,
        state,
        [*((e.id, e.name) for e in parent.experts), *((ids[e.id], e.name) for e in taken)],
        message or f"take {names} from {other.resolve().name}, version {theirs.version}",
        extra={
            **({CERTIFICATES: certificates} if certificates else {}),
            **({THRESHOLDS: thresholds} if thresholds else {}),
        },
    )
    for old, new in ids.items():
        # How it was trained.
        if (record := other / "experts" / str(old)).is_dir():
            shutil.copytree(record, folder / "experts" / str(new), dirs_exist_ok=True)
    return map_


def _certificates(theirs: BundleMap, ids: dict[int, int]) -> dict[str, Any]:
    """By its new id the certificate of each expert that has one, with the bundle that it was first taken from."""
    found = theirs.extra.get(CERTIFICATES, {})
    first = {"taken": {"from": theirs.content}}
    return {str(new): {**first, **found[str(old)]} for old, new in ids.items() if str(old) in found}


def _check_name(map_: BundleMap, name: str, other: Path) -> None:
    """Raise BundleError where an expert may not come under its name."""
    try:
        check_name(map_, name)
    except BundleError as error:
        raise BundleError(
            error.message, hint=f"ragmoe experts rename {other} {shlex.quote(name)} ANOTHER_NAME"
        ) from None


def _check_gate(map_: BundleMap) -> None:
    """Raise BundleError where the gate takes no new expert."""
    from ragmoe.gates.joining import why_none_can_join

    config = map_.extra.get("config", {})
    gate, selection = config.get("gate"), config.get("selection") or "top_k"
    if gate and (why := why_none_can_join(gate, selection, config.get("n_group") or 1)):
        message, hint = why
        raise BundleError(message, hint=hint)


def _check_same_model(folder: Path, ours: BundleMap, other: Path, theirs: BundleMap) -> None:
    """Raise BundleError unless both bundles are of one model by what their maps say."""
    hint = _hint(folder)
    if not ours.fused:
        raise BundleError(f"{folder} is dense: it has no gate that could choose an expert")
    here, there = _settings(ours), _settings(theirs)
    # What one of them does not say was no choice when it was made.
    if differing := [
        f"{key} ({here[key]!r}, there {there[key]!r})" for key in here.keys() & there.keys() if here[key] != there[key]
    ]:
        raise BundleError(
            f"{other} is another model than {folder}; it differs in {', '.join(sorted(differing))}", hint=hint
        )
    if ours.fused != theirs.fused:
        raise BundleError(f"{other} is another model than {folder}: its experts consist of other tensors", hint=hint)
    if ours.encoder != theirs.encoder:
        named = [map_.encoder.id if map_.encoder else "none" for map_ in (ours, theirs)]
        raise BundleError(
            f"the gates see embeddings of other encoders: {folder} of {named[0]}, {other} of {named[1]}", hint=hint
        )


def _check_same_tensors(
    folder: Path,
    ours: Mapping[str, Tensor],
    parent: BundleMap,
    other: Path,
    theirs: Mapping[str, Tensor],
    map_: BundleMap,
) -> None:
    """Raise BundleError unless what all experts share is the same to the bit."""
    here, there = _common(parent), _common(map_)
    # Tensors of files that are one need no look.
    suspected = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    if names := [name for name in suspected if not _same(ours.get(name), theirs.get(name))]:
        raise BundleError(
            f"{other} differs from {folder} in {many(len(names), 'tensor')} that all experts share, for example "
            f"{names[0]}: an expert that was trained there says something else here",
            hint=_hint(folder),
        )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _hint(folder: Path) -> str:
    return f"experts can be taken between copies of one bundle: ragmoe experts add {folder} --name NAME --out COPY"


def _settings(map_: BundleMap) -> dict[str, Any]:
    config = map_.extra.get("config", {})
    own = _OWN | counted(config, 0).keys()
    return {key: value for key, value in config.items() if key not in own and "dropout" not in key}


def _common(map_: BundleMap) -> dict[str, str]:
    """The tensors that belong to no single expert, each with the digest of its file."""
    owned = {expert_tensor(name, id) for name in map_.fused for id in map_.expert_ids}
    return {name: map_.digests[file] for name, file in map_.weight_map.items() if name not in owned}
