"""Question files: read, written back the same, and every bad line named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ragmoe import DataError, Question
from ragmoe.corpus import read_questions, write_questions
from ragmoe.corpus.types import Span

FULL = {
    "id": "q1",
    "question": "Ferries: when?",
    "question_raw": "When?",
    "answers": ["six", "at six"],
    "answer_type": "span",
    "gold_ids": ["a"],
    "context_ids": ["a"],
    "domain": "river",
    "answer_spans": [{"passage_id": "a", "start": 20, "text": "six"}],
    "meta": {"source": "x"},
}


def write(path: Path, *rows: dict | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_all_fields_are_read(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "q.jsonl", FULL))
    assert question == Question(
        id="q1",
        question="Ferries: when?",
        answers=("six", "at six"),
        answer_type="span",
        gold_ids=("a",),
        domain="river",
        answer_spans=(Span("a", 20, "six"),),
        context_ids=("a",),
        question_raw="When?",
        meta={"source": "x"},
    )
    assert question.raw == "When?"


def test_few_fields_are_enough(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "q.jsonl", {"id": "q", "question": "Why?"}))
    assert question == Question(id="q", question="Why?")
    assert question.raw == "Why?"


def test_one_offset_becomes_a_span(tmp_path: Path) -> None:
    row = {"id": "q", "question": "When?", "answers": ["six"], "gold_ids": ["a"], "answer_start": 4}
    (question,) = read_questions(write(tmp_path / "q.jsonl", row))
    assert question.answer_spans == (Span("a", 4, "six"),)


def test_written_and_read_back(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path / "q.jsonl", FULL, {"id": "q2", "question": "Pourquoi\u2028?"}))
    write_questions(tmp_path / "out.jsonl", questions)
    assert read_questions(tmp_path / "out.jsonl") == questions
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]


BAD = {
    "not JSON": ("{", "not JSON"),
    "no id": ({"question": "?"}, "no 'id', or it is not a string; the line has: question"),
    "no question": ({"id": "x", "query": "?"}, "no 'question', or it is not a string; the line has: id, query"),
    "answers": ({"id": "x", "question": "?", "answers": "six"}, "'answers' is not a list of strings"),
    "gold": ({"id": "x", "question": "?", "gold_ids": [1]}, "'gold_ids' is not a list of strings"),
    "type": (
        {"id": "x", "question": "?", "answer_type": "list"},
        "'answer_type' is 'list', expected one of span, yesno, text",
    ),
    "domain": ({"id": "x", "question": "?", "domain": 3}, "'domain' is int, expected a string"),
    "meta": ({"id": "x", "question": "?", "meta": [1]}, "'meta' is not an object"),
    "negative": (
        {"id": "x", "question": "?", "answer_spans": [{"passage_id": "a", "start": -1, "text": "t"}]},
        "'answer_spans' is not a list of",
    ),
    "half a pair": (
        '{"id": "x", "question": "what \\ud83d is"}',
        "it holds half of a surrogate pair, which is not text",
    ),
    "half a pair in meta": ({"id": "x", "question": "?", "meta": {"source": "\ud83d"}}, "half of a surrogate pair"),
    "seen before": ({"id": "q1", "question": "?"}, "id 'q1' stands already at"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named(name: str, tmp_path: Path) -> None:
    row, reason = BAD[name]
    path = write(tmp_path / "q.jsonl", FULL, row)
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert caught.value.message.startswith(f"{path}:2: ")
    assert reason in caught.value.message


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_questions(tmp_path / "q.jsonl", [Question("q", "what \ud83d is")])
    assert not list(tmp_path.iterdir())


def test_missing_and_empty_files(tmp_path: Path) -> None:
    write(tmp_path / "dev.jsonl")
    with pytest.raises(DataError, match="it holds no question"):
        read_questions(tmp_path / "dev.jsonl")
    with pytest.raises(DataError, match=r"there is no such file; in .* there is: dev\.jsonl"):
        read_questions(tmp_path / "test.jsonl")
