"""The check of question files finds each fault, at its line, and nothing in a good file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ragmoe import Passage
from ragmoe.corpus import check_questions

PASSAGES = {
    "a": Passage(id="a", text="The ferry leaves at six.", doc_id="d1", split="train"),
    "b": Passage(id="b", text="Bread from Millrace.", doc_id="d2", split="dev"),
    "c": Passage(id="c", text="Also of the first document.", doc_id="d1", split="train"),
    "n": Passage(id="n", text="Split unknown.", doc_id="d3"),
}
GOOD = {"id": "q", "question": "When?", "answers": ["six"], "gold_ids": ["a"], "answer_start": 20}


def check(tmp_path: Path, **files: list[dict[str, Any]]) -> list[str]:
    paths = []
    for name, rows in files.items():
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(problem).removeprefix(f"{tmp_path}/") for problem in check_questions(paths, PASSAGES.get).problems]


def test_good_files_have_no_problem(tmp_path: Path) -> None:
    dev = {"id": "q2", "question": "What?", "answers": ["Bread"], "gold_ids": ["b"], "answer_start": 0}
    none = {"id": "q3", "question": "Who?", "answers": [], "context_ids": ["a"]}
    yes = {"id": "q4", "question": "Is it?", "answers": ["yes"], "answer_type": "yesno", "gold_ids": ["n"]}
    assert check(tmp_path, train=[GOOD, none, yes], dev=[dev]) == []


FAULTS = {
    "gold": ({"gold_ids": ["zz"]}, "gold passage 'zz' is not in the index"),
    "offset": (
        {"answer_start": 19},
        "span 'six' is not at 19 of 'a', there stands ' si'; it stands at 20",
    ),
    "nowhere": (
        {"answers": ["seven"], "answer_start": 3},
        "span 'seven' is not at 3 of 'a', there stands ' ferr'; it stands nowhere in that passage",
    ),
    "other passage": (
        {"answer_spans": [{"passage_id": "b", "start": 0, "text": "Bread"}]},
        "span 'Bread' lies in 'b', which is not among its gold passages",
    ),
    "no gold": ({"gold_ids": []}, "it has answers, but no gold passage"),
    "gold without answer": (
        {"answers": []},
        "it has no answer, but a gold passage ('a'); name that one in context_ids",
    ),
    "context": ({"context_ids": ["zz"]}, "context passage 'zz' is not in the index"),
    "no span": ({"answer_start": None}, "its answers are spans, but it has no answer_spans"),
    "yesno": (
        {"answer_type": "yesno", "answers": ["aye"]},
        "answers ['aye'] to a yesno question; expected yes, no or maybe",
    ),
    "bad line": ({"answers": 3}, "'answers' is not a list of strings"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_at_its_line(name: str, tmp_path: Path) -> None:
    change, reason = FAULTS[name]
    fine = {**GOOD, "id": "fine"}
    assert f"train.jsonl:2: {reason}" in check(tmp_path, train=[fine, {**GOOD, **change}])


def test_a_missing_passage_is_named_once_for_each_question(tmp_path: Path) -> None:
    lost = {**GOOD, "gold_ids": ["zz"], "context_ids": ["zz"]}
    assert check(tmp_path, train=[lost]) == ["train.jsonl:1: gold passage 'zz' is not in the index"]


def test_ids_are_unique_over_all_files(tmp_path: Path) -> None:
    (problem,) = check(tmp_path, train=[GOOD], more=[{**GOOD, "gold_ids": ["n"], "answers": [], "context_ids": []}])[:1]
    assert problem == f"more.jsonl:1: id 'q' stands already at {tmp_path}/train.jsonl:1"


def test_no_gold_document_is_of_two_splits(tmp_path: Path) -> None:
    other = {"id": "q2", "question": "?", "answers": ["Also"], "gold_ids": ["c"], "answer_start": 0}
    assert check(tmp_path, train=[GOOD], more=[other]) == [
        f"more.jsonl:1: gold document 'd1' is of split 'train' already at {tmp_path}/train.jsonl:1, "
        f"and of '{tmp_path}/more.jsonl' here"
    ]


def test_the_split_of_the_corpus_counts_too(tmp_path: Path) -> None:
    assert check(tmp_path, dev=[GOOD]) == [
        "dev.jsonl:1: gold passage 'a' is of split 'train' in the index, and of 'dev' here"
    ]


def test_the_same_split_of_two_domains_may_share(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    for folder, name in (("x", "q1"), ("y", "q2")):
        (tmp_path / folder / "train.jsonl").write_text(json.dumps({**GOOD, "id": name}) + "\n")
    report = check_questions([tmp_path / "x/train.jsonl", tmp_path / "y/train.jsonl"], PASSAGES.get)
    assert report.problems == [] and report.spans == 2 and sum(report.questions.values()) == 2


def test_an_empty_file_is_a_problem(tmp_path: Path) -> None:
    assert check(tmp_path, train=[]) == ["train.jsonl: it holds no question"]
