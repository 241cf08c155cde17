"""What the gate rows of a new expert learn: to call it for its own documents and for no others.

S tokens, E experts with the new one last, K experts a token, Q documents, T tokens of each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ragmoe.corpus.types import Question
from ragmoe.gates import Routing
from ragmoe.index import Index
from ragmoe.models import RagmoeBertForQuestionAnswering
from ragmoe.models.sparse import SparseModel
from ragmoe.training.callbacks import Shows
from ragmoe.training.config import TrainingConfig
from ragmoe.training.data import RaftCollator
from ragmoe.training.documents import Document, Documents
from ragmoe.training.raft import Example, drop_neighbours
from ragmoe.training.retrieved import Retrieved

# How far the balance bias moves a step, in units of logit.
_FOLLOW = 0.02


def margins(scores_SE: Tensor, top_k: int) -> Tensor:
    """By how much each token's score of the last expert is above the K-th best of the others: it calls it from 0 on."""
    return scores_SE[:, -1] - scores_SE[:, :-1].topk(top_k, dim=-1).values[:, -1]


def calling_loss(margin_S: Tensor, new_S: Tensor, mask_S: Tensor) -> Tensor:
    """Logistic loss of "does this token call the last expert?", each side's mean counting the same.

    Args:
        margin_S: see ``margins``; these are the logits.
        new_S: bool, True for tokens of documents that the last expert is for.
        mask_S: bool, False for padding.

    Returns:
        The loss in nats; of one side alone where there are no tokens of the other.
    """
    sides = [F.softplus(-margin_S)[new_S & mask_S], F.softplus(margin_S)[~new_S & mask_S]]
    return torch.stack([side.mean() for side in sides if side.numel()]).mean()


def gate_inputs(
    model: SparseModel, inputs: dict[str, Tensor], wrapped: Any = None
) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each gate with what it is given while some sequences are read, without a gradient.

    Args:
        inputs: as for ``forward``; what would make a loss is left out.
        wrapped: the model as it is to be called, where something lies around it.
    """
    seen: list[tuple[Any, tuple[Any, ...]]] = []
    hooks = [gate.register_forward_pre_hook(lambda gate, args: seen.append((gate, args))) for gate in model.gates]
    try:
        with torch.no_grad():
            (wrapped or model)(**{name: x for name, x in inputs.items() if not name.endswith(("_positions", "labels"))})
    finally:
        for hook in hooks:
            hook.remove()
    # In fp32, as the gates are: reading may have run in bf16.
    return [(gate, (args[0].float(), *args[1:])) for gate, args in seen]


class LessonBatches(Protocol):
    """What the lesson reads.

    Attributes:
        size: how many sequences of a batch are the last expert's own, which come first.
    """

    size: int

    def __call__(self, at: int) -> dict[str, Tensor]:
        """What ``forward`` takes, for the micro-batch ``at``."""


def lesson_size(config: TrainingConfig) -> int:
    """Of each kind half as many sequences as are learned from, so that a step takes little longer."""
    return max(1, config.train.batch_size // 2)


class CallingLesson:
    """The loss above on a few documents of each kind a micro-batch, in every sparse layer.

    The documents are read as the model is now, without a gradient; only what the gates make of it has one. So the
    lesson moves gate rows alone, and nothing can be learned by making states easier to tell apart.

    Sentences are no questions, and the states of real questions may stand at another distance from the boundary, most
    of all in the last layers. Therefore the expert's balance bias follows, a little a step, until real questions of the
    domain call it as often as its documents do.

    Args:
        batches: what is read for it.
        follow: whether it does; not needed where what is read is what the expert will be asked.
        first_token: how much the loss of the sequences' first tokens counts beside that of all tokens.
    """

    def __init__(self, model: SparseModel, batches: LessonBatches, *, follow: bool, first_token: float = 0.0) -> None:
        self.model, self.batches, self.follow, self.first_token = model, batches, follow, first_token

    def __call__(self, model: Any, at: int, routings: Sequence[Routing], mask_S: Tensor) -> Tensor:
        """The loss of micro-batch ``at``, which fixes its documents.

        Args:
            routings: of the questions of the micro-batch, one a sparse layer.
            mask_S: bool, False where they are padding.
        """
        device = next(model.parameters()).device
        inputs = {name: x.to(device) for name, x in self.batches(at).items()}
        shown_QT = inputs["attention_mask"].bool()
        new_QT = (torch.arange(len(shown_QT), device=device) < self.batches.size).unsqueeze(1).expand_as(shown_QT)
        first_QT = torch.zeros_like(shown_QT)
        first_QT[:, 0] = True
        new_S, shown_S, first_S = (x_QT.reshape(-1) for x_QT in (new_QT, shown_QT, first_QT))
        losses = []
        for (gate, args), asked in zip(gate_inputs(self.model, inputs, model), routings, strict=True):
            # By its rows alone: its own bias is for questions, see below.
            scores_SE = gate.scores.ranked(gate(*args).logits_SE) + F.pad(gate.balance_bias[:-1], (0, 1))
            margin_S = margins(scores_SE, gate.settings.top_k)
            loss = calling_loss(margin_S, new_S, shown_S)
            if self.first_token:
                loss = loss + self.first_token * calling_loss(margin_S, new_S, first_S)
            losses.append(loss / (1 + self.first_token))
            if self.follow:
                called = (asked.experts_SK == gate.settings.experts - 1).any(dim=-1)[mask_S].float().mean()
                wanted = (margin_S > 0)[new_S & shown_S].float().mean()
                gate.balance_bias[-1] += _FOLLOW * torch.sign(wanted - called)
        return torch.stack(losses).mean()


class DocumentBatches:
    """Documents of both kinds with their questions, as a reader reads them.

    Args:
        cache: folder where neighbours are kept between runs.
        show: told how far retrieving them is.
    """

    def __init__(
        self,
        model: RagmoeBertForQuestionAnswering,
        index: Index,
        documents: Documents,
        config: TrainingConfig,
        cache: Path,
        show: Shows | None = None,
    ) -> None:
        self.model, self.index, self.seed = model, index, config.seed
        self.config = config.raft.model_copy(update={"passages": 1})
        self.collator = RaftCollator(model.tokenizer, self.config)
        self.size = lesson_size(config)
        both = [side for side in (documents.new, documents.others) if side]
        progress = partial(show.stage, "retrieving for documents") if show else None
        self.sides = [_Side(side, self._retrieved(side, cache, progress), config.seed) for side in both]

    def _retrieved(
        self, documents: Sequence[Document], cache: Path, progress: Callable[[int, int], None] | None
    ) -> Retrieved:
        texts = [document.question for document in documents]
        config = self.config
        return Retrieved.of(self.index, texts, config.neighbours, config.retriever, cache, progress=progress)

    def __call__(self, at: int) -> dict[str, Tensor]:
        return self.collator([self._example(side, at * self.size + i) for side in self.sides for i in range(self.size)])

    def _example(self, side: _Side, at: int) -> Example:
        place = side.order[at % len(side.order)]
        document = side.documents[place]
        draw = random.Random(f"{self.seed}/{at}/{document.passage_id}")
        found = side.retrieved.neighbours(place, self.config.neighbours)
        neighbours = self.model.recall(found, self.index, [document.domain])
        return Example(
            Question(document.passage_id, document.question),
            [self.index.passage(document.passage_id)],
            None,
            None,
            drop_neighbours(neighbours, self.config.drop_all, self.config.drop_each, draw),
            draw.getrandbits(32),
        )


class _Side:
    """Documents of one kind, their neighbours, and the order in which they are shown."""

    def __init__(self, documents: Sequence[Document], retrieved: Retrieved, seed: int) -> None:
        self.documents, self.retrieved = documents, retrieved
        self.order = random.Random(seed).sample(range(len(documents)), len(documents))
