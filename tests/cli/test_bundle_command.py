"""``ragmoe bundle`` and the bundle that is called ``starter``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ragmoe.models import starter


@pytest.fixture
def packed(ragmoe: Any, make_bundle: Any, small_city: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "packed"
    code, out, _ = ragmoe("bundle", "pack", make_bundle("packing"), "--out", folder, "--base", small_city / "base")
    assert code == 0 and out.splitlines()[1] == f"next: ragmoe bundle unpack {folder} --out NEW_BUNDLE"
    return folder


@pytest.fixture
def packaged(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a package that ships this bundle."""
    monkeypatch.setattr(starter, "PACKED", packed)
    monkeypatch.setenv("RAGMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_packing_and_unpacking(ragmoe: Any, packed: Path, tmp_path: Path) -> None:
    code, out, _ = ragmoe("bundle", "unpack", packed, "--out", tmp_path / "mine")
    assert (code, out) == (
        0,
        f"{tmp_path / 'mine'}: a bundle; look at it with: ragmoe experts ls {tmp_path / 'mine'}\n",
    )
    code, out, _ = ragmoe("experts", "ls", tmp_path / "mine", "--json")
    assert [row["name"] for row in json.loads(out)] == [f"expert {i}" for i in range(4)]
    code, _, err = ragmoe("bundle", "unpack", packed, "--out", tmp_path / "mine")
    assert code == 1 and "exists: expected a new folder" in err


@pytest.mark.usefixtures("packaged")
def test_the_starter_answers(ragmoe: Any, small_city: Path) -> None:
    index = ("--index", small_city / "index")
    code, out, _ = ragmoe("ask", "starter", "When did the long bridge open?", *index, "--json")
    assert code == 0 and json.loads(out)["question"] == "When did the long bridge open?"
    assert ragmoe("route", "starter", "When did the long bridge open?", *index)[0] == 0
    code, out, _ = ragmoe("eval", "run", small_city / "task.yaml", "--model", "starter", "--out", "scores")
    assert code == 0 and "small" in out


@pytest.mark.usefixtures("packaged")
def test_the_starter_is_changed_in_a_copy_alone(ragmoe: Any, small_city: Path) -> None:
    for words in (("rename", "starter", 0, "x"), ("prune", "starter", 0), ("merge", "starter", 0, 1, "--name", "x")):
        code, _, err = ragmoe("experts", *words)
        assert code == 2 and "ragmoe bundle unpack starter --out my-starter" in err
    given = ("--name", "coins", "--index", small_city / "index", "--questions", small_city / "questions.jsonl")
    code, _, err = ragmoe("experts", "add", "starter", *given)
    assert code == 2 and "--out NEW_BUNDLE makes one" in err
    code, out, _ = ragmoe("experts", "add", "starter", *given, "--out", "mine", "--dry-run")
    assert code == 0 and "parameters" in out
    assert ragmoe("bundle", "unpack", "starter", "--out", "mine")[0] == 0
    assert ragmoe("experts", "rename", "mine", 0, "first")[0] == 0
