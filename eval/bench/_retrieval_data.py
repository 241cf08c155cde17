"""What the two retrieval benchmarks share: the data, and recall by ir-measures."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ir_measures
import numpy as np
from ir_measures import R
from numpy.typing import NDArray

from ragmoe.corpus import Question, read_questions
from ragmoe.index import Encoder

CORE = ("wiki", "biomed", "legal", "privacy", "finance", "narrative", "reviews")
FIELDS = ("question", "question_raw")
CUTOFFS = (1, 5, 20)


def data_folder(given: Path | None) -> Path:
    """The folder with one folder a domain; ends the program with a clear message if there is none."""
    folder = given or (Path(os.environ["RAGMOE_DATA"]) if os.environ.get("RAGMOE_DATA") else None)
    missing = [name for name in CORE if folder is None or not (folder / name / "dev.jsonl").is_file()]
    if folder is None or missing:
        what = "no data was named" if folder is None else f"{folder} lacks DOMAIN/dev.jsonl of: {', '.join(missing)}"
        sys.exit(
            f"error: {what}\nhint: this benchmark needs the seven core domains ({', '.join(CORE)}), each a folder with "
            "corpus.jsonl and dev.jsonl: --data DIR, or RAGMOE_DATA=DIR"
        )
    return folder


def dev_questions(folder: Path) -> dict[str, list[Question]]:
    """The dev questions of each core domain."""
    return {name: read_questions(folder / name / "dev.jsonl") for name in CORE}


class Remembering:
    """An encoder that encodes each query once, however many retrievers ask."""

    def __init__(self, encoder: Encoder) -> None:
        self.id, self.digest, self.prompts = encoder.id, encoder.digest, encoder.prompts
        self.width, self.max_length = encoder.width, encoder.max_length
        self._encoder = encoder
        self._known: dict[tuple[str, str], NDArray[np.float32]] = {}

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> NDArray[np.float32]:
        new = list(dict.fromkeys(text for text in texts if (prompt, text) not in self._known))
        for text, vector in zip(new, self._encoder.encode(new, prompt=prompt), strict=True):
            self._known[prompt, text] = vector
        return np.stack([self._known[prompt, text] for text in texts])

    def token_spans(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return self._encoder.token_spans(texts)


def text_of(question: Question, field: str) -> str:
    """A question as one of the two fields says it."""
    return question.raw if field == "question_raw" else question.question


def recalls(questions: Sequence[Question], found: Sequence[Sequence[str]]) -> dict[int, float]:
    """Mean R@1, R@5 and R@20 (share of a question's gold passages found) of rankings of passage ids."""
    qrels = {q.id: dict.fromkeys(q.gold_ids, 1) for q in questions}
    run = {q.id: {name: float(-rank) for rank, name in enumerate(ids)} for q, ids in zip(questions, found, strict=True)}
    values = ir_measures.calc_aggregate([R @ k for k in CUTOFFS], qrels, run)
    return {k: float(values[R @ k]) for k in CUTOFFS}


def with_mean(per_domain: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """The same with the mean over the domains."""
    mean = {k: sum(values[k] for values in per_domain.values()) / len(per_domain) for k in CUTOFFS}
    return {**{name: dict(values) for name, values in per_domain.items()}, "mean": mean}
