"""The documents a new expert is for, and those it is not for: what its gate rows learn from.

No labels are needed. A sentence of a passage stands for a question about it, as in the inverse cloze task (Lee et al.
2019, "Latent Retrieval for Weakly Supervised Open Domain Question Answering"), on both sides alike, so that nothing but
the documents tells them apart.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from ragmoe._errors import DataError
from ragmoe.corpus import chunk_passage, cloze_questions, read_documents
from ragmoe.corpus.types import Passage, Question
from ragmoe.index import Index
from ragmoe.index.rows import key
from ragmoe.training.config import NewExpertConfig
from ragmoe.training.data import gold_ids, load_questions
from ragmoe.training.digests import digest

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
# Words of a sentence that can stand for a question.
_WORDS = range(4, 31)


@dataclass(frozen=True, slots=True)
class Document:
    """A passage with a question that leads to it."""

    question: str
    passage_id: str
    domain: str


@dataclass(frozen=True)
class Documents:
    """What a new expert is for, and what it is not for."""

    new: list[Document]
    others: list[Document]


def find_documents(
    config: NewExpertConfig,
    index: Index,
    questions: Sequence[Question],
    held: Sequence[Question],
    *,
    raw: bool = False,
) -> Documents:
    """Draw documents of both kinds, at most ``config.documents`` of each; the others evenly from their domains.

    Args:
        questions: those the new expert is trained on.
        held: those it is judged by, whose documents are left out as those of ``config.unseen`` are.
        raw: questions are asked as ``question_raw`` has them.

    Raises:
        DataError: sources of the new documents are not in the index, or a gate that is to learn has nothing to learn
            from on one of the two sides.
    """
    hidden = _documents_of([*held, *load_questions(config.unseen)], index)
    new, others = _sides(config, index, questions)
    if config.others:
        known = load_questions(config.others)
        drawn = [_asked(side, index, hidden, config.documents, raw=raw) for side in (questions, known)]
    else:
        drawn = [_cut(new, index, hidden, config.documents), _cut(others, index, hidden, config.documents)]
    if not drawn[0]:
        raise DataError(
            f"{index.folder} holds no document that the gate could learn the expert {config.name} from",
            hint="name its sources with --corpus, or give fewer questions to judge it by",
        )
    if config.train_gate and not drawn[1]:
        # It would learn that everything is its own.
        raise DataError(
            f"nothing says when not to call the expert {config.name}: {_why_none(config, index, new)}",
            hint="new_expert.train_gate=false leaves its gate rows as they start, so that votes alone lead to it",
        )
    return Documents(*drawn)


def _why_none(config: NewExpertConfig, index: Index, new: Sequence[int]) -> str:
    if config.others:
        return f"none of the questions of {', '.join(config.others)} is about a passage of {index.folder}"
    if not config.corpus and not any(index.domains[row] for row in new):
        return (
            f"the passages of {index.folder} that its questions are about name no domain, by which its documents could "
            "be told from the others; name them with --corpus, or others with --others FILE"
        )
    return f"{index.folder} holds no documents but its own, and those that it is judged by; expected others beside them"


def made_questions(config: NewExpertConfig, index: Index) -> list[Question]:
    """Cloze questions from the new documents, but for those that the expert is judged by.

    Raises:
        DataError: the sources are not in the index, or give no question.
    """
    hidden = _documents_of(load_questions(config.unseen), index)
    passages = [index.passage(index.passage_ids[row]) for row in sorted(_rows_of(config.corpus, index))]
    made = cloze_questions([passage for passage in passages if (passage.doc_id or passage.id) not in hidden])
    if not made:
        raise DataError(
            f"no question can be made of the {len(passages)} passages of {', '.join(config.corpus)}: "
            "no two passages of one document speak of the same thing",
            hint="give questions to learn from: --questions FILE",
        )
    return made


def _sides(config: NewExpertConfig, index: Index, questions: Sequence[Question]) -> tuple[list[int], list[int]]:
    """The rows of the new documents and of all others; none where nothing tells them apart."""
    if config.corpus:
        inside = _rows_of(config.corpus, index)
        return sorted(inside), [row for row in range(len(index)) if row not in inside]
    about = {index.row(name) for q in questions for name in (*q.gold_ids, *q.context_ids)}
    domains = {index.domains[row] for row in about} - {""}
    if not domains:
        return sorted(about), []
    inside = {row for row, domain in enumerate(index.domains) if domain in domains} | about
    return sorted(inside), [row for row in range(len(index)) if row not in inside]


def _rows_of(sources: Sequence[str], index: Index) -> set[int]:
    """The rows of some sources, however they were cut; DataError where they are not all there.

    A document is known by its text: its id is only its name within these sources.
    """
    documents = {document.id: document for document in read_documents(sources)}
    rows: dict[str, set[int]] = defaultdict(set)
    ended: set[str] = set()
    other: set[str] = set()
    for row, chunk in enumerate(index.chunks()):
        name, text = chunk.source_id, chunk.passage.text
        if name not in documents:
            continue
        if documents[name].text.startswith(text, chunk.start):
            rows[name].add(row)
            if chunk.start + len(text) >= len(documents[name].text.rstrip()):
                ended.add(name)
        else:
            other.add(name)
    found = {name: rows[name] for name in ended - other}
    found |= _rows_by_text([documents[name] for name in documents.keys() - found.keys()], index)
    if missing := sorted(documents.keys() - found.keys()):
        there = ", whose name is that of another text there" if missing[0] in rows.keys() | other else ""
        raise DataError(
            f"{len(missing)} of {len(documents)} documents of {', '.join(sources)} are not in {index.folder}, "
            f"for example {missing[0]!r}{there}",
            hint=f"ragmoe index build {' '.join(sources)} OTHER_SOURCES --out {index.folder} --overwrite",
        )
    return set().union(*found.values())


def _rows_by_text(documents: Sequence[Passage], index: Index) -> dict[str, set[int]]:
    """The rows of those documents of which all is there, cut as the index was built, under whatever ids.

    `index add` passes over a text that is there already.
    """
    if not documents:
        return {}
    cut = index.manifest.chunking
    ways: dict[str, list[set[bytes]]] = {}
    for document in documents:
        chunks = chunk_passage(document, words=cut.words, overlap=cut.overlap)
        ways[document.id] = [{key(document)}, {key(chunk.passage) for chunk in chunks}]
    wanted = set().union(*chain.from_iterable(ways.values()))
    rows: dict[bytes, set[int]] = defaultdict(set)
    for row, passage in enumerate(index.iterate()):
        if (text := key(passage)) in wanted:
            rows[text].add(row)
    whole = {name: next((way for way in both if way <= rows.keys()), None) for name, both in ways.items()}
    return {name: set().union(*(rows[text] for text in way)) for name, way in whole.items() if way}


def _cut(rows: Iterable[int], index: Index, hidden: set[str], limit: int) -> list[Document]:
    """Passages with a sentence of their own for a question, in an order that only their ids decide."""
    by_domain: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_domain[index.domains[row]].append(index.passage_ids[row])
    queues = [sorted(names, key=digest) for _, names in sorted(by_domain.items())]
    found: list[Document] = []
    for name in (name for turn in zip_longest(*queues) for name in turn if name is not None):
        if len(found) == limit:
            break
        passage = index.passage(name)
        if (passage.doc_id or name) not in hidden:
            found.append(Document(_sentence(passage.text, name), name, passage.domain))
    return found


def _asked(questions: Sequence[Question], index: Index, hidden: set[str], limit: int, *, raw: bool) -> list[Document]:
    """Real questions with a passage that answers them."""
    found: list[Document] = []
    for question in sorted(questions, key=lambda q: digest(q.id)):
        name = next((name for name in gold_ids(question) if index.find(name) is not None), None)
        if name is not None and len(found) < limit and _document(index, name) not in hidden:
            found.append(Document(question.raw if raw else question.question, name, question.domain))
    return found


def _sentence(text: str, seed: str) -> str:
    """A sentence of a text, or its first words where none has the length of a question."""
    sentences = [sentence for sentence in _SENTENCE.split(text.strip()) if len(sentence.split()) in _WORDS]
    return random.Random(seed).choice(sentences) if sentences else " ".join(text.split()[: _WORDS[-1]])


def _documents_of(questions: Sequence[Question], index: Index) -> set[str]:
    names = {name for question in questions for name in (*question.gold_ids, *question.context_ids)}
    return {_document(index, name) for name in names if index.find(name) is not None}


def _document(index: Index, passage_id: str) -> str:
    return index.passage(passage_id).doc_id or passage_id
