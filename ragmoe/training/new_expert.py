"""A new expert for a trained bundle: what it starts with, what it learns by, and what it is when it is done.

Everything else of the bundle stays: base, head, the other experts and their gate rows, what the gates share. Experts
trained apart on a frozen base, and gate rows that come last, are FlexOlmo's (Shi et al. 2025). E experts before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragmoe._errors import BundleError, ConfigError, ModelError
from ragmoe.bundle import is_bundle, read_map
from ragmoe.bundle.experts import check_name
from ragmoe.corpus.types import Question
from ragmoe.experts import experts_class
from ragmoe.index import Index
from ragmoe.models import RagmoeBertForQuestionAnswering
from ragmoe.models.growth import grow, settle
from ragmoe.moe import RoutingStatistics
from ragmoe.training.callbacks import Shows
from ragmoe.training.config import NewExpertConfig, TrainingConfig
from ragmoe.training.data import digest, gold_ids
from ragmoe.training.documents import Document, Documents, find_documents
from ragmoe.training.lesson import CallingLesson, gate_inputs, margins
from ragmoe.training.trainer import GateLesson, part_of

# Documents that are read to place the centroids of the experts, and to see whether the new one is called at all; and
# questions that are read to hold it back.
_PLACED, _TRIED, _HEARD = 256, 32, 64


@dataclass(frozen=True)
class NewExpert:
    """A new expert while it is trained.

    Attributes:
        model: the grown reader, in which nothing but the new expert requires a gradient.
        questions: those it is trained on.
        lesson: teaches its gate rows when to call it; None where they are not trained.
    """

    model: RagmoeBertForQuestionAnswering
    config: NewExpertConfig
    index: Index
    documents: Documents
    questions: Sequence[Question]
    lesson: GateLesson | None

    def finish(self, model: RagmoeBertForQuestionAnswering) -> RagmoeBertForQuestionAnswering:
        """The trained reader as an ordinary one.

        Raises:
            ModelError: not one token of its own documents calls the new expert.
        """
        done = settle(model).eval()
        if self.config.train_gate and self.config.keep < 1:
            hold_back(done, self.index, self.questions[:_HEARD], self.config.keep)
        for layer in done.moe_layers:
            layer.gate.balance_bias[-1] += self.config.gate_bias
        called = _loads(done, self.index, self.documents.new[:_TRIED])[:, -1].sum()
        if called == 0.0:
            raise ModelError(
                f"no token of its own documents calls the new expert {self.config.name!r}: it has learned nothing",
                hint="train longer (--steps), or with a larger train.gate_learning_rate",
            )
        return done


def begin_new_expert(
    model: RagmoeBertForQuestionAnswering,
    config: TrainingConfig,
    index: Index,
    questions: Sequence[Question],
    held: Sequence[Question],
    cache: Path,
    show: Shows | None = None,
) -> NewExpert | None:
    """Grow a model by the expert that its configuration asks for; None where it asks for none.

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
    id = _joined(model, config, wanted, index)
    documents = find_documents(wanted, index, questions, held)
    rows = start_rows(model, wanted.start, index, documents, seed=config.seed)
    grown = grow(model, rows, id=id, name=wanted.name)
    lesson = None
    if wanted.train_gate:
        lesson = CallingLesson(grown, index, documents, config, cache, show, follow=not wanted.others)
    else:
        for name, parameter in grown.named_parameters():
            if part_of(name) == "gate":
                parameter.requires_grad_(False)
    return NewExpert(grown, wanted, index, documents, sorted(questions, key=lambda q: digest(q.id)), lesson)


def wanted_expert(config: TrainingConfig) -> NewExpertConfig | None:
    """The section about a new expert; ConfigError where it and ``train.what`` are not both there or both absent."""
    wanted = config.new_expert
    if (wanted is None) != (config.train.what != "new_expert"):
        raise ConfigError(
            f"train.what is {config.train.what!r}, and the section new_expert is "
            f"{'missing' if wanted is None else 'there'}: they go together",
            hint="ragmoe experts add BUNDLE --name NAME --index DIR --questions FILE",
        )
    return wanted


@torch.no_grad()
def hold_back(model: RagmoeBertForQuestionAnswering, index: Index, questions: Sequence[Question], keep: float) -> None:
    """Lower the last expert's balance bias as far as leaves it the share ``keep`` of these questions' calls, by layer.

    A gate that has learned from documents alone draws its boundary in the middle between them; a question of another
    domain that comes near it would be answered in the new domain's manner.
    """
    told = [(question, name) for question in questions for name in gold_ids(question)[:1]]
    texts = [question.question for question, _ in told]
    neighbours = None
    if model.gate_sees_neighbours:
        found = index.neighbours(texts, model.config.neighbours)
        neighbours = model.recall(found, index, [question.domain for question, _ in told])
    heard: list[list[Tensor]] = [[] for _ in model.moe_layers]
    for inputs in model.batches(texts, [[index.passage(name)] for _, name in told], neighbours):
        mask_S = inputs["attention_mask"].reshape(-1).bool()
        for of_layer, (gate, args) in zip(heard, gate_inputs(model, inputs), strict=True):
            margin_S = margins(gate(*args).logits_SE + gate.balance_bias, gate.settings.top_k)[mask_S]
            of_layer.append(margin_S[margin_S >= 0])
    for layer, calls in zip(model.moe_layers, heard, strict=True):
        if (margin_P := torch.cat(calls)).numel():
            layer.gate.balance_bias[-1] -= torch.quantile(margin_P, 1 - keep)


def start_rows(
    model: RagmoeBertForQuestionAnswering, start: str, index: Index, documents: Documents, *, seed: int
) -> dict[str, Tensor]:
    """What a new expert starts with, by the names of ``model.expert_tensors()``, without the dimension E.

    In the gate that is the mean of the other experts' rows: its logit is the mean of theirs, which is seldom among the
    best of many, and so the model goes on nearly as before until the gate has learned.

    Args:
        start: as in ``NewExpertConfig``.

    Raises:
        ModelError: there is no such start.
    """
    layers = [model.bert.encoder.layer[i] for i in model.sparse_layers]
    source: int | None = None
    if start == "nearest":
        source = nearest_expert(model, index, documents)
    elif start != "shared":
        source = _place(model, start)
    elif any(layer.dense is None for layer in layers):
        raise ModelError(
            "the sparse layers have no network that all experts share: full experts stand in its place",
            hint="start from an expert: --from nearest, or --from NAME",
        )
    rows: dict[str, Tensor] = {}
    state = model.state_dict()
    for i, layer in zip(model.sparse_layers, layers, strict=True):
        prefix = f"bert.encoder.layer.{i}.moe."
        own = _untrained(model, layer, seed + i) if source is None else {}
        for name in sorted(name for name in model.expert_tensors() if name.startswith(prefix)):
            if part_of(name) == "gate":
                rows[name] = state[name].mean(dim=0)
            elif source is None:
                rows[name] = own[name.removeprefix(f"{prefix}experts.")][0]
            else:
                rows[name] = state[name][source].clone()
    return rows


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
    others = documents.others[:_PLACED]
    load_QE = _loads(model, index, others)
    embeddings_QR = _embeddings(index, others)
    mean_R = embeddings_QR.mean(axis=0)
    centroids_ER = (load_QE.T @ (embeddings_QR - mean_R)) / np.maximum(load_QE.sum(axis=0), 1e-9)[:, None]
    new_R = _embeddings(index, documents.new[:_PLACED]).mean(axis=0) - mean_R
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
    rows = [index.row(document.passage_id) for document in documents]
    return np.asarray(index.embeddings[rows], dtype=np.float32)


def _joined(
    model: RagmoeBertForQuestionAnswering, config: TrainingConfig, wanted: NewExpertConfig, index: Index
) -> int:
    """Make sure that the bundle takes the expert, keep what is the bundle's own, and return the expert's id."""
    if not is_bundle(config.base):
        raise ConfigError(f"base is {config.base}, which is no bundle: a new expert joins one")
    map_ = read_map(config.base)
    if wanted.joins not in (None, map_.digest):
        raise BundleError(
            f"{config.base} is now version {map_.version}, which is not the one that the expert was begun for",
            hint="begin again with --overwrite",
        )
    if not model.sparse_layers:
        raise ModelError(f"{config.base} is dense: it has no gate that could choose a new expert")
    if config.train.balance_bias_rate:
        raise ConfigError("train.balance_bias_rate moves every expert's bias: a new expert is trained without it")
    check_name(map_, wanted.name)
    model.config.encoder = map_.encoder.model_dump() if map_.encoder else None
    model.config.index_digest = map_.index
    model.check_index(index)
    # The other experts are frozen and cannot answer to them.
    model.config.balance_loss = model.config.z_loss = 0.0
    model.config.losses = None
    return map_.next_expert_id


def _place(model: RagmoeBertForQuestionAnswering, expert: str) -> int:
    names = model.expert_names
    ids = [str(id) for id in model.config.expert_ids or range(len(names))]
    if expert in names:
        return names.index(expert)
    if expert in ids:
        return ids.index(expert)
    there = ", ".join(f"{id} ({name})" for id, name in zip(ids, names, strict=True))
    raise ModelError(f"there is no expert {expert!r} to start from; there are: shared, nearest, {there}")


def _untrained(model: RagmoeBertForQuestionAnswering, layer: Any, seed: int) -> dict[str, Tensor]:
    """The tensors of one expert (E = 1) as it comes out of upcycling the layer's dense network."""
    config = copy.copy(model.config)
    config.experts = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        experts = experts_class(config.expert_kind)(config)
    experts.copy_dense(layer.intermediate.dense, layer.output.dense, noise=0.0, generator=torch.Generator())
    return experts.state_dict()
