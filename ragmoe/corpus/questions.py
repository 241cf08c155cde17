"""Questions from jsonl files: one a line, every fault named with file and line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragmoe._errors import DataError
from ragmoe.corpus.files import is_text
from ragmoe.corpus.records import read_jsonl
from ragmoe.corpus.types import Question, Span

_TYPES = ("span", "yesno", "text")
_ALWAYS = ("id", "question", "answers")
_STRINGS = ("id", "question", "answer_type", "domain", "question_raw")
_LISTS = ("answers", "gold_ids", "context_ids")


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a jsonl file, in its order; ids are unique.

    Raises:
        DataError: the file is missing or empty, or a line is bad; names file, line and reason.
    """
    questions: list[Question] = []
    places: dict[str, str] = {}
    for place, question, problem in parse_questions(path):
        if question is None:
            raise DataError(f"{place}: {problem}")
        first = places.setdefault(question.id, place)
        if first is not place:
            raise DataError(f"{place}: id {question.id!r} stands already at {first}")
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: it holds no question")
    return questions


def write_questions(path: str | os.PathLike[str], questions: Iterable[Question]) -> None:
    """Write questions as jsonl; `read_questions` gives them back. Makes its folder, and replaces the
    file only when all is written.

    Raises:
        DataError: the file cannot be written.
    """
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        if not target.parent.exists():
            target.parent.mkdir(parents=True)
        with part.open("w", encoding="utf-8") as file:
            for question in questions:
                fields = {key: value for key, value in asdict(question).items() if value or key in _ALWAYS}
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def parse_questions(path: str | os.PathLike[str]) -> Iterator[tuple[str, Question | None, str]]:
    """Each line's place, with its question or None and a fault; for checks that list all faults."""
    file = Path(path)
    if file.is_dir():
        have = ", ".join(sorted(p.name for p in file.glob("*.jsonl"))) or "none"
        raise DataError(f"questions {path} is a folder, expected a jsonl file; in it there is: {have}")
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.jsonl")) if file.parent.is_dir() else []
        there = f"; in {file.parent} there is: {', '.join(near)}" if near else ""
        raise DataError(f"questions {path}: there is no such file{there}")
    for record in read_jsonl(file, "utf-8"):
        problem = record.problem or _problem(record.fields or {})
        yield record.place, None if problem else _question(record.fields or {}), problem


def _problem(fields: dict[str, Any]) -> str:
    for key in ("id", "question"):
        if not isinstance(fields.get(key), str) or not fields[key].strip():
            return f"no {key!r}, or it is not a string; the line has: {', '.join(sorted(fields)) or 'nothing'}"
    for key in _STRINGS:
        if not isinstance(fields.get(key) or "", str):
            return f"{key!r} is {type(fields[key]).__name__}, expected a string"
    for key in _LISTS:
        values = fields.get(key) or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return f"{key!r} is not a list of strings"
    if (fields.get("answer_type") or "span") not in _TYPES:
        return f"'answer_type' is {fields['answer_type']!r}, expected one of {', '.join(_TYPES)}"
    if not isinstance(fields.get("meta") or {}, dict):
        return "'meta' is not an object"
    spans = fields.get("answer_spans") or []
    if not isinstance(spans, list) or not all(_is_span(span) for span in spans):
        return "'answer_spans' is not a list of {passage_id: string, start: number from 0, text: string, not empty}"
    if not is_text(json.dumps(fields, ensure_ascii=False)):
        return "it holds half of a surrogate pair, which is not text"
    return ""


def _is_span(span: Any) -> bool:
    return (
        isinstance(span, dict)
        and isinstance(span.get("passage_id"), str)
        and isinstance(span.get("text"), str)
        and span["text"] != ""
        and type(span.get("start")) is int
        and span["start"] >= 0
    )


def _question(fields: dict[str, Any]) -> Question:
    answers, gold = tuple(fields.get("answers") or ()), tuple(fields.get("gold_ids") or ())
    spans = tuple(Span(span["passage_id"], span["start"], span["text"]) for span in fields.get("answer_spans") or ())
    start = fields.get("answer_start")
    if not spans and type(start) is int and start >= 0 and answers and gold:
        # The short form of SQuAD: one offset, of the first answer in the first gold passage.
        spans = (Span(gold[0], start, answers[0]),)
    return Question(
        id=fields["id"],
        question=fields["question"],
        answers=answers,
        answer_type=fields.get("answer_type") or "span",
        gold_ids=gold,
        domain=fields.get("domain") or "",
        answer_spans=spans,
        context_ids=tuple(fields.get("context_ids") or ()),
        question_raw=fields.get("question_raw") or "",
        meta=fields.get("meta") or {},
    )
