"""Question and passage as token sequences; a passage that is too long is read in overlapping windows, never cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """One sequence: ``[CLS] question [SEP] part of the passage [SEP]``.

    Attributes:
        input_ids: the tokens.
        context_start: where the passage's part begins in the sequence.
        offsets: for each token of the part, its (start, end) characters in the passage.
    """

    input_ids: list[int]
    context_start: int
    offsets: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.input_ids)

    def visible(self, start: int, end: int) -> tuple[int, int] | None:
        """The passage's characters start to end without those at either end that the tokenizer drops (control
        characters, joiners, spaces); None where no token has any of them."""
        tokens = [(first, stop) for first, stop in self.offsets if stop > start and first < end]
        return (max(start, tokens[0][0]), min(end, tokens[-1][1])) if tokens else None

    def token_span(self, start: int, end: int) -> tuple[int, int] | None:
        """First and last position in the sequence of the passage's characters start to end; None if not inside."""
        first = next((i for i, (_, stop) in enumerate(self.offsets) if stop > start), None)
        last = next((i for i in range(len(self.offsets) - 1, -1, -1) if self.offsets[i][0] < end), None)
        if first is None or last is None or self.offsets[first][0] > start or self.offsets[last][1] < end:
            return None
        return self.context_start + first, self.context_start + last


@dataclass(frozen=True, slots=True)
class TokenizedPassage:
    """A passage's tokens with their characters."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def tokenize_passages(tokenizer: Any, texts: Sequence[str]) -> list[TokenizedPassage]:
    """Tokens and character offsets of texts, without special tokens."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        # What reads like one in a text is text.
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        TokenizedPassage(ids, offsets)
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def tokenize_questions(tokenizer: Any, questions: Sequence[str], max_length: int | None) -> list[list[int]]:
    """Tokens of questions. One longer than half a sequence keeps its end, where the asking is done; None keeps all."""
    if not questions:
        return []
    encoded = tokenizer(
        list(questions),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    kept = slice(None if max_length is None else -(max_length // 2), None)
    return [ids[kept] for ids in encoded["input_ids"]]


def room(question: Sequence[int], max_length: int) -> int:
    """How many tokens of a passage fit beside a question and three special tokens."""
    return max_length - len(question) - 3


def window(tokenizer: Any, question: Sequence[int], passage: TokenizedPassage, begin: int, size: int) -> Window:
    """The sequence that holds tokens ``begin`` to ``begin + size`` of the passage."""
    part = passage.ids[begin : begin + size]
    ids = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id, *part, tokenizer.sep_token_id]
    return Window(ids, len(question) + 2, passage.offsets[begin : begin + size])


def windows(
    tokenizer: Any, question: Sequence[int], passage: TokenizedPassage, *, max_length: int, stride: int
) -> list[Window]:
    """All windows of a passage; neighbours overlap by ``stride`` tokens, the last one is full.

    A passage of n tokens that does not fit gets ceil((n - size) / (size - stride)) + 1 of them, where size is the room
    beside the question. Beside a very long question they overlap by half that room at most, or there would be one
    window a token.
    """
    size, n = room(question, max_length), len(passage.ids)
    step = max(1, size - min(stride, size // 2))
    begins = [0]
    while begins[-1] + size < n:
        begins.append(min(begins[-1] + step, n - size))
    return [window(tokenizer, question, passage, begin, size) for begin in begins]


def collate(tokenizer: Any, batch: Sequence[Window]) -> dict[str, Tensor]:
    """Pad to the longest: input_ids, attention_mask, token_type_ids (Q, T) int64 and context_mask (Q, T) bool."""
    T = max(len(w) for w in batch)
    input_ids = torch.full((len(batch), T), tokenizer.pad_token_id, dtype=torch.long)
    attention_mask, token_type_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    context_mask = torch.zeros(len(batch), T, dtype=torch.bool)
    for row, w in enumerate(batch):
        input_ids[row, : len(w)] = torch.tensor(w.input_ids)
        attention_mask[row, : len(w)] = 1
        token_type_ids[row, w.context_start : len(w)] = 1
        context_mask[row, w.context_start : w.context_start + len(w.offsets)] = True
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "context_mask": context_mask,
    }
