from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ragmoe.evaluation.samples import Sample
from ragmoe.evaluation.scoring import score, summarise
from ragmoe.evaluation.statistics import macro

Make = Callable[..., Sample]


def test_a_span_is_scored_on_its_text_and_again_past_the_threshold(make_answer: Any) -> None:
    scores = score(make_answer("coal", answered=False), ["gravel and coal"], "span")
    assert scores == {"f1": pytest.approx(0.5), "em": 0.0, "f1_thresholded": 0.0, "em_thresholded": 0.0}


def test_yes_or_no_is_right_or_wrong(make_answer: Any) -> None:
    assert score(make_answer("No."), ["no"], "yesno")["f1"] == 1.0
    assert score(make_answer("no ferry"), ["no"], "yesno")["f1"] == 0.0


def test_an_unanswerable_question_is_right_where_nothing_is_answered(make_answer: Any) -> None:
    assert score(make_answer("x", answered=False), [], "span") == {
        "f1": None,
        "em": None,
        "f1_thresholded": 1.0,
        "em_thresholded": 1.0,
    }
    assert score(make_answer("x"), [], "span")["f1_thresholded"] == 0.0


def test_macro_is_the_mean_of_domains_not_of_questions(sample: Make) -> None:
    rows = [sample("1", 1.0), sample("2", 1.0), sample("3", 1.0), sample("4", 0.0, domain="b")]
    found = summarise(rows)
    assert found["macro"]["f1"] == pytest.approx(50.0)
    assert found["per_domain"]["a"]["f1"] == 100.0
    assert found["per_domain"]["b"]["n"] == 1


def test_errors_lower_the_coverage_and_not_the_mean(sample: Make) -> None:
    broken = sample("2", None, answers=("x",), status="error", error="boom")
    skipped = sample("3", None, answers=("x",), status="unscored")
    block = summarise([sample("1", 1.0), broken, skipped])["per_domain"]["a"]
    assert (block["f1"], block["n"], block["errors"], block["unscored"]) == (100.0, 1, 1, 1)
    assert block["coverage"] == pytest.approx(1 / 3)


def test_no_macro_where_a_domain_got_no_score_at_all(sample: Make) -> None:
    broken = sample("2", None, domain="b", answers=("x",), status="error")
    found = summarise([sample("1", 1.0), broken])
    assert found["macro"]["f1"] is None
    assert found["macro"]["coverage"] == 0.5


def test_unanswerable_questions_stay_out_of_the_headline(sample: Make) -> None:
    nothing = sample("2", None, answered=False, f1_thresholded=1.0, no_answer_score=2.0)
    found = summarise([sample("1", 0.5), nothing])
    assert found["macro"]["f1"] == 50.0
    # Past the threshold they count, as SQuAD 2.0 has it, and as a comparison has it.
    assert found["macro"]["f1_thresholded"] == 75.0 == macro([sample("1", 0.5), nothing], "f1_thresholded")
    assert found["no_answer"] == {
        "auroc": 1.0,
        "accuracy": 100.0,
        "rejected": 100.0,
        "answered": 100.0,
        "f1_all": 75.0,
        "n": 2,
        "unanswerable": 1,
        "coverage": 1.0,
    }


def test_yes_no_block(sample: Make) -> None:
    rows = [
        sample("1", 1.0, answer_type="yesno", answers=("yes",), prediction="yes"),
        sample("2", 0.0, answer_type="yesno", answers=("no",), prediction="yes"),
    ]
    block = summarise(rows)["yesno"]
    # yes: 1 of 2 said, 1 of 1 wanted: 2/3; no: 0.
    assert block["accuracy"] == 50.0
    assert block["macro_f1"] == pytest.approx(100 / 3)
    assert summarise([sample("1", 1.0)])["yesno"] is None


def test_a_domain_of_unanswerable_questions_without_a_score_leaves_the_others(sample: Make) -> None:
    lost = sample("2", None, domain="b", status="unscored", f1_thresholded=None, em_thresholded=None)
    found = summarise([sample("1", 0.5), lost])
    assert found["macro"]["f1_thresholded"] == 50.0


def test_what_is_neither_yes_nor_no_nor_maybe_is_never_right(make_answer: Any) -> None:
    for said in ("banana", "", "True"):
        found = score(make_answer(said), ["True"], "yesno")
        assert (found["f1"], found["em"]) == (0.0, 0.0)
    assert score(make_answer("Yes."), ["yes"], "yesno")["f1"] == 1.0
