"""What the index benchmark compares: sentence-transformers in a process of its own, a sample, made-up vectors."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from _retrieval_data import CORE
from numpy.typing import NDArray

from ragmoe._threads import available_threads, import_torch
from ragmoe.corpus import Passage, Question
from ragmoe.corpus.passages import read_passages

Vectors = NDArray[np.float32]


class Theirs:
    """`SentenceTransformer.encode` as its users call it: a plain process, the whole corpus in memory, batches of 32.

    A process of its own, because the ``ragmoe`` program sets up the C library so that freed memory is kept, which
    helps whatever runs in it. Waits while ours runs, and the other way round.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def encode(self, texts: Sequence[str], **options: Any) -> tuple[Vectors, float]:
        """Vectors of the texts, and the seconds that they took."""
        self._pipe.send((list(texts), options))
        vectors, seconds = self._pipe.recv()
        return vectors, seconds


@contextmanager
def theirs(folder: Path) -> Iterator[Theirs]:
    """The baseline's process over a model's folder; ended at the end."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(str(folder), there), daemon=True)
    process.start()
    there.close()
    try:
        yield Theirs(here)
    finally:
        here.close()
        process.join(10)


def _serve(folder: str, pipe: Connection) -> None:
    torch = import_torch()
    torch.set_num_threads(available_threads())
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, local_files_only=True)
    while True:
        try:
            texts, options = pipe.recv()
        except EOFError:
            return
        model = model.to(getattr(torch, options.pop("dtype", "float32")))
        start = time.perf_counter()
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False, **options)
        pipe.send((np.asarray(vectors, dtype=np.float32), time.perf_counter() - start))


def sample(data: Path, questions: dict[str, list[Question]], count: int) -> tuple[list[Passage], list[Question]]:
    """About ``count`` passages, as many of each domain, half of them gold of dev questions; and these questions."""
    passages: list[Passage] = []
    asked: list[Question] = []
    each = max(count // len(CORE), 2)
    for domain in CORE:
        corpus = {p.id: p for p in read_passages([str(data / domain / "corpus.jsonl")], domain=domain)}
        gold: dict[str, None] = {}
        for question in questions[domain]:
            if question.gold_ids and len(gold) < each // 2 and set(question.gold_ids) <= set(corpus):
                gold.update(dict.fromkeys(question.gold_ids))
                asked.append(question)
        left = [name for name in corpus if name not in gold]
        step = max(len(left) // max(each - len(gold), 1), 1)
        passages += [corpus[name] for name in (*gold, *islice(left[::step], max(each - len(gold), 0)))]
    return passages, asked


@dataclass
class MadeUp:
    """An encoder without a model: vectors of real passages plus noise, so that a large index takes no hours."""

    base: Vectors
    id: str = "made-up"
    digest: str = "0" * 64
    max_length: int = 256

    def __post_init__(self) -> None:
        self.width = self.base.shape[1]
        self.prompts = {"query": "", "passage": ""}

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> Vectors:
        seeds = [sum(text.encode()) * 1009 + int(text.split()[-1]) for text in texts]
        noise = np.zeros((len(texts), self.width), dtype=np.float32)
        for row, seed in enumerate(seeds):
            noise[row] = np.random.default_rng(seed).standard_normal(self.width)
        made = self.base[np.asarray(seeds, dtype=np.int64) % len(self.base)] + noise * 0.5 / np.sqrt(self.width)
        return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), dtype=np.float32)

    def token_spans(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [np.zeros((8, 2), dtype=np.int64) for _ in texts]


def made_up_lines(passages: Sequence[Passage], count: int) -> Iterator[dict[str, str]]:
    """Records of ``count`` passages of some length, for `MadeUp`."""
    for number in range(count):
        text = passages[number % len(passages)].text[:400]
        yield {"id": f"p{number}", "text": f"{text} number {number}", "domain": "made-up"}


def has_amx() -> bool:
    """Whether the processor multiplies matrices in bf16 by itself."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "amx_bf16" in info.read_text(encoding="utf-8")
