"""What routing did, counted: load per expert, entropy of the gate, mutual information of domain and expert.

L sparse layers, E experts, D domains here (not the model's width), S tokens, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ragmoe.gates.routing import Routing

#: A sequence goes to an expert where at least this share of its tokens calls it, as a mean over layers.
MOST = 0.5


class SequenceRouting(NamedTuple):
    """What routing did with one sequence.

    Attributes:
        tokens: how many, without padding.
        entropy_L: the sum of their gates' entropies (nats), by layer.
        lost_L2: how many choices found no room with their expert, and how many tokens no expert served.
        chosen_LE: how many choices fell on each expert.
    """

    tokens: float
    entropy_L: np.ndarray
    lost_L2: np.ndarray
    chosen_LE: np.ndarray

    @property
    def calls_E(self) -> np.ndarray:
        """The share of tokens that call each expert, as a mean over layers."""
        return np.asarray(self.chosen_LE.mean(axis=0) / max(self.tokens, 1.0))

    def plus(self, other: SequenceRouting) -> SequenceRouting:
        """What routing did with both."""
        return SequenceRouting(
            self.tokens + other.tokens,
            self.entropy_L + other.entropy_L,
            self.lost_L2 + other.lost_L2,
            self.chosen_LE + other.chosen_LE,
        )


def count_routing(routings: Sequence[Routing], mask_S: Tensor, sequences: int) -> list[SequenceRouting]:
    """Count each of the B sequences of a batch; see ``RoutingStatistics.update``."""
    return fetch_sums(routing_sums(routings, mask_S, sequences), len(routings))


@torch.no_grad()
def routing_sums(routings: Sequence[Routing], mask_S: Tensor, sequences: int) -> Tensor:
    """What ``count_routing`` counts, on the device: float32 (B, X), which may be added up before it is fetched."""
    mask_BT = mask_S.view(sequences, -1)
    parts = [mask_BT.sum(dim=1, keepdim=True, dtype=torch.float32)]
    for routing in routings:
        log_SE = routing.logits_SE.log_softmax(dim=-1)
        # An expert that is not available has the logarithm -inf, and NaN where none is: neither adds anything.
        log_SE = log_SE.masked_fill(routing.logits_SE.isneginf(), 0.0)
        entropy_BT = -(log_SE.exp() * log_SE).sum(dim=-1).view(mask_BT.shape)
        chosen_SE = routing.choices_SE() * mask_S.unsqueeze(1)
        parts.append((entropy_BT * mask_BT).sum(dim=1, keepdim=True))
        parts += [lost_S.view(mask_BT.shape).sum(dim=1, keepdim=True) for lost_S in _lost(routing, mask_S)]
        parts.append(chosen_SE.view(*mask_BT.shape, -1).sum(dim=1))
    return torch.cat(parts, dim=1)


def fetch_sums(sums_BX: Tensor, layers: int) -> list[SequenceRouting]:
    """What ``routing_sums`` counted, fetched from the device at once: each fetch waits until all before is computed."""
    found = sums_BX.cpu().numpy().astype(float)
    of_layer_BLX = found[:, 1:].reshape(len(found), layers, -1)
    return [
        SequenceRouting(row[0], one[:, 0], one[:, 1:3], one[:, 3:])
        for row, one in zip(found, of_layer_BLX, strict=True)
    ]


class RoutingStatistics:
    """Accumulates routings over many batches.

    Attributes:
        layers: the indices of the sparse layers.
        of_domain: what was counted of each domain, in order of appearance.
    """

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self.layers = list(layers)
        self.experts = experts
        self.of_domain: dict[str, SequenceRouting] = {}

    def update(self, routings: Sequence[Routing], mask_S: Tensor, domains: Sequence[str]) -> None:
        """Count one batch.

        Args:
            routings: one for each sparse layer, of S tokens.
            mask_S: bool, False for padding.
            domains: of each of the B sequences; S is a multiple of B.
        """
        if len(routings) != len(self.layers):
            raise ValueError(f"{len(routings)} routings for {len(self.layers)} sparse layers")
        for counted, domain in zip(count_routing(routings, mask_S, len(domains)), domains, strict=True):
            self.add(counted, domain)

    def add(self, counted: SequenceRouting, domain: str) -> None:
        """Count one sequence of a domain."""
        known = self.of_domain.get(domain)
        self.of_domain[domain] = counted if known is None else known.plus(counted)

    @property
    def domains(self) -> list[str]:
        """The domains seen, in order of appearance."""
        return list(self.of_domain)

    @property
    def counts_DLE(self) -> np.ndarray:
        """How many choices fell on each expert, by domain and layer."""
        if not self.domains:
            return np.zeros((0, len(self.layers), self.experts))
        return np.stack([counted.chosen_LE for counted in self.of_domain.values()])

    @property
    def load_DLE(self) -> np.ndarray:
        """Share of each domain's choices, summing to one over E."""
        return _shares(self.counts_DLE)

    @property
    def load_LE(self) -> np.ndarray:
        """Share of all choices, summing to one over E."""
        return _shares(self.counts_DLE.sum(axis=0))

    def summary(self) -> dict[str, Any]:
        """Per layer and as means: load, entropy (nats) of a token's gate, normalised mutual information, top load.

        Per layer also what limits and missing experts do: ``overflow``, the share of choices whose expert had no room,
        and ``unserved``, the share of tokens that no expert served.
        """
        counts_DLE, load_LE = self.counts_DLE, self.load_LE
        choices_L = counts_DLE.sum(axis=(0, 2))
        counted = list(self.of_domain.values())
        tokens = sum(one.tokens for one in counted)
        entropy_L = sum((one.entropy_L for one in counted), np.zeros(len(self.layers)))
        lost_L2 = sum((one.lost_L2 for one in counted), np.zeros((len(self.layers), 2)))
        layers = [
            {
                "layer": layer,
                "load": load_LE[at].tolist(),
                "entropy": float(entropy_L[at] / max(tokens, 1)),
                "normalised_mi": normalised_mutual_information(counts_DLE[:, at]),
                "max_load": float(load_LE[at].max()),
                "overflow": float(lost_L2[at, 0] / max(choices_L[at], 1)),
                "unserved": float(lost_L2[at, 1] / max(tokens, 1)),
            }
            for at, layer in enumerate(self.layers)
        ]

        def mean(key: str) -> float | None:
            return float(np.mean([layer[key] for layer in layers])) if layers else None

        return {
            "layers": layers,
            "gate_entropy": mean("entropy"),
            "normalised_mi": mean("normalised_mi"),
            "max_load": mean("max_load"),
        }


def _lost(routing: Routing, mask_S: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token how many choices found no room with their expert, and whether no expert serves it; float32 (S,)."""
    E = routing.logits_SE.shape[1]
    served_SK = routing.experts_SK if routing.served_SK is None else routing.served_SK
    overflow_S = (served_SK != routing.experts_SK).sum(dim=1) * mask_S
    unserved_S = ((served_SK == E).all(dim=1) | routing.logits_SE.isneginf().all(dim=1)) & mask_S
    return overflow_S.float(), unserved_S.float()


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def normalised_mutual_information(counts_DE: np.ndarray) -> float:
    """Mutual information of domain and expert over the mean of their entropies: 0 independent, 1 one-to-one.

    Every domain counts the same, however many tokens it has, as it does in a macro score.
    """
    counts_DE = counts_DE[counts_DE.sum(axis=1) > 0]
    if not len(counts_DE):
        return 0.0
    joint_DE = _shares(counts_DE) / len(counts_DE)
    domain_D, expert_E = joint_DE.sum(axis=1), joint_DE.sum(axis=0)
    mean_entropy = (_entropy(domain_D) + _entropy(expert_E)) / 2
    if mean_entropy < 1e-12:
        return 0.0
    information = _entropy(domain_D) + _entropy(expert_E) - _entropy(joint_DE.reshape(-1))
    return float(max(0.0, information / mean_entropy))


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
