"""The log-likelihood of texts under a causal language model, whatever it is batched with.

B sequences, T positions, V words of the vocabulary, A tokens that are judged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ragmoe.gates import Routing
from ragmoe.generation.batches import IGNORED, labelled_batch, sees_neighbours
from ragmoe.models.health import require_numbers
from ragmoe.neighbours import Neighbours

#: What comes first, and what is judged after it, as tokens.
Pair = tuple[Sequence[int], Sequence[int]]
#: (routings, mask_S, places): those of a batch, and which of the continuations it holds, one a sequence.
Count = Callable[[Sequence[Routing], Tensor, list[int]], None]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model makes of a continuation.

    Attributes:
        nats: log-probability of all its tokens together, at most 0.
        tokens: how many they are.
        greedy: each of them is the most probable one where it stands.
    """

    nats: float
    tokens: int
    greedy: bool


@torch.no_grad()
def log_likelihoods(
    model: Any,
    pairs: Sequence[Pair],
    neighbours: Neighbours | None = None,
    *,
    padding: int = 0,
    batch_tokens: int = 8192,
    batch_rows: int | None = None,
    count: Count | None = None,
) -> list[Likelihood]:
    """Judge continuations, each after its own beginning, which must not be empty.

    Args:
        neighbours: a row for each pair, for models whose gate sees them; others are not given any.
        padding: the token that fills up.
        batch_tokens: tokens of a batch, padding included; ``batch_rows``: its sequences at most, None for no limit.
        count: told of each batch's routings, of a model that has any.

    Raises:
        ModelError: the model answers NaN; it names the broken expert, where there is one.
    """
    if neighbours is not None and len(neighbours) != len(pairs):
        raise ValueError(f"{len(pairs)} continuations, but neighbours for {len(neighbours)}")
    if not all(before for before, _ in pairs):
        raise ValueError("a beginning is empty: nothing predicts the first token after it")
    model.eval()
    device = next(model.parameters()).device
    seen = neighbours if neighbours is not None and sees_neighbours(model) else None
    lengths = [len(before) + len(after) for before, after in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
    found: dict[int, Likelihood] = {}
    # Of a large vocabulary the logits of a batch are gigabytes: they are made where something is judged.
    slices = "logits_to_keep" in inspect.signature(model.forward).parameters
    while order:
        size = max(1, min(batch_rows or len(order), batch_tokens // max(1, lengths[order[0]])))
        at, order = order[:size], order[size:]
        batch = labelled_batch([pairs[i] for i in at], padding, seen.rows(at) if seen is not None else None)
        labels_BT = batch.pop("labels")[:, 1:].to(device)
        judged_BT = labels_BT != IGNORED
        kept_K = judged_BT.any(dim=0).nonzero().flatten()
        # No loss is wanted, and so no routing losses either.
        wanted: dict[str, Any] = {"output_routings": True} if count is not None else {}
        if slices:
            wanted["logits_to_keep"] = kept_K
        output = model(**{name: x.to(device) for name, x in batch.items()}, **wanted)
        if count is not None:
            count(output.routings, batch["attention_mask"].reshape(-1).bool().to(device), at)
        logits_BKV = output.logits if slices else output.logits[:, kept_K]
        logits_AV, labels_A = logits_BKV[judged_BT[:, kept_K]].float(), labels_BT[judged_BT]
        nats_A = logits_AV.log_softmax(dim=-1).gather(1, labels_A.unsqueeze(1)).squeeze(1)
        require_numbers(model, nats_A)
        right_A = logits_AV.argmax(dim=-1) == labels_A
        counts = judged_BT.sum(dim=1).tolist()
        for i, nats, right in zip(at, nats_A.double().split(counts), right_A.split(counts), strict=True):
            found[i] = Likelihood(float(nats.sum()), len(nats), bool(right.all()))
    return [found[i] for i in range(len(pairs))]
