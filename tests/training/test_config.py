"""A configuration is read strictly: unknown keys, unset variables and wrong values are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ragmoe import ConfigError
from ragmoe.training import load_config

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
            "train.what: Input should be 'all', 'gate', 'experts', 'gate+experts', 'lora' or 'new",
        ),
        ("steps", "expected key.key=value"),
        ("base.x=1", "'base' is not a section"),
    ],
)
def test_wrong_keys_and_values_are_named(config: Config, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config(), [override])
    assert said in str(caught.value)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some" / "run.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({"data": {"questions": ["../q/*.jsonl"], "index": "../index"}}))
    made = load_config(path)
    assert made.data.questions == [str(tmp_path / "q/*.jsonl")]
    assert made.data.index == str(tmp_path / "index")


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
