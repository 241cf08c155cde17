"""The report of an experiment: made of what is finished, without running anything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ragmoe import ConfigError, DataError, RagmoeError
from ragmoe.evaluation import plots
from ragmoe.evaluation.experiment import load_experiment
from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.experiment_report import Outcome, report_experiment
from ragmoe.evaluation.experiment_run import run_experiment
from ragmoe.evaluation.experiment_tables import added_table
from ragmoe.evaluation.result import Result
from ragmoe.evaluation.results import Results
from ragmoe.evaluation.tables import Table

PICTURES = {"macro_f1.png", "differences.png", "load.png", "neighbours.png", "loss.png"}


def table_of(outcome: Outcome, title: str) -> Table:
    return next(table for table in outcome.tables if table.title == title)


@pytest.fixture
def no_running(trained: list[str], index: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called when everything ran that should: from then on nothing may be opened, trained, loaded or searched."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a report runs nothing")

    def forbid() -> None:
        for name in ("training.train", "models.load", "training.build.build_model", "index.Index.open"):
            monkeypatch.setattr(f"ragmoe.{name}", fail)
        monkeypatch.setattr("ragmoe.evaluation.experiment_run.evaluate", fail)

    return forbid


def test_a_report_has_the_result_of_the_run_and_draws_it(
    write: Any, make_task: Any, no_running: Any, tmp_path: Path
) -> None:
    experiment = load_experiment(write())
    make_task(perturbations=["null", "shuffled", "wrong_domain"])
    ran = run_experiment(experiment, out=tmp_path / "out")
    no_running()
    outcome = report_experiment(experiment, out=tmp_path / "out")
    assert outcome.result == ran.result == Result.read(tmp_path / "results" / "small.json")
    assert [table.title for table in outcome.tables] == [table.title for table in ran.tables]
    places = [tmp_path / "out" / "result.md", tmp_path / "results" / "small.md"]
    for place in places:
        text = place.read_text()
        links = re.findall(r"!\[[^]]+\]\(<([^>]+)>\)", text)
        assert {Path(link).name for link in links} == PICTURES
        assert all((place.parent / link).is_file() and not Path(link).is_absolute() for link in links)
        # Beside every table and picture stands what makes it.
        parts = text.split("\n### ")[1:]
        assert len(parts) == len(outcome.tables) + len(PICTURES)
        assert all("\nMade by `ragmoe eval " in part for part in parts)
    assert {path.name for path in (tmp_path / "results" / "small").iterdir()} == PICTURES


def test_pictures_go_where_they_are_asked(write: Any, trained: list[str], tmp_path: Path) -> None:
    run_experiment(load_experiment(write()), out=tmp_path / "out")
    outcome = report_experiment(load_experiment(write()), out=tmp_path / "out", plots=tmp_path / "drawn")
    # Without perturbations there is nothing to say of other neighbours.
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == PICTURES - {"neighbours.png"}
    assert "(<../drawn/macro_f1.png>)" in (tmp_path / "results" / "small.md").read_text()
    assert tmp_path / "drawn" / "loss.png" in outcome.written


def test_how_far_each_arm_is(write: Any, trained: list[str], tmp_path: Path) -> None:
    experiment = load_experiment(write(untrained=True))

    def stop(line: str) -> None:
        if line == "retrieval, seed 1: evaluating small":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, out=tmp_path / "out", say=stop)
    outcome = report_experiment(experiment, out=tmp_path / "out")
    assert outcome.missing == ["retrieval seed 1"]
    assert list(outcome.result.arms) == ["untrained", "dense"]
    assert outcome.result.comparisons == []
    assert not (tmp_path / "results").exists()
    rows = table_of(outcome, "How far each arm is").rows
    assert rows == [
        ["untrained", "F1 0.0", "F1 0.0"],
        ["dense", "F1 75.0", "F1 75.0"],
        ["retrieval", "F1 75.0", "trained, 0 of 1 tasks"],
    ]
    assert "- not run yet: retrieval seed 1\n" in (tmp_path / "out" / "result.md").read_text()
    # Training itself, torn in the middle of a line, and what has not begun.
    seed = tmp_path / "out" / "retrieval" / "seed-1"
    (seed / "bundle" / "model.safetensors.index.json").unlink()
    (seed / "bundle" / "history.jsonl").write_text('{"step": 4, "answer_loss": 1.0}\n{"step": 5, "ans')
    assert (
        table_of(report_experiment(experiment, out=tmp_path / "out"), "How far each arm is").rows[2][2] == "step 4 of 9"
    )
    (seed / "bundle" / "history.jsonl").unlink()
    assert table_of(report_experiment(experiment, out=tmp_path / "out"), "How far each arm is").rows[2][2] == "begun"
    (seed / "arm.json").unlink()
    assert (
        table_of(report_experiment(experiment, out=tmp_path / "out"), "How far each arm is").rows[2][2] == "not begun"
    )


def test_where_nothing_was_run(write: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="out holds nothing of the experiment small") as error:
        report_experiment(load_experiment(write()), out=tmp_path / "out")
    assert error.value.hint is not None and error.value.hint.startswith("ragmoe eval experiment ")
    assert error.value.hint.endswith(f"--out {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RagmoeError, match="drawn by matplotlib, which is not installed") as error:
        report_experiment(load_experiment(write()), out=tmp_path / "out")
    assert error.value.hint == "pip install 'ragmoe[report]'"


def change_training(folder: Path, **changes: Any) -> None:
    path = folder / "bundle" / "training.yaml"
    content = yaml.safe_load(path.read_text())
    content["data"] |= changes
    path.write_text(yaml.safe_dump(content))


def test_a_folder_from_another_machine_is_reported(write: Any, trained: list[str], tmp_path: Path) -> None:
    experiment, dense = load_experiment(write()), tmp_path / "out" / "dense" / "seed-0"
    run_experiment(experiment, out=tmp_path / "out")
    change_training(dense, questions=[f"/elsewhere/{tmp_path.name}/train.jsonl"], index="/elsewhere/idx")
    assert report_experiment(experiment, out=tmp_path / "out").missing == []
    with pytest.raises(ConfigError, match=r"differs in data\.questions"):
        run_experiment(experiment, out=tmp_path / "out")
    change_training(dense, questions=[f"/elsewhere/{tmp_path.name}/dev.jsonl"])
    with pytest.raises(ConfigError, match=r"differs in data\.questions .*dev\.jsonl"):
        report_experiment(experiment, out=tmp_path / "out")


def change_note(folder: Path, **changes: Any) -> None:
    path = folder / "arm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_arms_over_several_indexes_are_not_mixed(write: Any, trained: list[str], tmp_path: Path) -> None:
    run_experiment(load_experiment(write()), out=tmp_path / "out")
    change_note(tmp_path / "out" / "dense" / "seed-1", index="another")
    with pytest.raises(ConfigError, match=r"several indexes: index-digest \(dense seed 0\), another \(dense seed 1\)"):
        report_experiment(load_experiment(write()), out=tmp_path / "out")


def test_machines_and_commits_are_those_of_the_training(write: Any, trained: list[str], tmp_path: Path) -> None:
    experiment = load_experiment(write())
    run_experiment(experiment, out=tmp_path / "out")
    here = {"cpu": "this", "cores": 2, "threads": 2, "gpu": None}
    for arm, where in (("dense", here), ("retrieval", {**here, "gpu": "that"})):
        for seed in (0, 1):
            change_note(tmp_path / "out" / arm / f"seed-{seed}", machine=where, commit=f"commit of {arm}")
    outcome = report_experiment(experiment, out=tmp_path / "out")
    assert outcome.result.machine == {**here, "gpu": [None, "that"]}
    assert "- trained at commit: commit of dense (dense); commit of retrieval (retrieval)" in outcome.lines


def test_figures_are_of_the_commits_that_they_were_measured_at(
    write: Any, trained: list[str], make_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe.evaluation import experiment_folder

    def run_at(name: str) -> list[str]:
        monkeypatch.setattr(experiment_folder, "commit_of_run", lambda folder: name)
        return run_experiment(load_experiment(write()), out=tmp_path / "out").lines

    assert "- evaluated at commit: first" in run_at("first")
    # What is taken over was measured before, what is scored anew is of both.
    assert "- evaluated at commit: first" in run_at("second")
    for stale in (tmp_path / "out" / "dense").rglob("results.json"):
        stale.unlink()
    assert "- evaluated at commit: first (dense, retrieval); third (dense)" in run_at("third")
    # Whatever has made another figure of it: here an answer.
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    make_task([{**row, "answers": ["Barges"]} if row["id"] == "q2" else row for row in rows])
    later = "- evaluated at commit: first (dense, retrieval); third (dense); fourth (dense, retrieval)"
    assert later in run_at("fourth")


@pytest.mark.parametrize(
    ("material", "reference", "otherwise"),
    [
        ({"dense": "x", "retrieval": "x"}, "dense", []),
        ({"dense": "x", "retrieval": "y"}, "dense", ["retrieval"]),
        ({"dense": "x", "retrieval": "y"}, "retrieval", ["dense"]),
        # Against a model before training the first arm stands for all; what is not known says nothing.
        ({"dense": "x", "retrieval": "y"}, "before", ["retrieval"]),
        ({"retrieval": "y"}, "dense", []),
        ({}, "dense", []),
    ],
)
def test_losses_of_other_material_are_known(
    write: Any, tmp_path: Path, material: dict[str, str], reference: str, otherwise: list[str]
) -> None:
    folder = ExperimentFolder(load_experiment(write()), tmp_path / "out")
    for arm, digest in material.items():
        folder.bundle(arm, 0).mkdir(parents=True)
        (folder.bundle(arm, 0) / "started.json").write_text(json.dumps({"questions": digest}))
    assert folder.learning_otherwise(reference) == otherwise


def test_goals_are_met_or_not(write: Any, make_task: Any, trained: list[str], tmp_path: Path) -> None:
    goals = [
        {"a": "dense", "b": "retrieval", "at_least": 30.0},
        {"a": "dense", "b": "retrieval", "at_least": 40.0},
        {"a": "retrieval", "b": "dense", "at_least": -40.0, "neighbours": None},
        {"a": "dense", "b": "untrained", "metric": "macro_em", "at_least": 0.0},
    ]
    experiment = load_experiment(write(goals=goals, untrained=True))
    make_task(perturbations=["null"])
    run_experiment(experiment, out=tmp_path / "out", only=["dense", "retrieval"])
    outcome = report_experiment(experiment, out=tmp_path / "out")
    rows = table_of(outcome, "Goals").rows
    assert [(row[0], row[3], row[4], row[6]) for row in rows] == [
        ("dense − retrieval", "≥ +30", "+37.50", "met"),
        ("dense − retrieval", "≥ +40", "+37.50", "not met"),
        ("retrieval with null neighbours − dense", "≥ -40", "-37.50", "not shown"),
        ("dense − untrained", "≥ +0", "–", "not finished"),
    ]
    # What the goals compare beyond the experiment's own comparisons is in the result too, and under its own name.
    assert [(c.a, c.b, c.setting) for c in outcome.result.comparisons] == [
        ("retrieval", "dense", "gold"),
        ("dense", "retrieval", "gold"),
        ("retrieval", "dense", "gold+null"),
    ]


def test_where_a_domain_failed_nothing_is_compared_nor_kept(write: Any, trained: list[str], tmp_path: Path) -> None:
    goals = [{"a": "dense", "b": "retrieval", "at_least": -100.0}]
    experiment = load_experiment(write(goals=goals, result="kept.json"))
    run_experiment(experiment, out=tmp_path / "out")
    assert (tmp_path / "kept.json").is_file()
    (tmp_path / "kept.json").unlink()
    for seed in (0, 1):
        place = tmp_path / "out" / "dense" / f"seed-{seed}" / "small" / "samples.jsonl"
        rows = [json.loads(line) for line in place.read_text().splitlines()]
        lost = [{**row, "status": "error", "error": "lost"} if row["domain"] == "coins" else row for row in rows]
        place.write_text("".join(json.dumps(row) + "\n" for row in lost))
    outcome = report_experiment(experiment, out=tmp_path / "out")
    assert not outcome.result.comparisons and table_of(outcome, "Goals").rows[0][-1] == "not finished"
    assert not (tmp_path / "kept.json").exists()


@pytest.mark.parametrize(
    ("low", "at_least", "said"),
    [
        (0.1, 1.0, "met"),
        (-0.1, 1.0, "not shown"),
        (-0.1, -0.5, "met"),
        (-0.6, -0.5, "not shown"),
        (0.0, 0.0, "met"),
        (1.0, 1.6, "not met"),
    ],
)
def test_a_goal_is_met_where_its_interval_says_so(low: float, at_least: float, said: str) -> None:
    from ragmoe.evaluation.experiment import Goal
    from ragmoe.evaluation.goals import verdict
    from ragmoe.evaluation.statistics import Comparison

    found = Comparison("f1", "gold", 1.5, low, 3.0, {}, 1, 1, {})
    goal = Goal(a="a", b="b", at_least=at_least)
    assert verdict(goal, found) == said


def test_sizes_are_told_against_the_dense_arm(
    write: Any, trained: list[str], make_reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = type(make_reader())
    sizes = {True: 1_545_000, False: 1_500_000}
    monkeypatch.setattr(
        reader, "parameter_counts", lambda self: {"active": sizes[self.gate_sees_neighbours], "total": 4_000_000}
    )
    notes = {"dense": "One LoRA expert of twice the rank."}
    outcome = run_experiment(load_experiment(write(notes=notes)), out=tmp_path / "out")
    table = table_of(outcome, "Parameters")
    assert [list(row) for row in table.rows] == [
        ["dense", "1,500,000", "4,000,000", "+0.00 %"],
        ["retrieval", "1,545,000", "4,000,000", "+3.00 %"],
    ]
    assert "differ from the dense arm's by more than 2 %: retrieval (+3.0 %)." in table.note
    assert table.note.endswith("\n- dense: One LoRA expert of twice the rank.")
    sizes[True] = 1_529_000
    for place in (tmp_path / "out").glob("*/*/small/results.json"):
        place.unlink()
    table = table_of(run_experiment(load_experiment(write()), out=tmp_path / "out"), "Parameters")
    assert table.note.endswith("The active parameters of all arms are within 2 % of the dense arm's.")


def routed(task: str, setting: str, experts: list[str], load_per_domain: dict[str, Any]) -> Results:
    conditions = {"real": {"routing": {"experts": experts, "load_per_domain": load_per_domain}}}
    return Results({"name": task}, setting, "m", "d", "i", {"active": 1, "total": 1}, conditions, None)


def test_who_calls_an_expert_that_was_added() -> None:
    before = {"t_old": [routed("t_old", "old", ["a", "b"], {"x": [[0.5, 0.5]]})], "t_new": []}
    before["t_new"] = [routed("t_new", "new", ["a", "b"], {"y": [[1.0, 0.0]]})]
    grown = ["a", "b", "c"]
    added = {
        # Two domains and two layers of one seed, and of the other.
        "t_old": [
            routed("t_old", "old", grown, {"x": [[0.5, 0.4, 0.1], [0.5, 0.5, 0.0]], "z": [[0.5, 0.5, 0.0]] * 2}),
            routed("t_old", "old", grown, {"x": [[0.5, 0.2, 0.3]] * 2, "z": [[0.5, 0.4, 0.1]] * 2}),
        ],
        "t_new": [routed("t_new", "new", grown, {"y": [[0.5, 0.0, 0.5], [0.3, 0.3, 0.4]]})] * 2,
    }
    table = added_table({"before": before, "added": added, "full": before}, ["before"])
    assert table is not None
    assert table.columns == ["arm", "expert", "t_old (old)", "t_new (new)"]
    assert table.rows == [["added", "c", "11.2 %", "45.0 %"]]
    assert added_table({"before": before, "full": before}, ["before"]) is None
    assert added_table({"added": added}, []) is None
    # What any of the starts has is not new.
    assert added_table({"before": before, "other": added, "added": added}, ["before", "other"]) is None
