from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ragmoe import ConfigError, DataError, UsageError
from ragmoe.bundle import roll_back, write_bundle
from ragmoe.evaluation.experiment import load_experiment, merge, nest
from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.experiment_report import command_of, report_experiment
from ragmoe.evaluation.experiment_run import run_experiment
from ragmoe.evaluation.result import Result


def test_arms_are_trained_evaluated_and_compared(write: Any, trained: list[str], tmp_path: Path) -> None:
    outcome = run_experiment(load_experiment(write(untrained=True)), out=tmp_path / "out")
    assert trained == ["dense/0", "retrieval/0", "dense/1", "retrieval/1"]
    assert outcome.missing == []
    result = Result.read(tmp_path / "results" / "small.json")
    assert list(result.arms) == ["untrained", "dense", "retrieval"]
    assert (result.seeds, result.arms["dense"].seconds, result.arms["untrained"].seconds) == ([0, 1], 12.0, None)
    assert result.arms["dense"].macro_f1 == pytest.approx(75.0)
    # Seed 1 of the retrieval arm answers nothing rightly: the mean over seeds is half, and so is the difference.
    assert result.arms["retrieval"].macro_f1 == pytest.approx(37.5)
    assert result.arms["dense"].normalised_mi is None
    assert result.arms["retrieval"].max_load is not None
    compared = result.comparisons[0]
    assert (compared.a, compared.b, compared.metric, compared.setting) == ("retrieval", "dense", "macro_f1", "gold")
    assert compared.difference == pytest.approx(-37.5)
    text = (tmp_path / "results" / "small.md").read_text()
    assert "retrieval − dense" in text
    assert "seeds: 0, 1" in text


def test_what_is_finished_is_not_done_again(write: Any, trained: list[str], tmp_path: Path, index: Any) -> None:
    path = write()
    before = run_experiment(load_experiment(path), out=tmp_path / "out").result
    trained.clear()
    index.searched.clear()
    again = run_experiment(load_experiment(path), out=tmp_path / "out").result
    assert (trained, index.searched) == ([], [])
    assert again == before


def test_stopped_in_the_middle_it_goes_on(write: Any, trained: list[str], tmp_path: Path) -> None:
    path = write()

    def stop(line: str) -> None:
        if line.startswith("retrieval, seed 0: evaluating"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(load_experiment(path), out=tmp_path / "out", say=stop)
    assert trained == ["dense/0", "retrieval/0"]
    run_experiment(load_experiment(path), out=tmp_path / "out")
    assert trained == ["dense/0", "retrieval/0", "dense/1", "retrieval/1"]


def test_a_part_of_it_is_no_result_worth_keeping(write: Any, trained: list[str], tmp_path: Path) -> None:
    outcome = run_experiment(load_experiment(write(), seeds=[1]), out=tmp_path / "out", only=["dense"])
    assert trained == ["dense/1"]
    assert outcome.missing == ["retrieval seed 1"]
    assert list(outcome.result.arms) == ["dense"]
    # What is printed beside these figures makes them again, and no more.
    assert outcome.result.command.endswith(" --only dense")
    assert not (tmp_path / "results").exists()
    assert json.loads((tmp_path / "out" / "result.json").read_text())["seeds"] == [1]
    full = run_experiment(load_experiment(write(), seeds=[1]), out=tmp_path / "out", only=["retrieval"])
    assert full.missing == [] and "--only" not in full.result.command and not (tmp_path / "results").exists()
    run_experiment(load_experiment(write()), out=tmp_path / "out")
    assert (tmp_path / "results" / "small.json").exists()


def test_with_overrides_the_committed_result_stays(write: Any, trained: list[str], tmp_path: Path) -> None:
    experiment = load_experiment(write(), overrides=["train.steps=2"])
    assert experiment.training("retrieval", 0, tmp_path).train.steps == 2
    run_experiment(experiment, out=tmp_path / "out")
    assert not (tmp_path / "results").exists()


def test_an_arm_trained_otherwise_is_refused_before_anything_runs(
    write: Any, trained: list[str], tmp_path: Path
) -> None:
    run_experiment(load_experiment(write(), seeds=[0]), out=tmp_path / "out", only=["retrieval"])
    trained.clear()
    other = load_experiment(write(), overrides=["train.steps=2"])
    with pytest.raises(ConfigError, match=r"retrieval/seed-0 was trained with another .* train\.steps \(9, now 2\)"):
        run_experiment(other, out=tmp_path / "out")
    assert trained == []


def test_an_arm_trained_over_another_index_is_refused(write: Any, trained: list[str], tmp_path: Path) -> None:
    run_experiment(load_experiment(write(), seeds=[0]), out=tmp_path / "out", only=["dense"])
    note = tmp_path / "out" / "dense" / "seed-0" / "arm.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "index": "another"}))
    with pytest.raises(ConfigError, match="the index's content"):
        run_experiment(load_experiment(write()), out=tmp_path / "out")


def test_an_arm_of_a_base_that_was_trained_anew_is_refused(write: Any, trained: list[str], tmp_path: Path) -> None:
    def save(value: float) -> None:
        experts = {"up": torch.full((2, 3), value)}
        write_bundle(tmp_path / "base", experts, expert_tensors={"up"}, gate_tensors=set())

    save(1.0)
    train = {**yaml.safe_load(write().read_text())["train"], "base": str(tmp_path / "base")}
    run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out", only=["dense"])
    run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out", only=["retrieval"])
    assert trained == ["dense/0", "retrieval/0"]
    # Saved anew as it was, at another time and under another version's number, it is the same base.
    save(3.0)
    save(1.0)
    run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out")
    save(2.0)
    with pytest.raises(ConfigError, match=r"dense/seed-0 was .* the base's content \(.*base has changed since\)"):
        run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out")
    # An arm whose training never began begins from what is there now.
    shutil.rmtree(tmp_path / "out" / "dense" / "seed-0" / "bundle")
    with pytest.raises(ConfigError, match=r"retrieval/seed-0 was"):
        run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "retrieval")
    run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out")
    assert trained == ["dense/0", "retrieval/0", "dense/0", "retrieval/0"]
    # What is gone says nothing.
    shutil.rmtree(tmp_path / "base")
    run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out")
    assert trained == ["dense/0", "retrieval/0", "dense/0", "retrieval/0"]


def test_a_model_that_is_trained_anew_has_no_figures_yet(write: Any, trained: list[str], tmp_path: Path) -> None:
    """Also where it is stopped before it is evaluated."""
    run_experiment(load_experiment(write(), seeds=[0]), out=tmp_path / "out", only=["dense"])
    place = tmp_path / "out" / "dense" / "seed-0"
    assert (place / "small" / "results.json").is_file()
    shutil.rmtree(place / "bundle")
    experiment = load_experiment(write(), seeds=[0])
    folder = ExperimentFolder(experiment, tmp_path / "out", "digest")
    folder.begin("dense", 0, experiment.training("dense", 0, tmp_path))
    assert not (place / "small" / "results.json").exists()


def test_figures_of_an_untrained_arm_go_with_what_it_was_made_of(
    write: Any, trained: list[str], tmp_path: Path
) -> None:
    path = write(untrained=True)
    run_experiment(load_experiment(path, seeds=[0]), out=tmp_path / "out", only=["untrained"])
    figures = tmp_path / "out" / "untrained" / "seed-0" / "small" / "results.json"
    other = load_experiment(path, overrides=["model.experts=6"], seeds=[0])
    outcome = run_experiment(other, out=tmp_path / "out", only=["dense", "retrieval"])
    assert figures.is_file() and outcome.missing == ["untrained seed 0"]
    outcome = run_experiment(other, out=tmp_path / "out", only=["untrained"])
    assert not outcome.missing


def test_a_bundle_that_was_changed_in_place_is_not_that_arms(write: Any, trained: list[str], tmp_path: Path) -> None:
    """As ``ragmoe experts prune``, ``merge`` and ``rename`` change it, which leave its training.yaml alone."""
    path, out = write(), tmp_path / "out"
    run_experiment(load_experiment(path), out=out)
    bundle = out / "retrieval" / "seed-1" / "bundle"
    tensors, no = {"weight": torch.full((1,), 7.0)}, set[str]()
    write_bundle(bundle, tensors, expert_tensors=no, gate_tensors=no, message="prune")
    for again in (lambda: run_experiment(load_experiment(path), out=out), lambda: report(path, out)):
        with pytest.raises(ConfigError, match=r"retrieval/seed-1/bundle answers otherwise than it was trained to"):
            again()
    roll_back(bundle)
    run_experiment(load_experiment(path), out=out)


def report(path: Path, out: Path) -> None:
    report_experiment(load_experiment(path), out=out)


def test_arms_that_were_asked_different_questions_do_not_stand_in_one_table(
    write: Any, trained: list[str], make_task: Any, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", []
    path = write(comparisons=[], result="kept.json")
    run_experiment(load_experiment(path), out=out)
    before = (tmp_path / "kept.json").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    make_task(rows[:3])
    with pytest.raises(DataError, match=r"dense and retrieval were not asked the same on small: 2 questions differ"):
        run_experiment(load_experiment(path), out=out, only=["dense"])
    assert (tmp_path / "kept.json").read_bytes() == before
    assert not run_experiment(load_experiment(path), out=out, say=said.append).missing


def test_arms_that_learned_from_other_content_of_the_same_files_are_not_mixed(
    write: Any, trained: list[str], tmp_path: Path
) -> None:
    run_experiment(load_experiment(write(), seeds=[0]), out=tmp_path / "out")
    for arm, material in (("dense", "one"), ("retrieval", "other")):
        started = tmp_path / "out" / arm / "seed-0" / "bundle" / "started.json"
        started.write_text(json.dumps({"index": "index-digest", "questions": material, "bf16": False}))
    with pytest.raises(ConfigError, match=r"dense, seed 0 and retrieval, seed 0 in .* learned from others"):
        run_experiment(load_experiment(write(), seeds=[0]), out=tmp_path / "out")


def test_arms_of_one_base_that_changed_between_are_not_mixed(write: Any, trained: list[str], tmp_path: Path) -> None:
    run_experiment(load_experiment(write(), seeds=[0]), out=tmp_path / "out")
    for arm, base in (("dense", "one"), ("retrieval", "other")):
        note = tmp_path / "out" / arm / "seed-0" / "arm.json"
        note.write_text(json.dumps({**json.loads(note.read_text()), "base": base}))
        (tmp_path / "out" / arm / "seed-0" / "bundle" / "training.yaml").touch()
    folder = ExperimentFolder(load_experiment(write(), seeds=[0]), tmp_path / "out", "index-digest")
    with pytest.raises(ConfigError, match=r"dense, seed 0 and retrieval, seed 0 .* same base, and began from others"):
        folder.check_arms(tmp_path, moved=True)


def test_a_report_knows_arms_by_the_experiment_that_they_began_from(write: Any, tmp_path: Path) -> None:
    experiment = load_experiment(
        write(train={**yaml.safe_load(write().read_text())["train"], "base": "../runs/x/a/seed-0/bundle"}), seeds=[0]
    )
    folder = ExperimentFolder(experiment, tmp_path / "out", "index-digest")
    config = experiment.training("dense", 0, tmp_path)
    # Where it is not there either, a base is where the file says.
    assert Path(config.base).is_absolute() and config.base.endswith("/runs/x/a/seed-0/bundle")
    bundle = folder.bundle("dense", 0)
    bundle.mkdir(parents=True)

    def trained_from(base: str) -> None:
        content = {**config.model_dump(mode="json"), "base": base}
        (bundle / "training.yaml").write_text(yaml.safe_dump(content))

    trained_from("/elsewhere/runs/x/a/seed-0/bundle")
    folder.check("dense", 0, config, moved=True)
    trained_from("/elsewhere/runs/x/b/seed-0/bundle")
    with pytest.raises(
        ConfigError, match=r"differs in base \('x/b/seed-0/bundle', now 'x/a/seed-0/bundle'\)"
    ) as caught:
        folder.check("dense", 0, config, moved=True)
    assert caught.value.hint == "name the folder that this file was run in with --out"


def test_a_base_that_is_no_bundle_is_known_by_its_files(write: Any, trained: list[str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    train = {**yaml.safe_load(write().read_text())["train"], "base": str(base)}
    run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out")
    (base / "notes.txt").touch()
    run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out")
    (base / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match=r"dense/seed-0 was .* the base's content"):
        run_experiment(load_experiment(write(train=train), seeds=[0]), out=tmp_path / "out")


def test_a_training_that_was_stopped_keeps_where_it_began(
    write: Any, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe.evaluation import experiment_folder

    experiment = load_experiment(write(), seeds=[0])
    folder = experiment_folder.ExperimentFolder(experiment, tmp_path / "out", "index-digest")
    config = experiment.training("dense", 0, tmp_path)
    for name in ("first", "first", "second"):
        monkeypatch.setattr(experiment_folder, "commit_of_run", lambda folder, name=name: name)
        folder.begin("dense", 0, config)
        (folder.bundle("dense", 0)).mkdir(exist_ok=True)
        (folder.bundle("dense", 0) / "training.yaml").touch()
    assert folder.commits() == {"first": ["dense"], "second": ["dense"]}


def test_a_task_over_another_index_is_refused(
    write: Any, make_task: Any, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: Any
) -> None:
    from types import SimpleNamespace

    path = write()
    other = SimpleNamespace(digest="other-digest", folder=tmp_path / "other")
    monkeypatch.setattr(
        "ragmoe.evaluation.experiment_run.index_of_recipe",
        lambda path, progress=None: other if path.name == "other" else index,
    )
    make_task(index="other")
    with pytest.raises(ConfigError, match=r"task small is over the index .*other \(other-digest\), but the experiment"):
        run_experiment(load_experiment(path), out=tmp_path / "out")
    make_task(corpus=["corpus.jsonl"])
    with pytest.raises(ConfigError, match=r"task small is over a corpus of its own, corpus\.jsonl"):
        run_experiment(load_experiment(path), out=tmp_path / "out")
    make_task(index="idx")
    run_experiment(load_experiment(path), out=tmp_path / "out")
    assert trained


def test_tasks_of_one_setting_want_labels(write: Any, make_task: Any, tmp_path: Path) -> None:
    tasks = [{"name": name, "questions": ["questions.jsonl"]} for name in ("one", "two")]
    with pytest.raises(ConfigError, match="the tasks one, two are of one setting, 'gold'"):
        load_experiment(write(tasks=tasks)).load_tasks()
    tasks[1]["label"] = "other"
    assert len(load_experiment(write(tasks=tasks)).load_tasks()) == 2


def test_the_files_own_seeds_may_be_given(write: Any) -> None:
    assert load_experiment(write(), seeds=[0, 1]).as_committed
    assert not load_experiment(write(), seeds=[1]).as_committed


def test_configurations_of_arms(write: Any, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text(yaml.safe_dump(yaml.safe_load(write().read_text())["train"]))
    experiment = load_experiment(write(train="configs/base.yaml", untrained=True))
    config = experiment.training("retrieval", 3, tmp_path / "idx")
    assert (config.seed, config.model, config.train.steps) == (3, {"gate": "retrieval"}, 9)
    # Paths in a training configuration are relative to its own folder; the index is the experiment's.
    assert config.data.questions == [str(tmp_path / "configs" / "train.jsonl")]
    assert config.data.index == str(tmp_path / "idx")
    assert experiment.training("untrained", 0, tmp_path).model == {"sparse_layers": []}


def test_the_start_may_have_a_name_of_its_own(write: Any, trained: list[str], tmp_path: Path) -> None:
    tasks = [{"name": "t", "questions": ["questions.jsonl"], "label": "old"}]
    path = write(untrained="before", comparisons=[["dense", "before"]], tasks=tasks, seeds=[0])
    result = run_experiment(load_experiment(path), out=tmp_path / "out").result
    assert list(result.arms) == ["before", "dense", "retrieval"]
    assert (result.arms["before"].seconds, trained) == (None, ["dense/0", "retrieval/0"])
    assert [(c.a, c.b, c.setting) for c in result.comparisons] == [("dense", "before", "old")]


def test_several_starts(write: Any, trained: list[str], tmp_path: Path) -> None:
    path = write(untrained={"a": "dense", "b": "retrieval"}, comparisons=[["dense", "a"], ["a", "b"]], seeds=[0])
    experiment = load_experiment(path)
    assert [experiment.training(arm, 0, tmp_path).model for arm in "ab"] == [
        {"sparse_layers": []},
        {"gate": "retrieval"},
    ]
    result = run_experiment(experiment, out=tmp_path / "out").result
    assert list(result.arms) == ["a", "b", "dense", "retrieval"] and trained == ["dense/0", "retrieval/0"]


def test_a_value_may_depend_on_the_seed(write: Any, tmp_path: Path) -> None:
    experiment = load_experiment(write(arms={"on": {"base": "runs/other/seed-{seed}/bundle"}}, comparisons=[]))
    assert experiment.training("on", 2, tmp_path).base == "runs/other/seed-2/bundle"


def test_faults_of_an_arm_name_it(write: Any, trained: list[str], tmp_path: Path) -> None:
    experiment = load_experiment(write(arms={"odd": {"train.stepps": 3}}, comparisons=[]))
    with pytest.raises(ConfigError, match=r"arm odd: .*unknown key 'train.stepps'"):
        run_experiment(experiment, out=tmp_path / "out")
    assert trained == []
    with pytest.raises(ConfigError, match=r"train names .*none\.yaml, which does not exist"):
        load_experiment(write(train="none.yaml")).training("dense", 0, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: Extra inputs are not permitted"),
        ({"comparisons": [["retrieval", "tokn"]]}, "comparisons name 'tokn'; the arms are dense, retrieval"),
        ({"comparisons": [["retrieval", "untrained"]]}, "comparisons name 'untrained'"),
        ({"arms": {"untrained": {}}, "comparisons": []}, "no arm may be called 'untrained'"),
        ({"untrained": "dense"}, "no arm may be called 'dense'"),
        ({"joined": {"dense": ["dense", "retrieval"]}}, "joined has 'dense', which is the name of another arm"),
        ({"joined": {"both": ["dense", "none"]}}, "joined: both is of 'none'; the arms that are trained are dense"),
        ({"joined": {"both": ["dense"]}}, "joined: both is of dense; expected several arms"),
        ({"joined": {"a/b": ["dense", "retrieval"]}}, "the arm 'a/b' names a folder"),
        ({"untrained": {"before": "none"}}, "untrained names 'none'; the arms that are trained are dense, retrieval"),
        ({"arms": {"a/b": {}}, "comparisons": []}, "the arm 'a/b' names a folder"),
        ({"arms": {}}, "arms: Dictionary should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds has duplicates"),
        ({"notes": {"tokn": "x"}}, "notes name 'tokn'; the arms are dense, retrieval"),
        ({"baseline": "tokn"}, "baseline names 'tokn'; the arms are dense, retrieval"),
        ({"goals": [{"a": "retrieval", "b": "tokn", "at_least": 1}]}, "goals name 'tokn'; the arms are dense"),
        ({"goals": [{"a": "retrieval", "b": "dense"}]}, r"goals\.0\.at_least: Field required"),
        (
            {"goals": [{"a": "retrieval", "b": "dense", "at_least": 1, "metric": "f2"}]},
            "be 'macro_f1', 'macro_em'",
        ),
    ],
)
def test_a_wrong_experiment_is_refused(write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(**changes))


def test_two_tasks_of_one_name_are_refused(write: Any) -> None:
    inline = {"name": "small", "questions": ["questions.jsonl"]}
    with pytest.raises(ConfigError, match="two tasks are called 'small'"):
        load_experiment(write(tasks=["task.yaml", inline])).load_tasks()
    with pytest.raises(ConfigError, match="tasks: setting: Input should be"):
        load_experiment(write(tasks=[{**inline, "setting": "x"}])).load_tasks()


def test_a_goal_without_its_task_is_refused(write: Any) -> None:
    goal = {"a": "retrieval", "b": "dense", "at_least": 1}
    with pytest.raises(ConfigError, match="a goal names the setting 'open'; the tasks have gold"):
        load_experiment(write(goals=[{**goal, "setting": "open"}])).load_tasks()
    with pytest.raises(ConfigError, match="a goal names null neighbours; the task small has the perturbations none"):
        load_experiment(write(goals=[{**goal, "neighbours": None}])).load_tasks()


def test_an_arm_trained_before_a_setting_existed_has_its_default(
    write: Any, trained: list[str], tmp_path: Path
) -> None:
    run_experiment(load_experiment(write(), seeds=[0]), out=tmp_path / "out", only=["dense"])
    kept = tmp_path / "out" / "dense" / "seed-0" / "bundle" / "training.yaml"
    content = yaml.safe_load(kept.read_text())
    del content["raft"]["drop_each"]
    kept.write_text(yaml.safe_dump(content))
    run_experiment(load_experiment(write(), seeds=[0]), out=tmp_path / "out")
    content["raft"]["drop_each"] = 0.5
    kept.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"raft\.drop_each \(0\.5, now 0\.1\)"):
        run_experiment(load_experiment(write(), seeds=[0]), out=tmp_path / "out")


def test_what_is_asked_for_must_exist(write: Any, trained: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no arm 'tokn'; there are: dense, retrieval"):
        run_experiment(load_experiment(write()), only=["tokn"], out=tmp_path / "out")
    with pytest.raises(UsageError, match=r"expected a\.b=c, got 'steps'"):
        load_experiment(write(), overrides=["steps"])
    with pytest.raises(ConfigError, match="cannot read the experiment"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="expected a mapping of settings, got list"):
        load_experiment(tmp_path / "list.yaml")


def test_the_command_names_nothing_of_this_machine(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGMOE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment(write().resolve(), overrides=["train.steps=2"])
    assert command_of(experiment) == 'ragmoe eval experiment small.yaml train.steps=2 --seeds 0,1 --data "$RAGMOE_DATA"'
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command_of(experiment) == 'ragmoe eval experiment small.yaml train.steps=2 --seeds 0,1 --data "$RAGMOE_DATA"'


def test_merging_and_nesting() -> None:
    base = {"a": {"b": 1, "c": 2}}
    assert merge(base, nest("a.b", {"x": 1})) == {"a": {"b": {"x": 1}, "c": 2}}
    assert base == {"a": {"b": 1, "c": 2}}
