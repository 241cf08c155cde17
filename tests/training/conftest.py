"""Twelve passages with questions, indexed by a stub encoder, and a configuration that trains a tiny reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_encoder import StubEncoder
from tiny import save_tiny_bert

from ragmoe.index import BuildOptions, build_index

THINGS = ("ferry", "quay", "tide", "barge", "ledger", "map", "seal", "letter", "bread", "cheese", "apple", "honey")


def _passage(number: int, thing: str) -> dict[str, Any]:
    text = f"The {thing} of the city is kept by keeper{number} until day {number + 10}. Nobody else may open it."
    return {"id": f"p{number}", "title": thing, "text": text, "domain": "river" if number < 6 else "market"}


def _questions(number: int, thing: str) -> list[dict[str, Any]]:
    passage = _passage(number, thing)

    def span(text: str) -> dict[str, Any]:
        return {"passage_id": passage["id"], "start": passage["text"].index(text), "text": text}

    keeper = span(f"keeper{number}")
    rows: list[dict[str, Any]] = [
        {"question": f"who keeps the {thing}?", "answers": [keeper["text"]], "answer_spans": [keeper]},
        {"question": f"may others open the {thing}?", "answers": ["no"], "answer_type": "yesno"},
        {"question": f"what does the {thing} weigh?", "answers": [], "context_ids": [passage["id"]]},
    ]
    for at, row in enumerate(rows):
        row |= {"id": f"q{number}-{at}", "domain": passage["domain"]}
        row["gold_ids"] = [passage["id"]] if row["answers"] else []
    return rows


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.jsonl, questions.jsonl, index/ and a dense base/."""
    folder = tmp_path_factory.mktemp("world")
    corpus = [_passage(number, thing) for number, thing in enumerate(THINGS)]
    asked = [row for number, thing in enumerate(THINGS) for row in _questions(number, thing)]
    for name, rows in (("corpus", corpus), ("questions", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(BuildOptions((str(folder / "corpus.jsonl"),), folder / "index", encoder=StubEncoder()))
    save_tiny_bert(folder / "base")
    return folder


@pytest.fixture(autouse=True)
def _stub_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index names its encoder, and training opens it by that name."""
    monkeypatch.setattr(
        "ragmoe.index.folder.load_encoder", lambda name: name if not isinstance(name, str) else StubEncoder()
    )


@pytest.fixture(scope="session")
def config(world: Path) -> Callable[..., dict[str, Any]]:
    """``config(**{"train.steps": 4})``: a configuration with some keys changed."""

    def make(**changes: Any) -> dict[str, Any]:
        content: dict[str, Any] = {
            "base": str(world / "base"),
            "model": {"experts": 4, "expert_rank": 8, "gate_width": 8, "max_length": 64, "stride": 8},
            "data": {
                "questions": [str(world / "questions.jsonl")],
                "index": str(world / "index"),
                "calibration_share": 0.2,
            },
            "raft": {"neighbours": 4, "max_length": 64},
            "train": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
            "checkpoint_every": 0,
            "log_every": 1,
        }
        for key, value in changes.items():
            *path, last = key.split(".")
            at = content
            for part in path:
                at = at.setdefault(part, {})
            at[last] = value
        return content

    return make
