"""Inputs for the readers of conftest.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ragmoe import Neighbours
from ragmoe.models import RagmoeBertForQuestionAnswering

Make = Callable[..., RagmoeBertForQuestionAnswering]


def tokens(sequences: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    """Model inputs; each sequence but the first ends in padding."""
    input_ids = torch.randint(5, 90, (sequences, length))
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, sequences):
        attention_mask[row, length - row :] = 0
    token_type_ids = torch.zeros_like(input_ids)
    token_type_ids[:, 4:] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}


def some_neighbours(questions: int, n: int = 3, width: int = 16) -> Neighbours:
    embeddings_BNR = torch.nn.functional.normalize(torch.randn(questions, n, width), dim=-1)
    return Neighbours(embeddings_BNR, torch.rand(questions, n), torch.ones(questions, n, dtype=torch.bool))


LABELS = {
    "start_positions": torch.tensor([[0, 8], [1, 0]]),
    "end_positions": torch.tensor([[0, 9], [1, 0]]),
}
