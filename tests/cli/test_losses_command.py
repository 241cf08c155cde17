"""``ragmoe losses ls``: every loss with its key, its use and its source."""

from __future__ import annotations

import json
from typing import Any

from ragmoe.models import RagmoeBertConfig
from ragmoe.moe import loss_names, routing_loss
from ragmoe.training import load_config


def test_ls_lists_every_loss_with_its_key_and_its_use(ragmoe: Any) -> None:
    code, out, _ = ragmoe("losses", "ls", "--json")
    rows = {row["loss"]: row for row in json.loads(out)}
    assert code == 0 and sorted(rows) == loss_names()
    assert rows["z"] == {
        "loss": "z",
        "key": "model.z_loss",
        "of": "tokens",
        "use": routing_loss("z").summary,
        "source": routing_loss("z").source,
    }
    assert rows["domain"]["key"] == "model.losses.domain" and rows["domain"]["of"] == "batch"
    for row in rows.values():
        assert all(row.values()) and "\n" not in row["use"] + row["source"]


def test_ls_prints_the_same_as_a_table(ragmoe: Any) -> None:
    code, out, _ = ragmoe("losses", "ls")
    assert code == 0
    words = " ".join(out.split())
    for name in loss_names():
        assert f" {name} " in words
    assert "model.losses.gshard" in words and "train.loss_scope=global" in words


def test_the_keys_it_names_are_understood() -> None:
    """As overrides of a command, which look for a typing error before anything is loaded."""
    content = {"data": {"questions": ["q.jsonl"], "index": "i"}}
    config = load_config(content, ["model.losses.gshard=1e-2", "model.losses.domain=1", "model.balance_loss=0.0"])
    assert RagmoeBertConfig(**config.model).loss_weights == {
        "load_balance": 0.0,
        "z": 0.001,
        "gshard": 0.01,
        "domain": 1,
    }
