"""Routing as an evaluation reports it, from the counts that every sample carries.

D domains here (not the model's width), L sparse layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ragmoe.evaluation.samples import Sample


def summarise_routing(
    samples: Sequence[Sample], layers: Sequence[int], experts: Sequence[str]
) -> dict[str, Any] | None:
    """Load, entropy and mutual information, over all samples that were read.

    Returns:
        None where nothing was routed, or there was but one expert to route to; else ``layers`` (of each: ``layer``,
        ``load`` [E] summing to one, ``entropy`` in nats, ``normalised_mi`` of domain and expert in 0..1,
        ``max_load``, and where any were lost the shares ``overflow`` of choices whose expert had no room and
        ``unserved`` of tokens that no expert served), the means over layers ``gate_entropy``, ``normalised_mi`` and
        ``max_load``, ``experts`` (names) and ``load_per_domain`` {domain: [L][E]}.
    """
    from ragmoe.moe.statistics import normalised_mutual_information

    routed = [sample for sample in samples if _is_routed(sample)]
    if not routed:
        return None
    domains = list(dict.fromkeys(sample.domain for sample in routed))
    counts_DLE = np.zeros((len(domains), len(layers), len(experts)))
    entropy_L, weight = np.zeros(len(layers)), 0.0
    lost_L2 = np.zeros((len(layers), 2))
    for sample in routed:
        counts_LE = np.asarray(sample.routing, dtype=float)
        counts_DLE[domains.index(sample.domain)] += counts_LE
        # Every layer sees the same tokens and makes the same number of choices, so the first layer's count weighs all.
        entropy_L += np.asarray(sample.gate_entropy) * counts_LE[0].sum()
        weight += counts_LE[0].sum()
        if sample.lost:
            lost_L2 += sample.lost
    tokens = sum(sample.tokens or 0 for sample in routed)
    of_all_L2 = np.stack([counts_DLE.sum(axis=(0, 2)), np.full(len(layers), tokens)], axis=1)
    lost_L2 /= np.maximum(of_all_L2, 1)
    load_LE = _shares(counts_DLE.sum(axis=0))
    rows = [
        {
            "layer": layer,
            "load": load_LE[at].tolist(),
            "entropy": float(entropy_L[at] / max(weight, 1.0)),
            "normalised_mi": float(normalised_mutual_information(counts_DLE[:, at])),
            "max_load": float(load_LE[at].max()),
            **({"overflow": float(lost_L2[at, 0]), "unserved": float(lost_L2[at, 1])} if lost_L2.any() else {}),
        }
        for at, layer in enumerate(layers)
    ]
    return {
        "layers": rows,
        "gate_entropy": float(np.mean([row["entropy"] for row in rows])),
        "normalised_mi": float(np.mean([row["normalised_mi"] for row in rows])),
        "max_load": float(np.mean([row["max_load"] for row in rows])),
        "experts": list(experts),
        "load_per_domain": {domain: _shares(counts_DLE[at]).tolist() for at, domain in enumerate(domains)},
    }


def routing_shift(real: Sequence[Sample], other: Sequence[Sample]) -> float | None:
    """How far a question's load moves when the gate sees other neighbours: 0 not at all, 1 to other experts entirely.

    The total variation distance between both loads, as a mean over layers and questions. None where nothing was routed.
    """
    before: Mapping[str, Sample] = {sample.id: sample for sample in real if _is_routed(sample)}
    pairs = [(before[sample.id], sample) for sample in other if _is_routed(sample) and sample.id in before]
    if not pairs:
        return None
    distances = [
        np.abs(_shares(np.asarray(a.routing, dtype=float)) - _shares(np.asarray(b.routing, dtype=float)))
        .sum(axis=-1)
        .mean()
        / 2
        for a, b in pairs
    ]
    return float(np.mean(distances))


def _is_routed(sample: Sample) -> bool:
    """Whether a gate had a choice: with a single expert it has none, and the model is dense."""
    return bool(sample.routing) and len(sample.routing[0]) > 1


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
