"""From tokens to batches: padding on either side, and neighbours for models whose gate sees them.

B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ragmoe.neighbours import Neighbours

IGNORED = -100


def sees_neighbours(model: Any) -> bool:
    """Whether a causal language model takes neighbours: ``gate_sees_neighbours``, which plain models do not have."""
    return bool(getattr(model, "gate_sees_neighbours", False))


def reads_neighbours(model: Any) -> bool:
    """Whether a model, of any kind, makes anything of what is retrieved; an oracle is told the domain alone."""
    from ragmoe.gates import gate_class

    if not sees_neighbours(model):
        return False
    return bool(model.config.neighbour_summary) or not gate_class(model.config.gate).uses_domain


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Rows of different length as (B, T) int64, filled with ``value`` on one side."""
    T = max(len(row) for row in rows)
    fill = [[value] * (T - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True)
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in pairs], dtype=torch.long).view(len(rows), T)


def pad_token(tokenizer: Any) -> int:
    """What padding is filled with; the mask says that it is padding, so any token will do."""
    return int(next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0))


def read_batch(
    rows: Sequence[Sequence[int]], padding: int, neighbours: Neighbours | None = None, *, left: bool = False
) -> dict[str, Tensor]:
    """What ``forward`` and ``generate`` take: ``input_ids`` and ``attention_mask``, and neighbours by their names."""
    batch = {
        "input_ids": pad(rows, padding, left=left),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, left=left),
    }
    return batch | (neighbours.tensors() if neighbours is not None else {})


def labelled_batch(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], padding: int, neighbours: Neighbours | None = None
) -> dict[str, Tensor]:
    """Sequences of which the second part is learned: with ``labels``, -100 on the first part and on padding.

    Padding is on the right, where a causal model needs no position of its own for it.
    """
    batch = read_batch([[*before, *after] for before, after in pairs], padding, neighbours)
    labels = [[*([IGNORED] * len(before)), *after] for before, after in pairs]
    return batch | {"labels": pad(labels, IGNORED)}


def decode_batch(tokenizer: Any, batch: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """What a labelled batch says, a row a sequence: ``sequence``, which is read, and ``target``, which is learned."""
    learned_BT = batch["labels"] != IGNORED
    read_BT = batch["attention_mask"].bool() & ~learned_BT
    return [
        {"sequence": tokenizer.decode(ids[read]), "target": tokenizer.decode(ids[learned])}
        for ids, read, learned in zip(batch["input_ids"], read_BT, learned_BT, strict=True)
    ]
