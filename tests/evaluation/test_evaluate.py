from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ragmoe import ConfigError, DataError, ModelError
from ragmoe.corpus.types import Question
from ragmoe.evaluation import Results, evaluate
from ragmoe.evaluation import run as run_module
from ragmoe.evaluation.perturbation import partners
from ragmoe.evaluation.report import quality
from ragmoe.evaluation.samples import read_samples

DOMAINS = ["rivers", "rivers", "rivers", "coins", "coins"]
MakeReader, MakeTask = Callable[..., Any], Callable[..., Path]


def by_id(results: Results, condition: str = "real") -> dict[str, Any]:
    return {sample.id: sample for sample in results.samples[condition]}


def test_gold_reads_the_gold_passage_and_the_context_of_the_unanswerable(
    make_reader: MakeReader, make_task: MakeTask, index: Any
) -> None:
    reader = make_reader()
    results = evaluate(reader, make_task(), index)
    _, read, shown = reader.calls[0]
    assert read == [["r1"], ["r2"], ["r3"], ["c1"], ["c2"]]
    assert shown == [ids[:2] for ids in index.neighbours(reader.calls[0][0], 5).passage_ids]
    # rivers: 1, 1/2 (coal in gravel and coal), 1; coins: 2/3 (in Millrace).
    assert results.real["per_domain"]["rivers"]["f1"] == pytest.approx(100 * 2.5 / 3)
    assert results.macro_f1 == pytest.approx(100 * (2.5 / 3 + 2 / 3) / 2)
    assert results.real["no_answer"]["auroc"] == 1.0
    assert results.real["yesno"]["accuracy"] == 100.0
    assert by_id(results)["q2"].doc_id == "doc-r2"
    assert results.parameters == {"active": 1_500_000, "total": 4_000_000}


def test_open_reads_what_is_retrieved(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    reader = make_reader()
    results = evaluate(reader, make_task(setting="open", passages=2, neighbours=1), index)
    questions, read, shown = reader.calls[0]
    found = index.neighbours(questions, 2).passage_ids
    assert (read, shown) == (found, [ids[:1] for ids in found])
    assert by_id(results)["q1"].gold_rank == 1
    assert results.retrieval is not None
    assert results.retrieval["n"] == 4


def test_perturbed_neighbours_change_the_routing_and_not_what_is_read(
    make_reader: MakeReader, make_task: MakeTask, index: Any
) -> None:
    reader = make_reader()
    task = make_task(setting="open", passages=2, perturbations=["null", "shuffled", "wrong_domain"])
    results = evaluate(reader, task, index)
    real, null, shuffled, wrong = reader.calls
    assert real[1] == null[1] == shuffled[1] == wrong[1]
    assert null[2] == [[]] * 5
    items = [Question(id=f"q{i}", question=asked, domain=DOMAINS[i - 1]) for i, asked in enumerate(real[0], start=1)]
    for perturbation, call in (("shuffled", shuffled), ("wrong_domain", wrong)):
        others = partners(items, real[0], perturbation)
        assert others is not None
        assert call[2] == [real[2][other] for other in others]
    figures = results.conditions["null"]
    assert figures is not None
    assert figures["change"]["f1"]["difference"] == 0.0
    # Without neighbours the reader sends everything to expert 0, as it does for passage r1 and c2 (row 4 of 4 experts).
    assert figures["routing"]["max_load"] == 1.0
    firsts = [ids[0] for ids in real[2]]
    moved = [index.passage_ids.index(name) % 4 != 0 for name in firsts]
    assert figures["change"]["routing_shift"] == pytest.approx(sum(moved) / 5)


def test_a_gate_that_sees_no_neighbours_is_shown_none_and_not_perturbed(
    make_reader: MakeReader, make_task: MakeTask, index: Any
) -> None:
    reader = make_reader(gate_sees_neighbours=False)
    results = evaluate(reader, make_task(perturbations=["null", "shuffled"]), index)
    assert [call[2] for call in reader.calls] == [None]
    assert (results.conditions["null"], results.conditions["shuffled"]) == (None, None)


def test_a_dense_model_has_no_routing(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    results = evaluate(make_reader(gate_sees_neighbours=False, sparse_layers=()), make_task(), index)
    assert results.real["routing"] is None


def test_a_second_run_reads_nothing_and_finds_the_same(
    make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path
) -> None:
    task = make_task(perturbations=["null"])
    before = evaluate(make_reader(), task, index, out=tmp_path / "out")
    reader = make_reader()
    after = evaluate(reader, task, index, out=tmp_path / "out")
    assert reader.calls == []
    assert after.to_json() == before.to_json()
    assert Results.load(tmp_path / "out").to_json() == before.to_json()


def test_killed_and_taken_up_again_it_finds_the_same(
    make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "CHUNK", 2)
    task = make_task(perturbations=["null"])
    whole = evaluate(make_reader(), task, index, out=tmp_path / "whole")

    def killed(done: int, total: int, condition: str) -> None:
        if (done, condition) == (4, "real"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(make_reader(), task, index, out=tmp_path / "killed", progress=killed)
    with (tmp_path / "killed" / "samples.jsonl").open("a") as file:
        file.write('{"id": "q5", "dig')
    reader = make_reader()
    resumed = evaluate(reader, task, index, out=tmp_path / "killed")
    assert sum(len(call[0]) for call in reader.calls) == 1 + 5
    assert resumed.to_json() == whole.to_json()


@pytest.mark.parametrize("change", ["weights", "setting", "neighbours", "question", "no resume"])
def test_what_has_changed_is_read_again(
    make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path, change: str
) -> None:
    questions = [{"id": "q1", "question": "When did the long bridge open?", "answers": ["1911"], "gold_ids": ["r1"]}]
    evaluate(make_reader(), make_task(questions), index, out=tmp_path / "out")
    reader = make_reader(weight=2.0) if change == "weights" else make_reader()
    if change == "question":
        questions[0]["answers"] = ["1912"]
    settings = {"setting": {"setting": "open"}, "neighbours": {"neighbours": 1}}.get(change, {})
    evaluate(reader, make_task(questions, **settings), index, out=tmp_path / "out", resume=change != "no resume")
    assert len(reader.calls) == 1


def test_what_is_taken_over_is_scored_as_of_now(
    make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path
) -> None:
    """Other gold passages, and another way to score, make nothing to read anew and leave nothing old."""
    questions = [{"id": "q1", "question": "When did the long bridge open?", "answers": ["1911"], "gold_ids": ["c2"]}]
    task = {"setting": "open", "passages": 2}
    evaluate(make_reader(), make_task(questions, **task), index, out=tmp_path / "out")
    file = tmp_path / "out" / "samples.jsonl"
    rows = [{**json.loads(line), "f1": 0.25, "doc_id": "old"} for line in file.read_text().splitlines()]
    assert rows[0]["gold_rank"] is None or rows[0]["gold_rank"] > 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = make_reader()
    mended = make_task([{**questions[0], "gold_ids": ["r1"]}], **task)
    sample = by_id(evaluate(reader, mended, index, out=tmp_path / "out"))["q1"]
    assert not reader.calls
    assert (sample.f1, sample.gold_rank, sample.gold_read, sample.doc_id) == (1.0, 1, ("r1",), "doc-r1")
    assert sample.routing and sample == read_samples(file)[0]


def test_an_oracle_is_shown_no_other_neighbours(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    """What it is told is the domain; with a summary of the neighbours it sees these too."""
    for summary, shown in ((False, None), (True, dict)):
        reader = make_reader()
        reader.config.gate, reader.config.neighbour_summary = "oracle", summary
        found = evaluate(reader, make_task(perturbations=["null"]), index).conditions["null"]
        assert found is None if shown is None else isinstance(found, shown)


def test_one_bad_question_is_an_error_and_the_others_are_read(
    make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path
) -> None:
    reader = make_reader(fails_on=lambda question: "barges" in question)
    results = evaluate(reader, make_task(), index, out=tmp_path / "out")
    assert [s.id for s in results.errors] == ["q2"]
    assert by_id(results)["q2"].error == "RuntimeError: cannot read What do barges carry?"
    assert by_id(results)["q2"].f1 is None
    assert results.real["per_domain"]["rivers"]["coverage"] == pytest.approx(2 / 3)
    assert results.real["per_domain"]["rivers"]["f1"] == 100.0
    mended = make_reader()
    assert evaluate(mended, make_task(), index, out=tmp_path / "out").errors == []
    assert [call[0] for call in mended.calls] == [["What do barges carry?"]]


def test_it_stops_where_everything_fails(
    make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="all of the first 5 questions failed; q1: RuntimeError: cannot read"):
        evaluate(make_reader(fails_on=lambda question: True), make_task(), index, out=tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_error_of_ours_is_not_recorded_but_raised(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    def refuses(question: str) -> bool:
        raise ModelError("does not fit")

    with pytest.raises(ModelError, match="does not fit"):
        evaluate(make_reader(fails_on=refuses), make_task(), index)


def test_questions_that_cannot_be_scored(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    questions = [
        {"id": "q1", "question": "When did the long bridge open?", "answers": ["1911"], "gold_ids": ["r1"]},
        {"id": "x1", "question": "no gold?", "answers": ["1911"], "domain": "rivers"},
        {"id": "x2", "question": "gold elsewhere?", "answers": ["1911"], "gold_ids": ["r9"], "domain": "rivers"},
        {"id": "x3", "question": "no context?", "answers": [], "domain": "rivers"},
    ]
    results = evaluate(make_reader(), make_task(questions), index)
    assert {i: s.status for i, s in by_id(results).items()} == {
        "q1": "ok",
        "x1": "unscored",
        "x2": "error",
        "x3": "unscored",
    }
    assert by_id(results)["x2"].error == "not in the index: r9"
    assert (results.macro_f1, results.real["macro"]["coverage"]) == (100.0, pytest.approx(1 / 3))


def test_an_index_of_another_corpus_is_refused(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    questions = [{"id": "x", "question": "q?", "answers": ["a"], "gold_ids": ["elsewhere"]}]
    with pytest.raises(DataError, match=r"none of the 1 passages .* \(such as elsewhere\) is among the 5 of the index"):
        evaluate(make_reader(), make_task(questions, setting="open"), index)


def test_a_question_for_which_nothing_is_found_has_no_answer_and_counts(
    make_reader: MakeReader, make_task: MakeTask, index: Any
) -> None:
    found = index.neighbours

    def blind(questions: list[str], n: int, *, retriever: str | None = None) -> Any:
        neighbours = found(questions, n)
        return neighbours.without(
            [ids if "ferry" in q else [] for q, ids in zip(questions, neighbours.passage_ids, strict=True)]
        )

    index.neighbours = blind
    results = evaluate(make_reader(), make_task(setting="open"), index)
    silent = by_id(results)["q3"]
    assert (silent.status, silent.prediction, silent.answered, silent.f1) == ("ok", "", False, 0.0)
    assert silent.read == silent.routing == () and results.real["macro"]["coverage"] == 1.0


def test_what_is_wrong_with_one_question_leaves_the_others(
    make_reader: MakeReader, make_task: MakeTask, index: Any
) -> None:
    reader = make_reader()
    read = reader.read

    def picky(questions: list[str], *args: Any, **named: Any) -> Any:
        if any("ferry" in question for question in questions):
            raise DataError("a question of 300 tokens does not fit into 192")
        return read(questions, *args, **named)

    reader.read = picky
    results = evaluate(reader, make_task(), index)
    assert by_id(results)["q3"].error == "a question of 300 tokens does not fit into 192"
    assert {sample.status for sample in results.samples["real"] if sample.id != "q3"} == {"ok"}


def test_the_limit_is_by_domain(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    results = evaluate(make_reader(), make_task(), index, limit=1)
    assert [s.domain for s in results.samples["real"]] == ["rivers", "coins"]


def test_infinite_scores_stay_out_of_the_files(
    make_reader: MakeReader, make_answer: Any, make_task: MakeTask, index: Any, tmp_path: Path
) -> None:
    answers = {"Who engraved the crown?": make_answer("", no_answer_score=float("inf"), answered=False)}
    results = evaluate(make_reader(answers=answers), make_task(), index, out=tmp_path)
    assert "Infinity" not in (tmp_path / "samples.jsonl").read_text()
    assert results.real["no_answer"]["auroc"] == 1.0


@pytest.mark.parametrize("setting", ["gold", "open", "rejection"])
def test_a_question_that_nothing_could_answer_is_not_scored_zero(
    make_reader: MakeReader, make_task: MakeTask, index: Any, setting: str
) -> None:
    asked = {"question": "Is the ferry late?", "answer_type": "yesno", "gold_ids": ["r3"]}
    questions = [{**asked, "id": "a", "answers": ["true"]}, {**asked, "id": "b", "answers": ["No.", "false"]}]
    results = evaluate(make_reader(), make_task(questions, setting=setting), index)
    found = by_id(results)
    assert found["a"].status == "unscored" and found["a"].error == (
        "answers ['true'] to a yesno question; expected yes, no or maybe"
    )
    assert found["b"].status == "ok" and "a#rejection" not in found
    assert results.real["macro"]["coverage"] == 0.5


def test_questions_whose_document_nobody_knows_are_no_documents(
    make_reader: MakeReader, make_task: MakeTask, index: Any
) -> None:
    known = {"id": "q1", "question": "When did the long bridge open?", "answers": ["in 1911"], "gold_ids": ["r1"]}
    asked = [known, *({"id": f"x{at}", "question": f"What is {at}?", "answers": ["a"]} for at in range(3))]
    note = quality({"m": [evaluate(make_reader(), make_task(asked, setting="open"), index)]}).note
    assert "resamples 4 documents within domains, 3 of them single questions whose document is not known." in note
    note = quality({"m": [evaluate(make_reader(), make_task(asked[:1], setting="open"), index)]}).note
    assert "resamples 1 documents within domains." in note


def test_two_evaluations_do_not_write_to_one_folder(
    make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path
) -> None:
    task, out = make_task(), tmp_path / "out"
    tried: list[str] = []

    def meanwhile(question: str) -> bool:
        if not tried:
            tried.append(question)
            with pytest.raises(ConfigError, match=r"another evaluation is writing to .*out\nwait for it to end"):
                evaluate(make_reader(weight=2.0), task, index, out=out)
        return False

    evaluate(make_reader(fails_on=meanwhile), task, index, out=out)
    assert tried and evaluate(make_reader(weight=2.0), task, index, out=out).macro_f1 is not None


def test_the_files_and_their_shape(make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path) -> None:
    evaluate(make_reader(), make_task(perturbations=["null"]), index, out=tmp_path / "out", name="mine")
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert names == {"results.json", "samples.jsonl", "samples.null.jsonl", "run.trec", "qrels.trec"}
    shape = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {
        "results",
        "group_subtasks",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
    } < set(shape)
    assert shape["group_subtasks"] == {"small": ["small_rivers", "small_coins"]}
    assert shape["results"]["small_rivers"]["f1,none"] == pytest.approx(100 * 2.5 / 3)
    assert shape["n-samples"]["small_coins"] == {"original": 2, "effective": 1}
    assert shape["config"]["model_args"] == "mine"
    assert len(read_samples(tmp_path / "out" / "samples.jsonl")) == 5


def test_a_folder_without_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(DataError, match=r"not a finished evaluation: it lacks results.json; it holds samples.jsonl"):
        Results.load(tmp_path)
    (tmp_path / "results.json").write_text('{"ragmoe": {}}')
    with pytest.raises(DataError, match=r"results.json is damaged"):
        Results.load(tmp_path)
