"""A configuration is read strictly: unknown keys, unset variables and wrong values are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ragmoe import ConfigError, UsageError
from ragmoe.training import load_config, train
from ragmoe.training.config import refuse_idle

Config = Callable[..., dict[str, Any]]


def test_overrides_are_read_as_yaml(config: Config) -> None:
    made = load_config(config(), ["train.steps=7", "model.sparse_layers=[1, 2]", "raft.drop_all=0.5"])
    assert (made.train.steps, made.model["sparse_layers"], made.raft.drop_all) == (7, [1, 2], 0.5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; there are: what, steps, batch_size"),
        ("nonsense=1", "unknown key 'nonsense'; there are: base, start, model"),
        ("train.steps=0", "train.steps: Input should be greater than or equal to 1 (got 0)"),
        ("raft.gold_probability=often", "raft.gold_probability"),
        (
            "train.what=some",
            "train.what: Input should be 'all', 'gate', 'experts', 'gate+experts', 'lora', 'new",
        ),
        ("steps", "expected key.key=value\nfor example: train.steps=200"),
        (__file__, "train.steps=200; an option is given once for each file"),
        ("base.x=1", "'base' is not a section"),
        ("model.expertz=3", "unknown model settings expertz; there are: "),
        ("train.steps=[", "'[' is not YAML"),
        ("train.learning_rate=.inf", "train.learning_rate: Input should be a finite number (got inf)"),
    ],
)
def test_wrong_overrides_are_named(config: Config, override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(config(), ["train.batch_size=3", override])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"train.what": "gate", "train.experts_learning_rate": 1e-3}, "train.experts_learning_rate"),
        ({"train.what": "experts", "train.gate_learning_rate": 1e-3}, "train.gate_learning_rate"),
        ({"train.lora": {"rank": 4}}, "train.lora"),
        ({"data.documents": ["d.jsonl"], "data.questions": []}, "raft"),
        ({"data.documents": ["d.jsonl"], "data.questions": [], "raft": {}, "generate": {}}, "generate"),
        (
            {
                "data.documents": ["d.jsonl"],
                "data.questions": [],
                "raft": {},
                "language": {"shown": "queries", "retriever": "bm25"},
            },
            r"language\.retriever",
        ),
    ],
)
def test_settings_that_would_change_nothing_are_refused(
    config: Config, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is given, but .*: it would change nothing\nleave {name} out"):
        train(config(**changes), out=tmp_path / "run")


@pytest.mark.parametrize("what", ["all", "lora", "new_expert", "gate+experts"])
def test_rates_of_what_is_trained_are_used(config: Config, what: str) -> None:
    rates = {"train.gate_learning_rate": 1e-3, "train.experts_learning_rate": 1e-3}
    refuse_idle(load_config(config(**{"train.what": what}, **rates)))


def test_what_is_wrong_in_the_file_is_no_fault_of_the_command(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"configuration: unknown key 'train\.stepz'; there are: what"):
        load_config(config(**{"train.stepz": 3}), ["train.steps=7"])


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some" / "run.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({"data": {"questions": ["../q/*.jsonl"], "index": "../index"}}))
    made = load_config(path)
    assert made.data.questions == [str(tmp_path / "q/*.jsonl")]
    assert made.data.index == str(tmp_path / "index")


def test_paths_of_overrides_count_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some" / "run.yaml"
    for folder in (path.parent, path.parent / "model", path.parent / "index"):
        folder.mkdir()
    path.write_text(yaml.safe_dump({"data": {"questions": ["q.jsonl"], "index": "index"}}))
    monkeypatch.chdir(tmp_path)
    made = load_config(path, ["data.index=index", "data.questions=[a.jsonl, '*.jsonl']", "start=adapter"])
    assert made.data.index == str(tmp_path / "index")
    assert made.data.questions == [str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")]
    assert made.start == str(tmp_path / "adapter")
    # What is no folder here is a Hub id, and not what stands beside the file by that name.
    assert load_config(path, ["base=model"]).base == "model"
    assert load_config(path, ["base=some/model"]).base == str(path.parent / "model")
    assert load_config(path, ["base=minilm", "start=warm-start"]).start == "warm-start"


def test_an_unset_variable_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAGMOE_NOWHERE", raising=False)
    with pytest.raises(ConfigError, match="RAGMOE_NOWHERE, which is not set") as caught:
        load_config(config(**{"data.questions": ["${RAGMOE_NOWHERE}/a.jsonl"]}))
    assert "export RAGMOE_NOWHERE" in str(caught.value)


def test_a_missing_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "broken.yaml")
