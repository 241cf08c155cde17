"""A start for gates that see the neighbours: an expert for each kind of them.

Experts begin alike, so what a gate is taught about neighbours at first is noise: it cannot learn to bring the right
specialist before there are specialists. Here what is learned from is divided by what it retrieves, and each part goes
to an expert of its own from the first step on; no domain is named. A gate that learns from the neighbours' embeddings
learns on from there, where `train.context_start` asks for it; the gate `clusters` keeps its clusters. Source:
Gururangan et al. 2023 (c-BTM), whose clusters are of the text itself, and stay as they are.
Q examples, P passages, R encoder width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ragmoe._errors import ConfigError, DataError
from ragmoe._words import many
from ragmoe.gates import ClusterGate, ContextGate, gate_class, gate_names
from ragmoe.index import Index
from ragmoe.neighbours import Neighbours
from ragmoe.training.callbacks import Shows
from ragmoe.training.config import TrainingConfig

# Examples that are clustered at most: some hundreds for each of few experts.
_EXAMPLES = 4096
# Passages that are clustered at most.
_PASSAGES = 65_536


def start_gates(
    model: Any, index: Index | None, dataset: Any, config: TrainingConfig, show: Shows | None = None
) -> None:
    """Find the clusters of gates that go by them, and start others as ``train.context_start`` says.

    Args:
        index: whose passages the clusters are of; None for models whose gate sees no neighbours.
        dataset: of examples with one row of ``neighbours`` each, of which the first start a gate.

    Raises:
        DataError: fewer passages, or examples that have neighbours, than there are experts.
    """
    say = show.line if show else lambda line: None
    if config.new_expert is not None:
        # The others stay what they are.
        if without_clusters(model):
            say("its gates have no clusters, so no neighbour votes: ragmoe train finds them in an index")
    elif index is not None and (shares := place_clusters(model, index, seed=config.seed)):
        say(f"the gates go by {many(len(shares), 'cluster')} of passages, {_told(shares)} of them each")
    if config.train.context_start is None:
        return
    found = [dataset[at].neighbours for at in range(min(len(dataset), _EXAMPLES))]
    shares = start_from_clusters(model, Neighbours.stack(found), config.train.context_start, seed=config.seed)
    say(
        f"the gates start from {many(len(shares), 'cluster')} of neighbours, which hold {_told(shares)} of the "
        "examples each"
    )


def without_clusters(model: Any) -> list[ClusterGate]:
    """The ``clusters`` gates of a model whose clusters were not found yet."""
    return [gate for gate in getattr(model, "gates", []) if isinstance(gate, ClusterGate) and not gate.is_ready]


def _told(shares: Sequence[float]) -> str:
    return f"{min(shares):.0%} to {max(shares):.0%}"


@torch.no_grad()
def place_clusters(model: Any, index: Index, *, seed: int = 0) -> list[float]:
    """Divide an index's passages into as many clusters as there are experts, for the ``clusters`` gates of a model.

    All layers go by the same ones, and gates that have theirs keep them.

    Args:
        seed: of the clustering, and of what is drawn from an index of more than 65,536 passages.

    Returns:
        The share of the passages in each cluster, in the order of the experts; nothing where no gate wants any.

    Raises:
        DataError: the index has fewer passages than there are experts.
    """
    gates = without_clusters(model)
    if not gates:
        return []
    rows = np.arange(len(index))
    if len(rows) > _PASSAGES:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _PASSAGES, replace=False))
    if len(rows) < model.config.experts:
        raise DataError(
            f"{index.folder} has {many(len(rows), 'passage')}: expected at least {model.config.experts}, the number of "
            "experts, for the gate 'clusters'",
            hint="fewer experts, or another gate: model.gate=retrieval",
        )
    points_PR = torch.from_numpy(np.asarray(index.embeddings[rows], dtype=np.float32))
    centroids_ER, shares = _clusters(points_PR, model.config.experts, seed)
    for gate in gates:
        gate.centroids.copy_(centroids_ER)
    return shares


def start_from_clusters(model: Any, neighbours: Neighbours, lead: float, *, seed: int = 0) -> list[float]:
    """Divide examples by the mean of their neighbours into as many clusters as there are experts, and make each gate
    prefer the cluster's expert.

    Args:
        model: all its gates are ``ContextGate``s that have learned nothing of neighbours yet (see ``check_start``).
        neighbours: of Q examples; those that have none are left out.
        lead: by how many units of logit an example's own expert is ahead of the mean of all experts, on average.
        seed: of the clustering.

    Returns:
        The share of the examples in each cluster, in the order of the experts.

    Raises:
        DataError: fewer examples have neighbours than there are experts.
    """
    neighbours = neighbours.rows(neighbours.mask_BN.any(dim=1).nonzero().flatten().tolist())
    if len(neighbours) < model.config.experts:
        raise DataError(
            f"{many(len(neighbours), 'example')} to learn from have neighbours: expected at least "
            f"{model.config.experts}, the number of experts, to start a gate from clusters",
            hint="leave train.context_start out, or train with more text",
        )
    centres_ER, shares = _clusters(_mean(neighbours), model.config.experts, seed)
    # What all centres have in common speaks for none of them.
    directions_ER = centres_ER - centres_ER.mean(dim=0)
    for gate in model.gates:
        before_QE = gate.foresee(neighbours)
        gate.set_context(directions_ER)
        logits_QE = gate.foresee(neighbours) - before_QE
        gate.context.weight.data *= lead / (logits_QE.amax(dim=1) - logits_QE.mean(dim=1)).mean()
    return shares


def check_start(model: Any, config: TrainingConfig) -> None:
    """ConfigError where ``train.context_start`` is given and the model's gates cannot be started so; it costs nothing,
    and is asked before anything is retrieved."""
    if config.train.context_start is None:
        return
    gates = getattr(model, "gates", [])
    if not gates:
        raise ConfigError("train.context_start is given, but the model is dense: it has no gate to start")
    if not all(isinstance(gate, ContextGate) for gate in gates):
        able = ", ".join(name for name in gate_names() if issubclass(gate_class(name), ContextGate))
        raise ConfigError(
            f"train.context_start is given, but the gate {model.config.gate!r} does not learn from the neighbours' "
            f"embeddings; those that do: {able}",
            hint="model.gate=retrieval, or leave train.context_start out",
        )
    if any(gate.context.weight.any() for gate in gates):
        raise ConfigError(
            "train.context_start is given, but the base's gates learned from neighbours already: it would undo that",
            hint="leave train.context_start out",
        )


def _mean(neighbours: Neighbours) -> Tensor:
    """Of each row's neighbours, float32 (Q, R)."""
    mask_QN1 = neighbours.mask_BN.unsqueeze(-1)
    return (neighbours.embeddings_BNR.float() * mask_QN1).sum(dim=1) / mask_QN1.sum(dim=1)


def _clusters(points_QR: Tensor, experts: int, seed: int) -> tuple[Tensor, list[float]]:
    """Centres of unit length, (E, R), and each one's share of the rows."""
    import faiss

    Q, R = points_QR.shape
    points = F.normalize(points_QR, dim=1).numpy()
    means = faiss.Kmeans(
        R, experts, niter=25, nredo=5, spherical=True, seed=seed, min_points_per_centroid=1, max_points_per_centroid=Q
    )
    means.train(points)
    nearest_Q = means.index.search(points, 1)[1][:, 0]
    shares = np.bincount(nearest_Q, minlength=experts) / Q
    return torch.from_numpy(means.centroids), shares.tolist()
