"""``ragmoe train``: what it prints, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml


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
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ragmoe.training.run._save", interrupted)
        assert ragmoe("train", config_file, "--out", tmp_path / "run")[0] == 130
    code, _, err = ragmoe("train", config_file, "--out", tmp_path / "run")
    assert code == 1 and "holds a run that did not finish and left no checkpoint" in err.replace("\n", " ")
    assert "hint: pass --overwrite to start again" in err and "--resume" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.stepz=1"], "unknown key 'train.stepz'; there are: what, steps"),
        (["model.gate=nonsense"], "there is no gate 'nonsense'; there are: "),
        (["data.index=nowhere"], "nowhere"),
        (["data.questions=[none.jsonl]"], "no question file matches"),
        (["base=/no/such/model"], "/no/such/model"),
    ],
)
def test_errors_name_what_is_wrong(ragmoe: Any, config_file: Path, tmp_path: Path, words: list[str], said: str) -> None:
    code, _, err = ragmoe("train", config_file, *words, "--out", tmp_path / "run")
    assert code == 1 and "error: " in err and said in err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_a_missing_configuration_is_an_error(ragmoe: Any, tmp_path: Path) -> None:
    code, _, err = ragmoe("train", tmp_path / "none.yaml")
    assert code == 1 and "there is no configuration file" in err and "hint: ragmoe train CONFIG.yaml" in err
    code, _, err = ragmoe("train")
    assert code == 2
