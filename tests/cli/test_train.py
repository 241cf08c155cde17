"""``ragmoe train``: what it prints, and how it fails."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml


def last(err: str) -> str:
    return err.splitlines()[-1]


@pytest.fixture
def config_file(small_city: Path, tmp_path: Path) -> Path:
    content = {
        "base": str(small_city / "base"),
        "model": {"experts": 4, "expert_rank": 8, "max_length": 64, "stride": 16},
        "data": {"questions": [str(small_city / "questions.jsonl")], "index": str(small_city / "index")},
        "raft": {"neighbours": 3, "max_length": 64},
        "train": {"steps": 2, "batch_size": 2, "precision": "fp32"},
        "checkpoint_every": 0,
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_dry_run_describes_and_writes_nothing(ragmoe: Any, config_file: Path, tmp_path: Path) -> None:
    code, out, _ = ragmoe("train", config_file, "--dry-run", "--out", tmp_path / "run")
    assert code == 0 and not (tmp_path / "run").exists()
    for word in ("parameters", "active for a token", "trained", "memory", "a step", "first batch", "[CLS]"):
        assert word in out
    assert "activations in the longest batch (4 sequences of" in " ".join(out.split())
    code, out, _ = ragmoe("train", config_file, "train.what=gate", "--dry-run", "--json")
    report = json.loads(out)
    counts = report["parameters"]
    assert code == 0 and counts["trained"] < counts["active"] < counts["total"]
    assert {row["target"] for row in report["first_batch"]} >= {"(no answer here)"}
    assert report["sequences_per_step"] == 4


def test_training_says_what_it_left_and_what_comes_next(ragmoe: Any, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = ragmoe("train", config_file, "train.steps=1", "log_every=1", "--out", run)
    assert code == 0, err
    assert f"{run}: loss" in out.replace("\n", "") and "M active for a token" in out.replace("\n", " ")
    assert "step 1/1" in err and "entropy" in err
    code, _, err = ragmoe("train", config_file, "--out", run)
    assert code == 1 and "error:" in err and "holds a finished run" in err and "--overwrite" in err


def test_an_interrupted_run_without_checkpoint_is_not_called_resumable(
    ragmoe: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    words = ("train", config_file, "--out", tmp_path / "run")
    again = f"ragmoe train {config_file} --out {tmp_path / 'run'}"
    with monkeypatch.context() as patch:
        patch.setattr("ragmoe.training.run.prepare", interrupted)
        code, _, err = ragmoe(*words)
        assert code == 130 and last(err) == f"stopped; nothing is written yet; begin again with: {again}"
    with monkeypatch.context() as patch:
        patch.setattr("ragmoe.training.run._save", interrupted)
        code, _, err = ragmoe(*words)
    why = "no checkpoint is written yet (checkpoint_every is 0), so it starts again at the first step"
    assert code == 130 and last(err) == f"stopped; {why}: {again} --resume"
    code, _, err = ragmoe(*words)
    assert code == 1 and "holds a run that did not finish and left no checkpoint" in err.replace("\n", " ")
    assert "hint: pass --overwrite to start again" in err and "--resume" not in err


def test_a_stopped_run_says_the_command_that_goes_on(
    ragmoe: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe.cli.progress import Show

    def stop_at_two(self: Show, name: str, done: int, total: int) -> None:
        if (name, done) == ("training", 2):
            raise KeyboardInterrupt

    changes = ("train.steps=3", "checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(Show, "stage", stop_at_two)
        code, _, err = ragmoe("train", config_file, *changes, "--out", tmp_path / "run", "--overwrite")
    go_on = f"ragmoe train {config_file} {' '.join(changes)} --out {tmp_path / 'run'} --resume"
    assert code == 130
    assert last(err) == f"stopped; the checkpoint after step 1 is kept; go on with: {go_on}"
    code, _, err = ragmoe("train", config_file, "checkpoint_every=1", "seed=7", "--out", tmp_path / "run", "--resume")
    assert code == 1
    assert "differs from its training.yaml in train.steps (3, now 2), seed (0, now 7)" in " ".join(err.split())
    code, out, err = ragmoe(*shlex.split(go_on)[1:])
    assert code == 0 and "going on after step 1" in err
    assert "gone on to step 3; history.jsonl has its losses" in " ".join(out.split())
    assert ragmoe("train", config_file, "--out", tmp_path / "run")[0] == 1


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(
    ragmoe: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(self: Any, name: str, done: int, total: int) -> None:
        if (name, done) == ("training", 1):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ragmoe.cli.progress.Show.stage", ended)
    code, _, err = ragmoe("train", config_file, "checkpoint_every=9", "--out", tmp_path / "run")
    go_on = f"ragmoe train {config_file} checkpoint_every=9 --out {tmp_path / 'run'} --resume"
    assert code == 143
    assert last(err) == f"stopped; the checkpoint after step 1 is kept; go on with: {go_on}"


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["train.stepz=1"], 2, "error: unknown key 'train.stepz'; there are: what, steps"),
        (["train.steps=0"], 2, "error: train.steps: Input should be greater than or equal to 1 (got 0)"),
        (["foo"], 2, "error: cannot read the override 'foo': expected key.key=value hint: for example: train.steps"),
        (["train.steps"], 2, "error: cannot read the override 'train.steps': expected key.key=value"),
        (["base.x=1"], 2, "error: cannot override 'base.x': 'base' is not a section"),
        (["model.nonsense=1"], 2, "error: unknown model settings nonsense; there are: "),
        (["model.gate=nonsense"], 1, "error: there is no gate 'nonsense'; there are: "),
        (["data.index=nowhere"], 1, "error: there is no index at HERE/nowhere: no such folder"),
        (["data.questions=[none.jsonl]"], 1, "no question file matches HERE/none.jsonl"),
        (["train.lora={rank: 4}"], 1, "error: train.lora is given, but train.what is 'all': it would change nothing"),
        (["base=/no/such/model"], 1, "/no/such/model"),
    ],
)
def test_errors_name_what_is_wrong(
    ragmoe: Any,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    exit_code: int,
    said: str,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = ragmoe("train", config_file, *words, "--out", tmp_path / "run")
    assert code == exit_code and said.replace("HERE", str(tmp_path / "here")) in err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_out_must_be_a_folder(ragmoe: Any, config_file: Path) -> None:
    code, _, err = ragmoe("train", config_file, "--out", config_file)
    assert code == 1 and f"error: {config_file} is a file; expected a folder" in err and "hint: name another" in err
    code, _, err = ragmoe("train", config_file, "--out", config_file / "run")
    assert code == 1 and f"run cannot be made: {config_file} is a file" in err


def test_a_missing_configuration_is_an_error(ragmoe: Any, tmp_path: Path) -> None:
    code, _, err = ragmoe("train", tmp_path / "none.yaml")
    assert code == 1 and "there is no configuration file" in err and "hint: ragmoe train CONFIG.yaml" in err
    code, _, err = ragmoe("train")
    assert code == 2
