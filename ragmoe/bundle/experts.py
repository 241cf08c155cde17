"""Single experts of a saved bundle: listed, renamed and pruned, each as the next version of its map.

No model is built and no file is changed: tensors of experts that stay keep their files, those of experts that go stay
with the earlier maps, which still open (``load(bundle, version=N)``). Merging is in merging.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ragmoe._errors import BundleError
from ragmoe.bundle._config import counted
from ragmoe.bundle._files import load_tensors
from ragmoe.bundle._map import THRESHOLDS, BundleMap, ExpertEntry, expert_file, expert_tensor
from ragmoe.bundle.read import read_map, with_experts
from ragmoe.bundle.write import write_bundle, write_map

# What the map's ``extra`` records of single experts, by id, beside THRESHOLDS: shares of the choices, and what adding
# one has cost.
LOAD, CERTIFICATES = "load", "certificates"


@dataclass(frozen=True)
class ExpertInfo:
    """One expert as it stands in a map.

    Attributes:
        load: for each sparse layer the share of the choices that fell on it as training ended, over the last steps that
            were logged; None where that was not recorded.
        certificate: what adding it has cost and brought, where it was added later.
        no_answer_threshold: a reader's for what most tokens take to this expert; None where that is the bundle's.
        history: the steps of the bundle's lineage that changed it.
    """

    id: int
    name: str
    version: int
    locked: bool
    file: str
    digest: str
    bytes: int
    parameters: int
    load: list[float] | None
    certificate: dict[str, Any] | None
    no_answer_threshold: float | None
    history: list[dict[str, Any]]

    @property
    def mean_load(self) -> float | None:
        """The share of choices as a mean over layers."""
        return sum(self.load) / len(self.load) if self.load else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "mean_load": self.mean_load}


def list_experts(bundle: str | Path, *, version: int | None = None) -> list[ExpertInfo]:
    """The experts of a bundle, in the order in which their tensors are stacked.

    Raises:
        BundleError: there is no bundle, or an expert's file is missing or damaged.
    """
    folder = Path(bundle)
    map_ = read_map(folder, version=version)
    return [_info(folder, map_, expert) for expert in map_.experts]


def show_expert(bundle: str | Path, expert: int | str, *, version: int | None = None) -> ExpertInfo:
    """One expert, by id or name.

    Raises:
        BundleError: there is no such expert, or its file is missing or damaged.
    """
    folder = Path(bundle)
    map_ = read_map(folder, version=version)
    return _info(folder, map_, map_.find(expert))


def rename_expert(bundle: str | Path, expert: int | str, name: str, *, message: str = "") -> BundleMap:
    """Give an expert another name; its id and its tensors stay.

    Raises:
        BundleError: there is no such expert, it is locked, or the name is empty or taken.
    """
    folder = Path(bundle)
    parent = read_map(folder)
    found = parent.find(expert)
    require_unlocked(folder, [found], "renamed")
    check_name(parent, name)
    experts = [e.model_copy(update={"name": name}) if e == found else e for e in parent.experts]
    new = parent.model_copy(update={"experts": experts})
    return write_map(folder, parent, new, message or f"rename {found.name} to {name}")


def prune_experts(
    bundle: str | Path, experts: Sequence[int | str], *, message: str = "", parent: BundleMap | None = None
) -> BundleMap:
    """Let experts leave the map; tokens that would have chosen them go to their next best.

    Args:
        parent: the map that this was decided by, which must still be the current one; None takes the current one.

    Raises:
        BundleError: there is no such expert, one is locked, or fewer would be left than each token chooses; or the
            bundle has changed since.
    """
    folder = Path(bundle)
    parent = read_map(folder) if parent is None else parent
    gone = [parent.find(expert) for expert in experts]
    kept = check_prune(folder, parent, gone)
    ids, going = [e.id for e in kept], len(parent.experts) - len(kept)
    new = with_experts(parent, ids)
    # All are of one size, and those that go may be the damaged ones.
    size = sum(x.nbytes for x in _tensors(folder, parent, kept[0]).values())
    about = {"total_size": parent.total_size - going * size, "extra": _recorded(parent, ids)}
    said = message or f"prune {', '.join(e.name for e in gone)}"
    return write_map(folder, parent, new.model_copy(update=about), said)


def check_prune(folder: Path, map_: BundleMap, gone: Sequence[ExpertEntry]) -> list[ExpertEntry]:
    """The experts that stay where some leave; BundleError where one must not, or too few would stay."""
    require_unlocked(folder, gone, "pruned")
    kept = [expert for expert in map_.experts if expert not in gone]
    require_enough(map_, len(kept))
    require_common(map_, gone)
    return kept


def publish(
    folder: Path,
    parent: BundleMap,
    state: Mapping[str, Tensor],
    experts: Sequence[tuple[int, str]],
    message: str,
    extra: Mapping[str, Any] | None = None,
) -> BundleMap:
    """Make experts with these ids and names the next version of a bundle; nothing else of it changes.

    Args:
        parent: the bundle's map, which must still be the current one.
        state: all tensors, the fused ones with the experts in this order.
        extra: laid over what the parent records; of its records about single experts those of the others are dropped.

    Raises:
        BundleError: as ``write_bundle`` does; nothing is published.
    """
    ids = [id for id, _ in experts]
    return write_bundle(
        folder,
        state,
        expert_tensors=set(parent.fused),
        gate_tensors=parent.gate_tensors,
        expert_ids=ids,
        expert_names=[name for _, name in experts],
        encoder=parent.encoder.model_dump() if parent.encoder else None,
        index=parent.index,
        extra=_recorded(parent, ids, extra),
        message=message,
        parent=parent,
    )


def _recorded(parent: BundleMap, ids: Sequence[int], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a map records where these experts follow those of ``parent``, with ``extra`` laid over it."""
    recorded = {**parent.extra, **(extra or {})}
    for key in (LOAD, CERTIFICATES, THRESHOLDS):
        if key in recorded:
            recorded[key] = {id: value for id, value in recorded[key].items() if int(id) in ids}
    if config := dict(recorded.get("config", {})):
        common = [expert.id for expert in common_experts(parent)]
        config |= {**counted(config, len(ids)), "common_experts": sum(id in common for id in ids)}
        recorded["config"] = config
    return recorded


def check_name(map_: BundleMap, name: str) -> None:
    """Raise BundleError unless an expert may be called that."""
    if not name.strip():
        raise BundleError("the name of an expert is empty")
    if name.isdecimal() or not name.isprintable():
        raise BundleError(
            f"{name!r} is no name for an expert: commands take numbers for ids, and names stand in one line"
        )
    if name in map_.expert_names:
        raise BundleError(f"there is an expert {name!r} already; names taken: {', '.join(map_.expert_names)}")


def _tensors(folder: Path, map_: BundleMap, expert: ExpertEntry) -> dict[str, Tensor]:
    """The tensors of one expert, mapped and not read, by their names on disk."""
    names = [expert_tensor(name, expert.id) for name in map_.fused]
    return load_tensors(folder / expert_file(expert.id, expert.version), names)


def _info(folder: Path, map_: BundleMap, expert: ExpertEntry) -> ExpertInfo:
    file, tensors = expert_file(expert.id, expert.version), _tensors(folder, map_, expert)
    return ExpertInfo(
        **expert.model_dump(),
        file=file,
        digest=map_.digests[file],
        bytes=(folder / file).stat().st_size,
        parameters=sum(x.numel() for x in tensors.values()),
        load=recorded_load(map_).get(str(expert.id)),
        certificate=map_.extra.get(CERTIFICATES, {}).get(str(expert.id)),
        no_answer_threshold=recorded_thresholds(map_).get(str(expert.id)),
        history=[
            step.model_dump(exclude={"parent"})
            for step in map_.lineage
            if any(said.startswith((f"expert {expert.id} ", f"expert {expert.id}:")) for said in step.changed)
        ],
    )


def recorded_load(map_: BundleMap) -> dict[str, list[float]]:
    """By id, the share of the choices that fell on an expert in each sparse layer as training ended."""
    return dict(map_.extra.get(LOAD, {}))


def recorded_thresholds(map_: BundleMap) -> dict[str, float]:
    """By id, the no-answer thresholds of a reader's experts that have their own."""
    return dict(map_.extra.get(THRESHOLDS, {}))


def require_unlocked(folder: Path, experts: Sequence[ExpertEntry], what: str) -> None:
    """Raise BundleError where one of them may not change."""
    for expert in experts:
        if expert.locked:
            raise BundleError(
                f"expert {expert.id} ({expert.name}) is locked and cannot be {what}",
                hint=f"ragmoe experts unlock {folder} {expert.id}",
            )


def require_enough(map_: BundleMap, left: int) -> None:
    """Raise BundleError where fewer experts would be left than each token chooses, or the gate lets none go."""
    from ragmoe.gates import gate_class

    config = map_.extra.get("config", {})
    if (gate := config.get("gate")) and (why := gate_class(gate).fixed_experts):
        raise BundleError(f"the gate {gate!r} lets no expert go: {why}")
    if (groups := config.get("n_group") or 1) > 1:
        raise BundleError(f"the experts stand in {groups} groups of one size (n_group): none can go alone")
    top_k = config.get("num_experts_per_tok") or config.get("top_k", 1)
    if left < top_k:
        raise BundleError(
            f"{left} of {len(map_.experts)} experts would be left, but each token chooses {top_k}; "
            f"the experts are {', '.join(map_.expert_names)}"
        )


def common_experts(map_: BundleMap) -> list[ExpertEntry]:
    """The experts that all domains share: the last ones, as many as the configuration says."""
    count = map_.extra.get("config", {}).get("common_experts", 0)
    return list(map_.experts[len(map_.experts) - count :])


def require_common(map_: BundleMap, gone: Sequence[ExpertEntry]) -> None:
    """Raise BundleError where a domain's expert and those in common would be fewer than a token chooses."""
    common = common_experts(map_)
    left = sum(expert not in gone for expert in common)
    config = map_.extra.get("config", {})
    top_k = config.get("num_experts_per_tok") or config.get("top_k", 1)
    if left < len(common) and top_k > 1 + left:
        raise BundleError(
            f"each token chooses {top_k} experts, its domain's and of those that all domains share, of which {left} "
            f"would be left; they are {', '.join(expert.name for expert in common)}"
        )
