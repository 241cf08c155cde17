"""A new expert for a trained bundle: what it starts with, what it learns by, and what it is when it is done.

Everything else of the bundle stays: base, head, the other experts and their gate rows, what the gates share. Experts
trained apart on a frozen base, and gate rows that come last, are FlexOlmo's (Shi et al. 2025). E experts before.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ragmoe._errors import BundleError, ConfigError, ModelError
from ragmoe.bundle import is_bundle, read_map
from ragmoe.bundle.experts import check_name
from ragmoe.corpus.types import Question
from ragmoe.experts import FeedForward
from ragmoe.gates import ClusterGate
from ragmoe.index import Index
from ragmoe.models import RagmoeBertForQuestionAnswering
from ragmoe.models.growth import grow, settle
from ragmoe.models.sparse import SparseModel
from ragmoe.moe import RoutingStatistics
from ragmoe.training.callbacks import Shows
from ragmoe.training.config import NewExpertConfig, TrainingConfig
from ragmoe.training.data import gold_ids
from ragmoe.training.digests import digest
from ragmoe.training.documents import Document, Documents, find_documents
from ragmoe.training.lesson import CallingLesson, DocumentBatches, gate_inputs, margins
from ragmoe.training.trainer import GateLesson, check_balance, part_of

# Documents that are read to place the centroids of the experts, and to see whether the new one is called at all; and
# questions that are read to hold it back.
PLACED, TRIED, HEARD = 256, 32, 64


Batches = Iterable[dict[str, Tensor]]


@dataclass(frozen=True)
class NewExpert(ABC):
    """A new expert while it is trained.

    Attributes:
        model: the grown model, in which nothing but the new expert requires a gradient.
        lesson: teaches its gate rows when to call it; None where they are not trained.
    """

    model: Any
    config: NewExpertConfig
    lesson: GateLesson | None

    @abstractmethod
    def heard(self, model: Any) -> Batches:
        """What it was trained on, some of it: what must go on calling it where it is held back."""

    @abstractmethod
    def tried(self, model: Any) -> Batches:
        """Some of its own documents, of which one token at least must call it."""

    def finish(self, model: Any) -> Any:
        """The trained model as an ordinary one.

        Raises:
            ModelError: not one token of its own documents calls the new expert.
        """
        done = settle(model).eval()
        if self.config.train_gate and self.config.keep < 1:
            hold_back(done, self.heard(done), self.config.keep)
        for gate in done.gates:
            gate.balance_bias[-1] += self.config.gate_bias
        if not is_called(done, self.tried(done)):
            raise ModelError(
                f"no token of its own documents calls the new expert {self.config.name!r}: it has learned nothing",
                hint="train longer (--steps), or with a larger train.gate_learning_rate",
            )
        return done


@dataclass(frozen=True)
class ReaderExpert(NewExpert):
    """A reader's, with the questions it is trained on, in an order that only their ids decide."""

    index: Index
    documents: Documents
    questions: Sequence[Question]
    raw: bool = False
    retriever: str | None = None

    def heard(self, model: Any) -> Batches:
        return question_batches(model, self.index, self.questions[:HEARD], raw=self.raw, retriever=self.retriever)

    def tried(self, model: Any) -> Batches:
        told = [(d.question, d.passage_id, d.domain) for d in self.documents.new[:TRIED]]
        return _reading(model, self.index, told, self.retriever)


def begin_new_expert(
    model: RagmoeBertForQuestionAnswering,
    config: TrainingConfig,
    index: Index,
    questions: Sequence[Question],
    held: Sequence[Question],
    cache: Path,
    show: Shows | None = None,
) -> ReaderExpert | None:
    """Grow a reader by the expert that its configuration asks for; None where it asks for none.

    Args:
        model: as its bundle has it.
        questions: those that the expert is trained on; ``held`` are those it is judged by.
        cache: folder where neighbours are kept between runs.
        show: told how far retrieving for the documents is.

    Raises:
        ConfigError, ModelError, BundleError, DataError: where the bundle takes no such expert.
    """
    wanted = wanted_expert(config)
    if wanted is None:
        return None
    id = joined(model, config, wanted, index)
    raw = config.data.question_field == "question_raw"
    documents = find_documents(wanted, index, questions, held, raw=raw)
    rows = start_rows(model, wanted.start, lambda: nearest_expert(model, index, documents), seed=config.seed)
    rows |= start_cluster(model, rows, lambda: _embeddings(index, documents.new[:PLACED]))
    grown = grow(model, rows, id=id, name=wanted.name)
    lesson = None
    if wanted.train_gate:
        batches = DocumentBatches(grown, index, documents, config, cache, show)
        lesson = CallingLesson(grown, batches, follow=not wanted.others, first_token=wanted.first_token)
    else:
        freeze_gates(grown)
    ordered = sorted(questions, key=lambda q: digest(q.id))
    return ReaderExpert(grown, wanted, lesson, index, documents, ordered, raw, config.raft.retriever)


def freeze_gates(model: SparseModel) -> None:
    """Let the new expert's gate rows stay as they start."""
    for name, parameter in model.named_parameters():
        if part_of(name) == "gate":
            parameter.requires_grad_(False)


def wanted_expert(config: TrainingConfig) -> NewExpertConfig | None:
    """The section about a new expert; ConfigError where it and ``train.what`` are not both there or both absent."""
    wanted = config.new_expert
    if (wanted is None) != (config.train.what != "new_expert"):
        raise ConfigError(
            f"train.what is {config.train.what!r}, and the section new_expert is "
            f"{'missing' if wanted is None else 'there'}: they go together",
            hint="ragmoe experts add BUNDLE --name NAME --index DIR --questions FILE",
        )
    if wanted is not None and config.data.replay:
        raise ConfigError(
            "data.replay is given, but a new expert is trained alone: what the bundle knows cannot be forgotten, and "
            "questions to replay would teach the expert to be called for them",
            hint="name what it is not for with new_expert.others (--others FILE)",
        )
    return wanted


@torch.no_grad()
def hold_back(model: SparseModel, batches: Batches, keep: float) -> None:
    """Lower the last expert's balance bias as far as leaves it the share ``keep`` of these batches' calls, by layer.

    A gate that has learned from documents alone draws its boundary in the middle between them; a question of another
    domain that comes near it would be answered in the new domain's manner.
    """
    heard: list[list[Tensor]] = [[] for _ in model.gates]
    for inputs in batches:
        mask_S = inputs["attention_mask"].reshape(-1).bool()
        for of_layer, (gate, args) in zip(heard, gate_inputs(model, inputs), strict=True):
            scores_SE = gate.scores.ranked(gate(*args).logits_SE) + gate.balance_bias
            margin_S = margins(scores_SE, gate.settings.top_k)[mask_S]
            of_layer.append(margin_S[margin_S >= 0])
    for gate, calls in zip(model.gates, heard, strict=True):
        if (margin_P := torch.cat(calls)).numel():
            gate.balance_bias[-1] -= torch.quantile(margin_P, 1 - keep)


@torch.no_grad()
def is_called(model: SparseModel, batches: Batches) -> bool:
    """Whether any token calls the last expert, in any layer."""
    for inputs in batches:
        mask_S = inputs["attention_mask"].reshape(-1).bool()
        for gate, args in gate_inputs(model, inputs):
            if (gate(*args).experts_SK == gate.settings.experts - 1).any(dim=1)[mask_S].any():
                return True
    return False


def question_batches(
    model: RagmoeBertForQuestionAnswering,
    index: Index,
    questions: Sequence[Question],
    *,
    raw: bool = False,
    retriever: str | None = None,
) -> Batches:
    """Questions with a passage that answers them, as the reader reads them.

    Args:
        raw: asked as ``question_raw`` has them.
        retriever: of the neighbours; None means the index's default.
    """
    told = [(q.raw if raw else q.question, name, q.domain) for q in questions for name in gold_ids(q)[:1]]
    return _reading(model, index, told, retriever)


def _reading(
    model: RagmoeBertForQuestionAnswering, index: Index, told: Sequence[tuple[str, str, str]], retriever: str | None
) -> Batches:
    """What the reader reads for each text, with a passage and a domain."""
    texts, names, domains = ([row[at] for row in told] for at in range(3))
    neighbours = None
    if model.gate_sees_neighbours:
        found = index.neighbours(texts, model.config.neighbours, retriever=retriever)
        neighbours = model.recall(found, index, domains)
    return model.batches(texts, [[index.passage(name)] for name in names], neighbours)


def start_rows(model: Any, start: str, nearest: Callable[[], int], *, seed: int) -> dict[str, Tensor]:
    """What a new expert starts with, by the names of ``model.expert_tensors()``, without the dimension E.

    In the gate that is the mean of the other experts' rows: its logit is the mean of theirs, which is seldom among the
    best of many, and so the model goes on nearly as before until the gate has learned.

    Args:
        start: as in ``NewExpertConfig``.
        nearest: tells the place of the nearest expert.

    Raises:
        ModelError: there is no such start.
    """
    shared = model.shared_networks
    source: int | None = None
    if start == "nearest":
        source = nearest()
    elif start != "shared":
        source = _place(model, start)
    elif any(dense is None for dense in shared):
        raise ModelError(
            "the sparse layers have no network that all experts share: full experts stand in its place",
            hint="start from an expert: --from nearest, or --from NAME",
        )
    rows: dict[str, Tensor] = {}
    state = model.state_dict()
    blocks = zip(model.sparse_layers, model.expert_modules().items(), shared, strict=True)
    for i, (experts_name, experts), dense in blocks:
        own = _untrained(model, experts, dense, seed + i) if source is None else {}
        prefix = experts_name.removesuffix("experts")
        for name in sorted(name for name in model.expert_tensors() if name.startswith(prefix)):
            if part_of(name) == "gate":
                rows[name] = state[name].mean(dim=0)
            elif source is None:
                rows[name] = own[name.removeprefix(f"{experts_name}.")][0]
            else:
                rows[name] = state[name][source].clone()
    return rows


def start_cluster(model: Any, names: Iterable[str], embeddings: Callable[[], np.ndarray]) -> dict[str, Tensor]:
    """The centroid of a new expert's cluster, of its own documents, where a model's gates go by clusters.

    Args:
        names: of the new expert's rows.
        embeddings: of some of its documents, float32 (P, R); called where they are wanted.
    """
    # Where the others have none yet, all passages would be the new one's.
    if not any(isinstance(gate, ClusterGate) and gate.is_ready for gate in model.gates):
        return {}
    centroid_R = F.normalize(torch.from_numpy(embeddings().mean(axis=0)), dim=0)
    return {name: centroid_R for name in names if name.endswith(".centroids")}


def nearest_expert(model: RagmoeBertForQuestionAnswering, index: Index, documents: Documents) -> int:
    """The place of the expert whose documents lie nearest to the new ones.

    An expert's centroid is the mean embedding of the other documents, each weighed by the share of its choices that
    falls on the expert. Nearness is the cosine with the centroid of the new documents, both seen from the mean of all
    others: embeddings share a direction that says nothing.
    """
    if not documents.others:
        raise ModelError(
            f"{index.folder} holds no documents but the new ones: nothing says where the experts are",
            hint="start from a certain expert (--from NAME), or give questions of other domains (--others FILE)",
        )
    others, new = documents.others[:PLACED], documents.new[:PLACED]
    return nearest_centroid(_loads(model, index, others), _embeddings(index, others), _embeddings(index, new))


def nearest_centroid(load_QE: np.ndarray, embeddings_QR: np.ndarray, new_PR: np.ndarray) -> int:
    """The place of the expert whose centroid is nearest to that of new documents; see ``nearest_expert``.

    Args:
        load_QE: of other documents the share of the choices that falls on each expert.
        embeddings_QR: theirs; ``new_PR`` are those of the new documents.
    """
    mean_R = embeddings_QR.mean(axis=0)
    centroids_ER = (load_QE.T @ (embeddings_QR - mean_R)) / np.maximum(load_QE.sum(axis=0), 1e-9)[:, None]
    new_R = new_PR.mean(axis=0) - mean_R
    norms_E = np.linalg.norm(centroids_ER, axis=1)
    return int(np.argmax(np.where(norms_E > 0, centroids_ER @ new_R / np.maximum(norms_E, 1e-9), -np.inf)))


def _loads(model: RagmoeBertForQuestionAnswering, index: Index, documents: Sequence[Document]) -> np.ndarray:
    """The share of each document's choices that falls on each expert, a mean over layers: (Q, E)."""
    routed = RoutingStatistics(model.sparse_layers, model.config.experts)
    texts = [document.question for document in documents]
    neighbours = index.neighbours(texts, model.config.neighbours) if model.gate_sees_neighbours else None
    if neighbours is not None:
        neighbours = model.recall(neighbours, index, [document.domain for document in documents])
    passages = [[index.passage(document.passage_id)] for document in documents]
    labels = [str(place) for place in range(len(documents))]
    model.read(texts, passages, neighbours, statistics=routed, domains=labels)
    order = [routed.domains.index(label) for label in labels]
    return routed.load_DLE[order].mean(axis=1)


def _embeddings(index: Index, documents: Sequence[Document]) -> np.ndarray:
    rows = index.rows([document.passage_id for document in documents])
    return np.asarray(index.embeddings[rows], dtype=np.float32)


def joined(model: Any, config: TrainingConfig, wanted: NewExpertConfig, index: Index | None) -> int:
    """Make sure that the bundle takes the expert, keep what is the bundle's own, and return the expert's id."""
    if not is_bundle(config.base):
        raise ConfigError(f"base is {config.base}, which is no bundle: a new expert joins one")
    map_ = read_map(config.base)
    if wanted.joins not in (None, map_.content):
        raise BundleError(
            f"{config.base} is now version {map_.version}, which answers otherwise than the one that the expert was "
            "begun for",
            hint="begin again with --overwrite",
        )
    if not model.sparse_layers:
        raise ModelError(f"{config.base} is dense: it has no gate that could choose a new expert")
    check_balance(config)
    check_name(map_, wanted.name)
    model.config.encoder = map_.encoder.model_dump() if map_.encoder else None
    model.config.index_digest = map_.index
    if index is not None:
        model.check_index(index)
    # The other experts are frozen and cannot answer to them.
    model.config.balance_loss = model.config.z_loss = 0.0
    model.config.losses = None
    return map_.next_expert_id


def _place(model: SparseModel, expert: str) -> int:
    names = model.expert_names
    ids = [str(id) for id in model.config.expert_ids or range(len(names))]
    if expert in names:
        return names.index(expert)
    if expert in ids:
        return ids.index(expert)
    there = ", ".join(f"{id} ({name})" for id, name in zip(ids, names, strict=True))
    raise ModelError(f"there is no expert {expert!r} to start from; there are: shared, nearest, {there}")


def _untrained(model: SparseModel, experts: Any, dense: FeedForward, seed: int) -> dict[str, Tensor]:
    """The tensors of one expert (E = 1) as it comes out of upcycling the layer's dense network."""
    config = copy.copy(model.config)
    config.experts = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(experts)(config)
    made.copy_dense(dense.up, dense.down, noise=0.0, generator=torch.Generator())
    return dict(made.state_dict())
