"""Record which experts served the questions about each passage, beside the index's embeddings.

L sparse layers, E experts, N neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ragmoe._errors import DataError, ModelError
from ragmoe.bundle import is_bundle, read_map
from ragmoe.corpus.types import Question

if TYPE_CHECKING:
    from ragmoe.index import Index
    from ragmoe.index.memory import ExpertMemory

CHUNK = 64


def annotate(
    model: Any,
    index: Index,
    questions: Sequence[Question],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExpertMemory:
    """Route every question over its gold passages and keep, for each passage, which experts its questions went to.

    The memory is saved with the index, under the digest of the model's bundle, and is used from then on wherever this
    bundle, or a later version of it, meets this index. Passages that no question is about speak for the expert that is
    named like their domain, as all did before.

    Args:
        model: a reader with sparse layers, loaded from a bundle.
        questions: those whose gold passages are in the index count.
        progress: called with what is done, how much of it and of how much.

    Raises:
        ModelError: the model has no experts, comes from no bundle, or has not all of its bundle's experts.
        DataError: none of the questions has a gold passage in the index.
        IndexLockedError: the index is being changed, or annotated by somebody else.
        IndexFolderError: it was changed since it was opened.
    """
    from ragmoe.index.target import SameIndex, locked

    if not model.sparse_layers:
        raise ModelError("the model is dense: it has no experts that passages could speak for")
    if not model.bundle_digests:
        raise ModelError("the model comes from no bundle, which its memory could be kept under: save and load it first")
    _require_whole(model)
    model.check_index(index)
    about = [(q, names) for q in questions if (names := gold_in(index, q))]
    if not about:
        raise DataError(f"none of the {len(questions)} questions has a gold passage in {index.folder}")
    # Held all the while: what is recorded with an index that changes meanwhile would be cleared away with it.
    with locked(index.folder):
        SameIndex(index.folder, base=index.manifest).check()
        memory = _route(model, index, about, progress)
        memory.save(index)
    # What was recalled before is by what was recorded before.
    model.forget_memory()
    return memory


def _require_whole(model: Any) -> None:
    """Raise ModelError for a model without some of its experts: what it records stands for the whole bundle."""
    if model.held_back:
        raise ModelError("some experts are held back, and what is recorded is for all: model.hold_back([])")
    folder = model.config._name_or_path
    if not folder or not is_bundle(folder) or (map_ := read_map(folder)).digest != model.bundle_digests[0]:
        return
    if missing := [e.name for e in map_.experts if e.id not in (model.config.expert_ids or ())]:
        raise ModelError(
            f"the model was opened without {', '.join(missing)}; what is recorded is for all experts of {folder}",
            hint="open it whole: load(BUNDLE)",
        )


def _route(
    model: Any,
    index: Index,
    about: Sequence[tuple[Question, list[str]]],
    progress: Callable[[str, int, int], None] | None,
) -> ExpertMemory:
    """The memory of questions, each with its gold passages that the index holds."""
    from ragmoe.index.memory import ExpertMemory
    from ragmoe.moe import RoutingStatistics

    counts: dict[int, np.ndarray] = {}
    asked: Counter[int] = Counter()
    for begin in range(0, len(about), CHUNK):
        chunk = about[begin : begin + CHUNK]
        texts, domains = [q.question for q, _ in chunk], [q.domain for q, _ in chunk]
        neighbours = model.recall(index.neighbours(texts, model.config.neighbours), index, domains)
        # Counted by question: the label of a question is its place in the chunk.
        routed = RoutingStatistics(model.sparse_layers, model.config.experts)
        labels = [str(place) for place in range(len(chunk))]
        model.read(texts, [index.passages(ids) for _, ids in chunk], neighbours, statistics=routed, domains=labels)
        for label, counts_LE in zip(routed.domains, routed.counts_DLE, strict=True):
            for row in {index.row(name) for name in chunk[int(label)][1]}:
                counts[row] = counts.get(row, 0) + counts_LE
                asked[row] += 1
        if progress:
            progress("questions", begin + len(chunk), len(about))
    ids = model.config.expert_ids or list(range(model.config.experts))
    initial = ExpertMemory.of_domains(index, model.expert_names, ids, model.sparse_layers)
    return initial.recorded(counts, asked, model.bundle_digests[0])


def gold_in(index: Index, question: Question) -> list[str]:
    """The gold passages of a question that an index holds; only a question that has some can be annotated with."""
    return [name for name in question.gold_ids if index.find(name) is not None]
