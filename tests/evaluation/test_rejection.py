"""The setting ``rejection``: each question over passages that hold its answer, and again over others alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ragmoe import DataError
from ragmoe.evaluation import Results, evaluate
from ragmoe.evaluation.experiment import load_experiment
from ragmoe.evaluation.experiment_run import run_experiment
from ragmoe.evaluation.goals import compare_arms
from ragmoe.evaluation.items import check_gold
from ragmoe.evaluation.report import kinds
from ragmoe.evaluation.task import load_task

MakeReader, MakeTask = Callable[..., Any], Callable[..., Path]
QUESTIONS: list[dict[str, Any]] = [
    {"id": "q1", "question": "When did the long bridge open?", "answers": ["in 1911", "1911"], "gold_ids": ["r1"]},
    {"id": "q2", "question": "What do barges carry on the river?", "answers": ["coal"], "gold_ids": ["r2"]},
    {"id": "q4", "question": "Where were bronze coins struck?", "answers": ["Bronze"], "gold_ids": ["c2"]},
    {"id": "q5", "question": "Who engraved the crown?", "answers": [], "context_ids": ["c2"]},
]

GOLD = {question["id"]: question.get("gold_ids", []) for question in QUESTIONS}


def by_id(results: Results) -> dict[str, Any]:
    return {sample.id: sample for sample in results.samples["real"]}


def test_what_is_read_and_shown(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    reader = make_reader()
    results = evaluate(reader, make_task(QUESTIONS, setting="rejection", passages=3), index)
    found = by_id(results)
    assert list(found) == ["q1", "q1#rejection", "q2", "q2#rejection", "q4", "q4#rejection", "q5"]
    assert {len(sample.read) for sample in found.values()} == {3}
    for question in QUESTIONS[:3]:
        gold, present, absent = question["gold_ids"][0], found[question["id"]], found[question["id"] + "#rejection"]
        assert gold in present.read and present.gold_read == (gold,) and present.answerable
        # Nowhere is it there without: not among what is read, nor among the neighbours.
        assert gold not in absent.read and gold not in absent.retrieved and not absent.answerable
        assert gold in present.retrieved and absent.doc_id == present.doc_id and absent.domain == present.domain
    asked, _, shown = reader.calls[0]
    assert shown is not None
    at = asked.index(QUESTIONS[0]["question"])
    assert shown[at][0] == "r1" and shown[at + 1] == shown[at][1:]
    # A passage that says the answer is no distractor, though it is not the one asked about.
    assert "c1" not in {*found["q4"].read, *found["q4#rejection"].read}
    # What nothing answers is asked once, over what it was asked over and its like.
    assert "c2" in found["q5"].read
    # The place among the passages does not tell which one holds the answer.
    assert {found[name].read.index(found[name].gold_read[0]) for name in ("q1", "q2", "q4")} != {0}


def test_how_it_is_scored(make_reader: MakeReader, make_task: MakeTask, make_answer: Any, index: Any) -> None:
    """Of two the answer is given in either case, of one in neither, of the last it is withheld."""
    said = {q["question"]: make_answer("1911", score=1.0) for q in QUESTIONS[:2]}
    silent = make_answer("", answered=False, no_answer_score=3.0)
    said |= {QUESTIONS[2]["question"]: silent, QUESTIONS[3]["question"]: silent}
    results = evaluate(make_reader(answers=said), make_task(QUESTIONS, setting="rejection", passages=3), index)
    block = results.real["no_answer"]
    assert (block["n"], block["unanswerable"]) == (7, 4)
    assert block["rejected"] == 50.0 and block["answered"] == pytest.approx(100 * 2 / 3)
    # The headline is that of the questions that have their passages: 1 and 0 for rivers, 0 for coins.
    assert results.macro_f1 == 25.0 and results.real["macro"]["n"] == 3
    # Past the threshold all count: rivers 1 of 4, coins 2 of 3.
    assert results.real["macro"]["f1_thresholded"] == pytest.approx(100 * (1 / 4 + 2 / 3) / 2)
    table = kinds({"arm": [results]})
    assert table is not None and table.rows[0][4:6] == ["50.0", "66.7"]


def test_taken_up_again_and_read_anew_where_more_is_read(
    make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path
) -> None:
    reader = make_reader()
    for passages, read_by_then in ((3, 1), (3, 1), (2, 2)):
        task = make_task(QUESTIONS, setting="rejection", passages=passages)
        results = evaluate(reader, task, index, out=tmp_path / "out")
        assert len(reader.calls) == read_by_then
        assert {len(sample.read) for sample in results.samples["real"]} == {passages}


def test_questions_without_their_passages(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    unknown = {"id": "q6", "question": "Is the bridge long?", "answers": ["yes"], "answer_type": "yesno"}
    found = by_id(evaluate(make_reader(), make_task([*QUESTIONS, unknown], setting="rejection"), index))
    assert found["q6"].status == "unscored" and "no gold_ids" in found["q6"].error
    # What it would have to be asked without, nobody knows.
    assert "q6#rejection" not in found
    task = load_task(make_task([unknown], setting="rejection"))
    questions = task.load_questions()
    with pytest.raises(DataError, match="which name the passage that the setting rejection gives to the reader"):
        check_gold(task, questions)


def test_arms_are_compared_past_the_threshold(
    write: Any, trained: list[str], make_task: MakeTask, tmp_path: Path
) -> None:
    goal = {"a": "retrieval", "b": "dense", "metric": "macro_f1_thresholded", "setting": "rejection", "at_least": -1.0}
    experiment = load_experiment(write(goals=[goal]), seeds=[0])
    make_task(QUESTIONS, setting="rejection", passages=3)
    outcome = run_experiment(experiment, out=tmp_path / "out")
    (compared,) = outcome.result.comparisons
    assert (compared.metric, compared.setting) == ("macro_f1_thresholded", "rejection")
    (run,) = outcome.runs["retrieval"]["small"]
    # All seven, in the place of the three that have an answer.
    assert run.real["macro"]["n"] == 3 and trained
    found = compare_arms(experiment, outcome.tasks, outcome.runs)
    assert [comparison.n for comparison in found.values()] == [7]


def test_to_say_nothing_of_nothing_is_no_merit(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    """Every passage but the gold one says the answer: nothing is left to read without it."""
    common = {"id": "q1", "question": "What is it?", "answers": ["the", "a", "are", "were"], "gold_ids": ["r1"]}
    reader = make_reader()
    results = evaluate(reader, make_task([common, QUESTIONS[1]], setting="rejection", passages=3), index)
    found = by_id(results)
    assert found["q1#rejection"].read == () and found["q1#rejection"].status == "unscored"
    assert "no passage was found to read it over" in found["q1#rejection"].error
    block = results.real["no_answer"]
    assert (block["unanswerable"], block["rejected"]) == (1, 0.0)


def test_where_the_gold_passage_found_no_room_nothing_is_judged(
    make_reader: MakeReader, make_task: MakeTask, make_answer: Any, index: Any
) -> None:
    @dataclass(frozen=True)
    class Written(make_answer):  # type: ignore[misc]
        """As a generator's, whose prompt had room for one passage."""

        left_out: int = 2
        shortened: int = 0

    said = {q["question"]: Written("1911") for q in QUESTIONS}
    results = evaluate(make_reader(answers=said), make_task(QUESTIONS, setting="rejection", passages=3), index)
    judged = {name: sample.status for name, sample in by_id(results).items()}
    lost = [name for name, sample in by_id(results).items() if sample.answerable and sample.read[0] not in GOLD[name]]
    assert lost and {judged[name] for name in lost} == {"unscored"}
    assert {status for name, status in judged.items() if name not in lost} == {"ok"}
    assert results.real["macro"]["coverage"] == pytest.approx(1 - len(lost) / 3)


def test_evaluations_of_before_tell_the_shares_too(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    results = evaluate(make_reader(), make_task(QUESTIONS, setting="rejection", passages=3), index)
    new = kinds({"arm": [results]})
    for key in ("rejected", "answered"):
        del results.real["no_answer"][key]
    assert new is not None and kinds({"arm": [results]}) == new


def test_an_id_that_is_made_must_be_free(make_task: MakeTask, make_reader: MakeReader, index: Any) -> None:
    twin = {**QUESTIONS[1], "id": "q1#rejection"}
    with pytest.raises(DataError, match="'q1#rejection' is the id of a question, and what q1 is called"):
        evaluate(make_reader(), make_task([QUESTIONS[0], twin], setting="rejection"), index)
