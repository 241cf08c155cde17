"""What a query returned from an index, as tensors that travel through a model's ``forward`` by name.

B questions, N neighbours, R encoder width, L sparse layers, E experts, A width of a gate's attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        votes_BNLE: float32, for gates with expert memory: how much each neighbour speaks for each expert of each
            sparse layer, summing to one over E, or zero everywhere for a passage without memory.
        domain_B: int64, for the oracle gate: the expert of the question's domain, -1 where it has none.
        keys_BNLA, values_BNLA: what the gates' attention has made of the embeddings already, for models that are
            called many times with the same neighbours, as in ``generate``. Both or neither.
    """

    embeddings_BNR: Tensor
    scores_BN: Tensor
    mask_BN: Tensor
    passage_ids: list[list[str]] = field(default_factory=list)
    votes_BNLE: Tensor | None = None
    domain_B: Tensor | None = None
    keys_BNLA: Tensor | None = None
    values_BNLA: Tensor | None = None

    def __post_init__(self) -> None:
        B, N, _ = self.embeddings_BNR.shape
        if self.scores_BN.shape != (B, N) or self.mask_BN.shape != (B, N):
            raise ValueError(
                f"neighbours disagree in shape: embeddings {tuple(self.embeddings_BNR.shape)}, "
                f"scores {tuple(self.scores_BN.shape)}, mask {tuple(self.mask_BN.shape)}; "
                "expected (B, N, R), (B, N), (B, N)"
            )
        if self.votes_BNLE is not None and (self.votes_BNLE.dim() != 4 or self.votes_BNLE.shape[:2] != (B, N)):
            raise ValueError(f"votes have the shape {tuple(self.votes_BNLE.shape)}; expected ({B}, {N}, L, E)")
        if (self.keys_BNLA is None) != (self.values_BNLA is None):
            raise ValueError("neighbour_keys and neighbour_values come together, or not at all")
        if self.domain_B is not None and self.domain_B.shape != (B,):
            raise ValueError(f"domains have the shape {tuple(self.domain_B.shape)}; expected ({B},)")

    def __len__(self) -> int:
        return self.embeddings_BNR.shape[0]

    def require_sequences(self, sequences: int) -> None:
        """ValueError where so many sequences cannot be those of B questions, as many of each."""
        if sequences % len(self):
            raise ValueError(
                f"{sequences} sequences came with the neighbours of {len(self)} questions; expected as many questions "
                "as sequences, or a divisor of their number"
            )

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

        def join(parts: Sequence[Tensor | None]) -> Tensor | None:
            """Below each other, with columns of zeros where there are fewer than N; None where one has nothing."""
            have = [x for x in parts if x is not None]
            if len(have) < len(parts):
                return None
            missing = [N - x.shape[1] if x.dim() > 1 else 0 for x in have]
            grown = [
                torch.cat([x, x.new_zeros(x.shape[0], n, *x.shape[2:])], dim=1) if n else x
                for x, n in zip(have, missing, strict=True)
            ]
            return torch.cat(grown)

        joined = {name: join([getattr(row, name) for row in rows]) for name in _TENSORS}
        named = all(len(row.passage_ids) == len(row) for row in rows)
        ids = [ids for row in rows for ids in row.passage_ids] if named else []
        return cls(passage_ids=ids, **joined)  # type: ignore[arg-type]

    def rows(self, indices: Sequence[int]) -> Neighbours:
        """The neighbours of some of the questions, in the order given (repeats allowed)."""
        at = torch.as_tensor(indices, dtype=torch.long)
        ids = [self.passage_ids[i] for i in indices] if self.passage_ids else []
        return replace(self, passage_ids=ids, **{name: x[at] for name, x in self._tensors()})

    def first(self, n: int) -> Neighbours:
        """The n best neighbours of each question."""
        cut = {name: x[:, :n] for name, x in self._tensors() if x.dim() > 1}
        ids = [[name for at, name in row if at < n] for row in self._places()]
        return replace(self, passage_ids=ids, **cut)

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
            votes_BNLE=self.votes_BNLE * mask[..., None, None] if self.votes_BNLE is not None else None,
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
        """The same on another device or in another dtype (of what is a float), as ``Tensor.to`` says it."""
        device = self.mask_BN.to(*args, **kwargs).device
        moved: dict[str, Any] = {
            name: x.to(*args, **kwargs) if x.is_floating_point() else x.to(device) for name, x in self._tensors()
        }
        return replace(self, **moved)

    def prepared(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the gate in one sparse layer, (B, N, A) each; None where they were not made before."""
        if self.keys_BNLA is None or self.values_BNLA is None:
            return None
        return self.keys_BNLA[:, :, layer], self.values_BNLA[:, :, layer]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, x) for name in _TENSORS if (x := getattr(self, name)) is not None]

    def tensors(self) -> dict[str, Tensor]:
        """The named tensors as ``forward`` takes them."""
        return {_TENSORS[name]: x for name, x in self._tensors()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor | None]) -> Neighbours | None:
        """What ``tensors`` gave, as ``forward`` receives it; None where there are no embeddings.

        A mask may be of numbers, as attention masks are.

        Raises:
            ValueError: embeddings without scores or mask.
        """
        given = {name: tensors.get(argument) for name, argument in _TENSORS.items()}
        if given["embeddings_BNR"] is None:
            return None
        if given["scores_BN"] is None or given["mask_BN"] is None:
            raise ValueError("neighbour_embeddings came without neighbour_scores or neighbour_mask")
        given["mask_BN"] = given["mask_BN"].bool()
        return cls(**given)  # type: ignore[arg-type]


# The fields that are tensors, and what ``forward`` calls them.
_TENSORS = {
    "embeddings_BNR": "neighbour_embeddings",
    "scores_BN": "neighbour_scores",
    "mask_BN": "neighbour_mask",
    "votes_BNLE": "neighbour_votes",
    "domain_B": "question_domain",
    "keys_BNLA": "neighbour_keys",
    "values_BNLA": "neighbour_values",
}

#: What ``forward`` takes of neighbours and of the question that they were found for.
NEIGHBOUR_ARGUMENTS = frozenset(_TENSORS.values())
