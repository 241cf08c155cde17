"""What a query returned from an index, as tensors that travel through a model's ``forward`` by name.

B questions, N neighbours, R encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of B questions, best first; rows may have fewer than N, or none.

    Attributes:
        embeddings_BNR: float32, unit length where the mask is set, zero elsewhere.
        scores_BN: float32, cosine similarity of question and neighbour, whichever retriever ranked them.
        mask_BN: bool, True where there is a neighbour.
        passage_ids: for each question the ids of its neighbours, without padding.
    """

    embeddings_BNR: Tensor
    scores_BN: Tensor
    mask_BN: Tensor
    passage_ids: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        B, N, _ = self.embeddings_BNR.shape
        if self.scores_BN.shape != (B, N) or self.mask_BN.shape != (B, N):
            raise ValueError(
                f"neighbours disagree in shape: embeddings {tuple(self.embeddings_BNR.shape)}, "
                f"scores {tuple(self.scores_BN.shape)}, mask {tuple(self.mask_BN.shape)}; "
                "expected (B, N, R), (B, N), (B, N)"
            )

    def __len__(self) -> int:
        return self.embeddings_BNR.shape[0]

    @classmethod
    def empty(cls, questions: int, width: int, neighbours: int = 1) -> Neighbours:
        """No neighbour for any of the questions (every mask is False)."""
        return cls(
            torch.zeros(questions, neighbours, width),
            torch.zeros(questions, neighbours),
            torch.zeros(questions, neighbours, dtype=torch.bool),
            [[] for _ in range(questions)],
        )

    @classmethod
    def stack(cls, rows: Sequence[Neighbours]) -> Neighbours:
        """Join the rows of several, padding to the largest N."""
        N = max(row.mask_BN.shape[1] for row in rows)

        def grow(x: Tensor) -> Tensor:
            missing = N - x.shape[1]
            return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1) if missing else x

        return cls(
            torch.cat([grow(row.embeddings_BNR) for row in rows]),
            torch.cat([grow(row.scores_BN) for row in rows]),
            torch.cat([grow(row.mask_BN) for row in rows]),
            [ids for row in rows for ids in row.passage_ids],
        )

    def rows(self, indices: Sequence[int]) -> Neighbours:
        """The neighbours of some of the questions, in the order given (repeats allowed)."""
        at = torch.as_tensor(indices, dtype=torch.long)
        ids = [self.passage_ids[i] for i in indices] if self.passage_ids else []
        return Neighbours(self.embeddings_BNR[at], self.scores_BN[at], self.mask_BN[at], ids)

    def masked(self, keep_BN: Tensor) -> Neighbours:
        """The same neighbours with only those kept where ``keep_BN`` (bool) is True; the others vanish entirely."""
        mask = self.mask_BN & keep_BN
        ids = [[name for n, name in row if keep_BN[b, n]] for b, row in enumerate(self._places())]
        return replace(
            self,
            embeddings_BNR=self.embeddings_BNR * mask.unsqueeze(-1),
            scores_BN=self.scores_BN * mask,
            mask_BN=mask,
            passage_ids=ids,
        )

    def without(self, passage_ids: Sequence[Sequence[str]]) -> Neighbours:
        """Leave out, for each question, the passages named: used where RAFT takes the gold passage away."""
        keep = torch.ones_like(self.mask_BN)
        for b, (have, gone) in enumerate(zip(self._places(), passage_ids, strict=True)):
            for n, name in have:
                keep[b, n] = name not in gone
        return self.masked(keep)

    def _places(self) -> list[list[tuple[int, str]]]:
        """For each question (column, passage id): masking leaves gaps between columns, but none between ids."""
        return [
            list(zip(mask_N.nonzero().flatten().tolist(), ids, strict=True))
            for mask_N, ids in zip(self.mask_BN, self.passage_ids)
        ]

    def to(self, *args: Any, **kwargs: Any) -> Neighbours:
        """The same on another device or in another dtype (of the embeddings and scores), as ``Tensor.to`` says it."""
        device = self.mask_BN.to(*args, **kwargs).device
        return replace(
            self,
            embeddings_BNR=self.embeddings_BNR.to(*args, **kwargs),
            scores_BN=self.scores_BN.to(*args, **kwargs),
            mask_BN=self.mask_BN.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The named tensors as ``forward`` takes them."""
        return {
            "neighbour_embeddings": self.embeddings_BNR,
            "neighbour_scores": self.scores_BN,
            "neighbour_mask": self.mask_BN,
        }
