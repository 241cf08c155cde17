from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ragmoe import ConfigError, DataError
from ragmoe.corpus.types import Question
from ragmoe.evaluation.task import Task, load_task, parse_task, subset

SHIPPED = sorted((Path(__file__).parents[2] / "eval" / "tasks").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tasks_load_and_are_called_as_their_file(path: Path) -> None:
    task = load_task(path)
    assert task.name == path.stem
    assert task.description
    assert len(path.read_text().splitlines()) <= 25


def test_the_packaged_questions_are_found() -> None:
    task = load_task(next(path for path in SHIPPED if path.stem == "demo_gold"))
    questions = task.load_questions()
    assert len({question.domain for question in questions}) == 5
    assert len(task.limited(2).load_questions()) == 10


def write(folder: Path, name: str, ids: str, domain: str = "") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, "question": f"what is {i}?", "answers": ["x"], "domain": domain} for i in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_globs_are_relative_to_the_task_and_the_folder_names_the_domain(tmp_path: Path) -> None:
    write(tmp_path, "rivers/dev.jsonl", "ab")
    write(tmp_path, "coins/dev.jsonl", "cd", domain="money")
    task = parse_task({"name": "t", "questions": ["*/dev.jsonl"]}, tmp_path, "task")
    assert {q.id: q.domain for q in task.load_questions()} == {"a": "rivers", "b": "rivers", "c": "money", "d": "money"}


def test_a_variable_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "rivers/dev.jsonl", "a")
    task = parse_task({"name": "t", "questions": ["${RAGMOE_DATA}/rivers/dev.jsonl"]}, Path("/elsewhere"), "task")
    monkeypatch.delenv("RAGMOE_DATA", raising=False)
    with pytest.raises(ConfigError, match="needs the environment variable RAGMOE_DATA, which is not set") as caught:
        task.load_questions()
    assert "--data" in str(caught.value.hint)
    monkeypatch.setenv("RAGMOE_DATA", str(tmp_path))
    assert len(task.load_questions()) == 1


def test_a_limit_takes_the_same_questions_whatever_their_order() -> None:
    questions = [Question(id=f"q{i}", question="x", domain="ab"[i % 2]) for i in range(40)]
    few, more = subset(questions, 3), subset(questions, 8)
    assert [q.domain for q in few].count("a") == 3
    assert {q.id for q in few} < {q.id for q in more}
    assert {q.id for q in subset(questions[::-1], 3)} == {q.id for q in few}
    assert few == [q for q in questions if q in few]
    assert Task(name="t", questions=["x"], limit_per_domain=2).limited(5).limit_per_domain == 2


@pytest.mark.parametrize("limit", [5, 10, 20, 50])
def test_a_limit_keeps_the_share_of_each_kind(limit: int) -> None:
    kinds = [("span", ("x",))] * 7 + [("yesno", ("yes",)), ("span", ()), ("span", ())]
    questions = [
        Question(id=f"{domain}{i}", question="x", domain=domain, answer_type=kind, answers=answers)
        for domain, n in (("big", 200), ("small", 100))
        for i in range(n)
        for kind, answers in [kinds[i % 10]]
    ]
    chosen = subset(questions, limit)
    for domain in ("big", "small"):
        own = [q for q in chosen if q.domain == domain]
        assert len(own) == limit
        assert sum(not q.answers for q in own) == pytest.approx(0.2 * limit, abs=1)
        assert sum(q.answer_type == "yesno" for q in own) == pytest.approx(0.1 * limit, abs=1)
    assert {q.id for q in chosen} < {q.id for q in subset(questions, limit + 7)}


def test_the_raw_question_is_asked_where_the_task_says_so() -> None:
    question = Question(id="1", question="Policy of x.com: what is kept?", question_raw="what is kept?")
    assert Task(name="t", questions=["x"]).asked(question) == question.question
    raw = Task(name="t", questions=["x"], question_field="question_raw", setting="open")
    assert (raw.asked(question), raw.setting_name) == ("what is kept?", "open_raw")


def test_a_bare_null_is_a_perturbation(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("name: t\nquestions: [x]\nperturbations: [null, shuffled]\n")
    assert load_task(path).perturbations == ["null", "shuffled"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: t\nquestions: [x]\nquestion: y", "question: Extra inputs are not permitted"),
        ("name: t\nquestions: [x]\n_folder: y", "_folder: Extra inputs are not permitted"),
        ("name: t", "questions: Field required"),
        (
            "name: t\nquestions: [x]\nsetting: closed",
            "setting: Input should be 'gold', 'open' or 'rejection' .got 'closed'",
        ),
        ("name: ../t\nquestions: [x]", "name: String should match"),
        ("name: t\nquestions: [x]\nindex: a\ncorpus: [b]", "got both index and corpus"),
        (
            "name: t\nquestions: [x]\nsetting: rejection\nperturbations: [null]",
            "perturbations of the setting rejection",
        ),
        ("- name", "expected a mapping of settings, got list"),
        ("name: [", "is not valid YAML"),
    ],
)
def test_a_wrong_task_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_task(path)


def test_missing_files_are_named(tmp_path: Path, make_task: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the task .*none\.yaml"):
        load_task(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"no question file matches 'dev\.jsonl'"):
        parse_task({"name": "t", "questions": ["dev.jsonl"]}, tmp_path, "task").load_questions()


def test_the_same_id_in_two_files_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "one.jsonl", "a")
    write(tmp_path, "two.jsonl", "a")
    with pytest.raises(DataError, match=r"'a' occurs in .*one\.jsonl and in .*two\.jsonl"):
        parse_task({"name": "t", "questions": ["*.jsonl"]}, tmp_path, "task").load_questions()
