"""Put one expert in the place of two: their mean, as the next version of a bundle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ragmoe._errors import BundleError
from ragmoe.bundle._map import THRESHOLDS, BundleMap, ExpertEntry
from ragmoe.bundle.experts import (
    LOAD,
    check_name,
    common_experts,
    publish,
    recorded_load,
    recorded_thresholds,
    require_enough,
    require_unlocked,
)
from ragmoe.bundle.read import read_bundle, read_map


@dataclass(frozen=True)
class Merge:
    """What a merge did: the new map and expert, how the two were weighed, and the share of the norm that is kept."""

    map: BundleMap
    expert: ExpertEntry
    weights: tuple[float, float]
    kept: float


def merge_experts(bundle: str | Path, a: int | str, b: int | str, name: str, *, message: str = "") -> Merge:
    """Put one new expert, with an id of its own, in the place of two.

    Its tensors stand for the mean of the two, weighed by their recorded loads (equally where there are none): of full
    experts it is the mean of the weights; of LoRA experts the mean of the products, cut back to their rank. In the
    gate its logit is ``sum_i w_i l_i + H(w)`` with the entropy H in nats, the tightest bound from below of
    ``log sum_i exp(l_i)`` that is linear in the two (Gibbs' inequality): rows are averaged, and H joins the balance
    bias, which moves the choice and not the weights. Sigmoid scores are no logits, and stay averaged. So are no-answer
    thresholds, where both have one of their own; else the bundle's holds.

    Raises:
        BundleError: there is no such expert, both are the same, one is locked, the name is taken, or too few would be
            left.
    """
    folder = Path(bundle)
    parent = read_map(folder)
    pair = parent.find(a), parent.find(b)
    if pair[0] == pair[1]:
        raise BundleError(f"{a!r} and {b!r} are the same expert, {pair[0].id} ({pair[0].name}); expected two")
    require_unlocked(folder, pair, "merged")
    if name not in (pair[0].name, pair[1].name):
        check_name(parent, name)
    require_enough(parent, len(parent.experts) - 1)
    if shared := [expert.name for expert in pair if expert in common_experts(parent)]:
        raise BundleError(f"{' and '.join(shared)}: all domains share it; expected two experts of domains")
    weights = _weights(parent, pair)
    rows, kept = _merge(folder, parent, pair, weights)
    new = parent.next_expert_id
    order = [new if e.id == pair[0].id else e.id for e in parent.experts if e.id != pair[1].id]
    state, _ = read_bundle(folder, version=parent.version)
    for tensor in parent.fused:
        of = dict(zip(parent.expert_ids, state[tensor], strict=True)) | {new: rows[tensor]}
        state[tensor] = torch.stack([of[id] for id in order])
    state |= {alias: state[tensor] for alias, tensor in parent.aliases.items()}
    experts = [(id, name if id == new else parent.find(id).name) for id in order]
    load = recorded_load(parent)
    if all(str(e.id) in load for e in pair):
        load[str(new)] = [x + y for x, y in zip(*(load[str(e.id)] for e in pair), strict=True)]
    thresholds = recorded_thresholds(parent)
    if all(str(e.id) in thresholds for e in pair):
        thresholds[str(new)] = sum(w * thresholds[str(e.id)] for w, e in zip(weights, pair, strict=True))
    said = message or f"merge {pair[0].name} and {pair[1].name} into {name}"
    recorded = {LOAD: load, **({THRESHOLDS: thresholds} if thresholds else {})}
    map_ = publish(folder, parent, state, experts, said, extra=recorded)
    return Merge(map_, map_.find(new), weights, kept)


def _weights(map_: BundleMap, pair: tuple[ExpertEntry, ExpertEntry]) -> tuple[float, float]:
    """The share of each in what both carry."""
    load = recorded_load(map_)
    carried = [sum(load.get(str(expert.id), ())) for expert in pair]
    known = all(str(expert.id) in load for expert in pair) and any(carried)
    share = carried[0] / sum(carried) if known else 0.5
    return share, 1 - share


def _merge(
    folder: Path, map_: BundleMap, pair: tuple[ExpertEntry, ExpertEntry], weights: tuple[float, float]
) -> tuple[dict[str, Tensor], float]:
    """The tensors of the expert that stands for a pair, and the share of the norm they keep."""
    from ragmoe.experts import experts_class

    state, _ = read_bundle(folder, version=map_.version, experts=[expert.id for expert in pair])
    entropy = -sum(w * math.log(w) for w in weights if w) if _scores(map_) == "softmax" else 0.0
    layers: dict[str, list[str]] = {}
    merged: dict[str, Tensor] = {}
    for name in map_.fused:
        # A reader's are in its layers' ``moe``, a decoder's in their ``mlp``.
        prefix, mark, _ = name.rpartition(".experts.")
        if mark:
            layers.setdefault(prefix + mark, []).append(name)
            continue
        x_2 = state[name].double()
        mean = weights[0] * x_2[0] + weights[1] * x_2[1]
        if name.endswith(".balance_bias"):
            mean = mean + entropy
        merged[name] = mean.to(state[name].dtype)
    kind = experts_class(map_.extra.get("config", {}).get("expert_kind", "ffn"))
    norms = kept = 0.0
    for prefix, names in layers.items():
        rows = [{name.removeprefix(prefix): state[name][at] for name in names} for at in range(2)]
        one = kind.merge_all(rows, weights)
        merged |= {prefix + name: x for name, x in one.tensors.items()}
        norms, kept = norms + one.norm**2, kept + one.kept**2
    return merged, math.sqrt(kept / norms) if norms else 1.0


def _scores(map_: BundleMap) -> str:
    """By what the gates rank experts: the configuration's own setting, or what the family has."""
    from transformers import CONFIG_MAPPING

    from ragmoe.models import families  # noqa: F401  makes them known

    config = map_.extra.get("config", {})
    kind = config.get("model_type")
    # Its own ``get`` imports every family there is.
    family = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401
    return str(config.get("scores") or getattr(family, "scores", "softmax"))
