"""Passages longer than the encoder's maximum length: windows instead of a silent cut.

A passage is encoded as its title and its text. Where both together are longer than the encoder reads, the text is cut
into overlapping windows at word boundaries, each with the title in front. The first window is what truncation would
have kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ragmoe.corpus.types import Passage
from ragmoe.index.encoder import Encoder, token_encoder
from ragmoe.index.manifest import EncodingRecord
from ragmoe.index.tokens import TokenEncoder, Tokens

_T = TypeVar("_T")
LongPassages = Literal["windows", "truncate"]
OVERLAP = 64
# [CLS], [SEP], and room for the odd token that differs when a window is tokenized on its own.
_SPARE = 4


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of some passages.

    Attributes:
        texts: what is encoded, W windows in order of passage.
        owner: int64 (W,), the passage of each window.
        tokens: int64 (W,), text tokens in each window, without the title; of an only window with it.
    """

    texts: list[str]
    owner: NDArray[np.int64]
    tokens: NDArray[np.int64]

    @property
    def per_passage(self) -> NDArray[np.int64]:
        """int64 (passages,): how many windows each has; more than one if it is longer than the encoder reads."""
        return np.bincount(self.owner).astype(np.int64)


def encoder_text(passage: Passage) -> str:
    """What of a passage is encoded: its title, where it has one that the text does not begin with, and its text."""
    return _head(passage) + passage.text


def cut_windows(passages: Sequence[Passage], encoder: Encoder, *, prompt: str = "", overlap: int = OVERLAP) -> Windows:
    """Cut passages into windows that fit the encoder; one that fits is one window.

    Args:
        prompt: what the encoder will put in front of each window.
        overlap: tokens that two windows share.
    """
    heads = [_head(passage) for passage in passages]
    spans = encoder.token_spans([passage.text for passage in passages])
    head_sizes = [len(tokens) for tokens in encoder.token_spans([prompt + head for head in heads])]
    prompt_size = len(encoder.token_spans([prompt])[0])
    texts: list[str] = []
    owner: list[int] = []
    tokens: list[int] = []
    for i, passage in enumerate(passages):
        # A title longer than half of what is read would leave no room: then the windows go without it.
        head, used = (heads[i], head_sizes[i]) if head_sizes[i] <= encoder.max_length // 2 else ("", prompt_size)
        room = max(encoder.max_length - _SPARE - used, 1)
        for start, end in _cuts(passage.text, spans[i], room, min(overlap, room // 2)):
            first = 0 if start == 0 else int(spans[i][start, 0])
            last = len(passage.text) if end == len(spans[i]) else int(spans[i][end - 1, 1])
            texts.append(head + passage.text[first:last])
            owner.append(i)
            tokens.append(end - start)
    return Windows(texts, np.asarray(owner, dtype=np.int64), np.asarray(tokens, dtype=np.int64))


def pool_windows(vectors: NDArray[np.float32], windows: Windows) -> NDArray[np.float32]:
    """One unit vector a passage, float32 (passages, R): the mean of its windows' vectors, weighted by their tokens.

    A short last window counts less; the plain mean retrieved worse (eval/results/long_passages.md).
    """
    sums = np.zeros((len(windows.per_passage), vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, windows.owner, vectors * np.maximum(windows.tokens, 1)[:, None].astype(np.float32))
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.maximum(norms, 1e-12)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Passages that only the model has yet to read.

    Attributes:
        windows: those that are encoded.
        per_passage: int64 (passages,), how many windows each would need.
        tokens: of the windows, for an encoder that takes them; None for one that takes texts.
    """

    windows: Windows
    per_passage: NDArray[np.int64]
    tokens: list[Tokens] | None


def prepare_passages(
    passages: Sequence[Passage], encoder: Encoder, *, mode: LongPassages, prompt: str = ""
) -> Prepared:
    """Tokenize and cut passages; may be done in another thread while the encoder encodes others."""
    model = token_encoder(encoder)
    if model is None:
        windows, tokens = cut_windows(passages, encoder, prompt=prompt), None
    else:
        windows, tokens = _tokenized(passages, encoder, model, prompt)
    if mode == "windows":
        return Prepared(windows, windows.per_passage, tokens)
    first = np.unique(windows.owner, return_index=True)[1].tolist()
    kept = Windows([windows.texts[i] for i in first], windows.owner[first], windows.tokens[first])
    return Prepared(kept, windows.per_passage, tokens and [tokens[i] for i in first])


def encode_prepared(
    prepared: Prepared, encoder: Encoder, *, prompt: str = "", how: EncodingRecord | None = None
) -> NDArray[np.float32]:
    """The vectors of passages, float32 (passages, R).

    Args:
        how: precision and size of a batch; float32 and what suits the device if None.
    """
    model = token_encoder(encoder)
    if model is None or prepared.tokens is None:
        vectors = encoder.encode(prepared.windows.texts, prompt=prompt)
    elif how is None:
        vectors = model.encode(prepared.tokens)
    else:
        vectors = model.encode(prepared.tokens, precision=how.precision, batch_tokens=how.batch_tokens)
    if len(prepared.windows.texts) == len(prepared.per_passage):
        return vectors
    return pool_windows(vectors, prepared.windows)


def encode_passages(
    passages: Sequence[Passage], encoder: Encoder, *, mode: LongPassages, prompt: str = ""
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The vectors of passages, float32 (len(passages), R), and the windows each would need, int64 (len(passages),)."""
    if not passages:
        return np.zeros((0, encoder.width), dtype=np.float32), np.zeros(0, dtype=np.int64)
    prepared = prepare_passages(passages, encoder, mode=mode, prompt=prompt)
    return encode_prepared(prepared, encoder, prompt=prompt), prepared.per_passage


def _tokenized(
    passages: Sequence[Passage], encoder: Encoder, model: TokenEncoder, prompt: str
) -> tuple[Windows, list[Tokens]]:
    """What `cut_windows` makes, and its tokens: a passage that fits is tokenized but once."""
    heads = [_head(passage) for passage in passages]
    texts = [head + passage.text for head, passage in zip(heads, passages, strict=True)]
    tokens = model.tokenize(texts, prompt=prompt, whole=True)
    most = encoder.max_length - _SPARE + model.special
    # A token has a character at least: these titles are no longer than half of what is read.
    fits = [
        part.shape[1] <= most and len(prompt + head) <= encoder.max_length // 2
        for part, head in zip(tokens, heads, strict=True)
    ]
    long = [i for i, fit in enumerate(fits) if not fit]
    cut = cut_windows([passages[i] for i in long], encoder, prompt=prompt) if long else None
    own = np.flatnonzero(fits)
    all_texts, all_tokens = [texts[i] for i in own], [tokens[i] for i in own]
    owner, sizes = own, np.asarray([tokens[i].shape[1] for i in own], dtype=np.int64)
    if cut is not None:
        all_texts += cut.texts
        all_tokens += model.tokenize(cut.texts, prompt=prompt)
        owner = np.concatenate([owner, np.asarray(long, dtype=np.int64)[cut.owner]])
        sizes = np.concatenate([sizes, cut.tokens])
    order = np.argsort(owner, kind="stable")
    return Windows(_taken(all_texts, order), owner[order], sizes[order]), _taken(all_tokens, order)


def _taken(items: Sequence[_T], order: Iterable[int]) -> list[_T]:
    return [items[i] for i in order]


def _head(passage: Passage) -> str:
    title = passage.title.strip()
    return f"{title}\n" if title and not passage.text.lstrip().startswith(title) else ""


def _cuts(text: str, spans: NDArray[np.int64], room: int, overlap: int) -> list[tuple[int, int]]:
    """Ranges (start, end) of at most ``room`` tokens that cover all, sharing about ``overlap``, from word to word."""
    total = len(spans)
    cuts: list[tuple[int, int]] = []
    start = 0
    while True:
        end = min(start + room, total)
        if end < total:
            end = _word_start(text, spans, end, start + room // 2)
        cuts.append((start, end))
        if end >= total:
            return cuts
        # Always beyond the start of the window just made, whatever the word boundaries say.
        start = _word_start(text, spans, max(end - overlap, start + 1), start + 1)


def _word_start(text: str, spans: NDArray[np.int64], at: int, lowest: int) -> int:
    """The last token at or before ``at``, but not before ``lowest``, that begins a word; ``at`` where there is none."""
    for i in range(at, max(lowest, 1) - 1, -1):
        # Some tokenizers count the space before a word to its first token.
        if text[spans[i, 0] - 1].isspace() or text[spans[i, 0]].isspace():
            return i
    return at
