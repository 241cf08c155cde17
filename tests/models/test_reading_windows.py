"""Windows over long passages: everything is covered, and characters find their tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tiny_models import Make

from ragmoe.models.windows import (
    TokenizedPassage,
    collate,
    room,
    tokenize_passages,
    tokenize_questions,
    windows,
)


@pytest.fixture(scope="module")
def tokenizer(make: Make) -> Any:
    return make(trained=False).tokenizer


class Specials:
    cls_token_id, sep_token_id, pad_token_id = 2, 3, 0


def numbered(n: int) -> TokenizedPassage:
    return TokenizedPassage(list(range(100, 100 + n)), [(i * 2, i * 2 + 1) for i in range(n)])


@pytest.mark.parametrize("question_length", [1, 7, 20])
@pytest.mark.parametrize("stride", [0, 4, 9])
@pytest.mark.parametrize("n", [0, 1, 16, 17, 36, 37, 41, 100])
def test_windows_cover_every_token_with_the_overlap(question_length: int, stride: int, n: int) -> None:
    question, passage, max_length = list(range(50, 50 + question_length)), numbered(n), 40
    found = windows(Specials, question, passage, max_length=max_length, stride=stride)
    size = room(question, max_length)
    assert size == 40 - question_length - 3
    overlap = min(stride, size // 2)
    assert len(found) == max(0, math.ceil((n - size) / (size - overlap))) + 1
    spans = []
    for w in found:
        begin = w.offsets[0][0] // 2 if w.offsets else 0
        part = passage.ids[begin : begin + len(w.offsets)]
        assert w.input_ids == [2, *question, 3, *part, 3]
        assert w.context_start == question_length + 2
        assert w.offsets == passage.offsets[begin : begin + len(part)]
        assert len(w) <= max_length and len(part) == min(n, size)
        spans.append((begin, begin + len(part)))
    assert spans[0][0] == 0 and spans[-1][1] == n
    for (_, end), (begin, _) in itertools.pairwise(spans[:-1]):
        assert end - begin == overlap
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end - begin >= overlap


def test_a_stride_wider_than_the_room_does_not_make_a_window_a_token() -> None:
    assert len(windows(Specials, list(range(20)), numbered(200), max_length=40, stride=96)) < 25


def test_a_long_question_keeps_its_end(tokenizer: Any) -> None:
    short, long = tokenize_questions(tokenizer, ["who is he?", "the river " * 50 + "when?"], max_length=24)
    assert tokenizer.convert_ids_to_tokens(short) == ["who", "is", "he", "?"]
    assert len(long) == 12
    assert tokenizer.convert_ids_to_tokens(long)[-3:] == ["river", "when", "?"]
    assert tokenize_passages(tokenizer, []) == []


TEXT = "The Clinic  opened in 1987,\nwhen Zoë's café — by the RIVER — closed. She left: 3.5 years later!"


def test_characters_to_tokens_and_back(tokenizer: Any) -> None:
    passage = tokenize_passages(tokenizer, [TEXT])[0]
    found = windows(tokenizer, [50, 51], passage, max_length=25, stride=6)
    assert len(found) > 2
    for w in found:
        for first in range(len(w.offsets)):
            for last in range(first, len(w.offsets)):
                start, end = w.offsets[first][0], w.offsets[last][1]
                assert w.token_span(start, end) == (w.context_start + first, w.context_start + last)


def test_a_span_inside_a_token_finds_the_token(tokenizer: Any) -> None:
    w = windows(tokenizer, [50], tokenize_passages(tokenizer, ["the clinic is open"])[0], max_length=30, stride=0)[0]
    place = w.context_start + 1
    assert w.token_span(4, 10) == w.token_span(5, 9) == (place, place)


def test_a_span_outside_the_window_is_not_there(tokenizer: Any) -> None:
    passage = tokenize_passages(tokenizer, [TEXT])[0]
    first, *_, last = windows(tokenizer, [50, 51], passage, max_length=20, stride=4)
    end_of_first, begin_of_last = first.offsets[-1][1], last.offsets[0][0]
    assert first.token_span(0, end_of_first) is not None
    assert first.token_span(0, end_of_first + 2) is None
    assert first.token_span(begin_of_last, len(TEXT)) is None
    assert last.token_span(begin_of_last, len(TEXT)) is not None
    assert last.token_span(begin_of_last - 1, len(TEXT)) is None
    assert windows(tokenizer, [50], TokenizedPassage([], []), max_length=20, stride=4)[0].token_span(0, 1) is None


def test_every_character_span_is_inside_some_window_if_short(tokenizer: Any) -> None:
    passage = tokenize_passages(tokenizer, [TEXT])[0]
    found = windows(tokenizer, [50, 51], passage, max_length=25, stride=8)
    for first in range(len(passage.ids) - 7):
        start, end = passage.offsets[first][0], passage.offsets[first + 7][1]
        assert any(w.token_span(start, end) for w in found)


def test_collate(tokenizer: Any) -> None:
    short, long = (windows(Specials, [50] * q, numbered(n), max_length=40, stride=4)[0] for q, n in ((2, 1), (3, 4)))
    batch = collate(tokenizer, [short, long])
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [
        [2, 50, 50, 3, 100, 3, *[pad] * 4],
        [2, 50, 50, 50, 3, 100, 101, 102, 103, 3],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 10]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0, 0], [0] * 5 + [1] * 5]
    assert batch["context_mask"].tolist() == [[i == 4 for i in range(10)], [5 <= i < 9 for i in range(10)]]
    assert batch["context_mask"].dtype == torch.bool


def test_control_tokens_in_a_text_are_text(make: Make) -> None:
    tokenizer = make().tokenizer
    text = "the [SEP] river [CLS]"
    (passage,), (question,) = tokenize_passages(tokenizer, [text]), tokenize_questions(tokenizer, [text], 48)
    assert passage.ids == question and not {*question} & {tokenizer.sep_token_id, tokenizer.cls_token_id}
    assert tokenizer("the [SEP]", add_special_tokens=False)["input_ids"][-1] == tokenizer.sep_token_id
