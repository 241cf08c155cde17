"""An encoder without a model: hashed bags of words, so texts that share words are alike. Deterministic, no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class StubEncoder:
    """A word is a token; R is small; ``seed`` makes another encoder of it. ``encoded`` records what was asked for."""

    def __init__(
        self, seed: int = 0, *, width: int = 64, max_length: int = 20, query_prompt: str = "", passage_prompt: str = ""
    ) -> None:
        self.id = f"stub-{seed}"
        self.digest = hashlib.sha256(f"{seed}/{width}".encode()).hexdigest()
        self.width = width
        self.max_length = max_length
        self.prompts = {"query": query_prompt, "passage": passage_prompt}
        self.encoded: list[str] = []
        self._seed = seed

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> NDArray[np.float32]:
        self.encoded += [prompt + text for text in texts]
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        for i, text in enumerate(texts):
            # What has no word has a vector too, as that of any encoder with special tokens.
            for word in re.findall(r"\w+", (prompt + text).lower())[: self.max_length] or [text]:
                vectors[i] += self._word(word)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def token_spans(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        spans = [[match.span() for match in re.finditer(r"\w+", text)] for text in texts]
        return [np.asarray(found, dtype=np.int64).reshape(-1, 2) for found in spans]

    def _word(self, word: str) -> NDArray[np.float32]:
        seed = int.from_bytes(hashlib.sha256(f"{self._seed} {word}".encode()).digest()[:8], "big")
        return np.random.default_rng(seed).standard_normal(self.width).astype(np.float32)
