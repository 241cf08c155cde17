"""Encoding block by block: while the model computes one, the tokens of the next are made in a thread of their own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from ragmoe._errors import ModelError
from ragmoe.corpus.types import Passage
from ragmoe.index.blocks import Encoded
from ragmoe.index.encoder import Encoder, token_encoder
from ragmoe.index.manifest import EncodingRecord
from ragmoe.index.vectors import without_direction
from ragmoe.index.windows import LongPassages, Prepared, encode_prepared, prepare_passages


class BlockEncoder:
    """Encodes the passages of blocks, in any order; a context, which ends the thread.

    Args:
        how: precision and size of a batch.
    """

    def __init__(self, encoder: Encoder, mode: LongPassages, prompt: str, how: EncodingRecord | None) -> None:
        self._encoder = encoder
        self._mode: LongPassages = mode
        self._prompt = prompt
        self._how = how
        self._ready: dict[int, Future[Prepared]] = {}
        # What runs texts by its own code may not bear a second thread.
        self._thread = ThreadPoolExecutor(1, "tokens") if token_encoder(encoder) is not None else None

    def __enter__(self) -> BlockEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def begin(self, number: int, passages: Sequence[Passage]) -> None:
        """Have the tokens of a block made, which `encode` will be asked for."""
        if self._thread is not None and passages:
            self._ready[number] = self._thread.submit(self._prepared, passages)

    def encode(self, number: int, passages: Sequence[Passage]) -> Encoded:
        """The vectors of a block, as stored, and the windows that each passage would need.

        Raises:
            ModelError: the encoder gave a vector that is zero or not finite.
        """
        ready = self._ready.pop(number, None)
        prepared = self._prepared(passages) if ready is None else ready.result()
        vectors = encode_prepared(prepared, self._encoder, prompt=self._prompt, how=self._how)
        if len(bad := without_direction(vectors)):
            raise ModelError(
                f"encoder {self._encoder.id!r} gave {len(bad)} of {len(passages)} passages a vector that is zero or "
                f"not finite, the first is {passages[bad[0]].id!r}; nothing was committed",
                hint="leave the passage out, or encode by another: --encoder NAME",
            )
        return vectors.astype(np.float16), prepared.per_passage

    def _prepared(self, passages: Sequence[Passage]) -> Prepared:
        return prepare_passages(passages, self._encoder, mode=self._mode, prompt=self._prompt)
