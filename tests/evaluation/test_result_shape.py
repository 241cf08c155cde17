from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ragmoe import DataError
from ragmoe.evaluation import machine as machine_module
from ragmoe.evaluation.machine import commit, commit_of_run, machine
from ragmoe.evaluation.result import Result

ARM: dict[str, Any] = {
    "macro_f1": 60.5,
    "macro_em": 50.0,
    "per_domain": {"wiki": {"f1": 60.5, "em": 50.0, "n": 500}},
    "perplexity": None,
    "active_params": 1,
    "total_params": 2,
    "normalised_mi": None,
    "gate_entropy": None,
    "max_load": None,
    "seconds": 12.5,
}
CONTENT: dict[str, Any] = {
    "experiment": "core7",
    "command": "ragmoe eval experiment core7.yaml",
    "commit": None,
    "machine": {"cpu": "x"},
    "seeds": [0],
    "arms": {"dense": ARM},
    "comparisons": [
        {"a": "x", "b": "y", "metric": "f1", "setting": "gold", "difference": 1.0, "low": -1.0, "high": 2.0}
    ],
}


def test_the_file_is_exactly_the_shape_that_others_read(tmp_path: Path) -> None:
    Result.model_validate(CONTENT).write(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == CONTENT
    assert Result.read(tmp_path / "r.json").arms["dense"].macro_f1 == 60.5


@pytest.mark.parametrize("place", [[], ["arms", "dense"], ["arms", "dense", "per_domain", "wiki"], ["comparisons", 0]])
def test_no_key_may_be_missing_or_added(tmp_path: Path, place: list[Any]) -> None:
    def changed(change: Any) -> Path:
        content = json.loads(json.dumps(CONTENT))
        at = content
        for key in place:
            at = at[key]
        change(at)
        (tmp_path / "r.json").write_text(json.dumps(content))
        return tmp_path / "r.json"

    with pytest.raises(DataError, match=r"has not the shape of a result: .*Extra inputs"):
        Result.read(changed(lambda at: at.update(more=1)))
    with pytest.raises(DataError, match=r"has not the shape of a result: .*Field required"):
        Result.read(changed(lambda at: at.popitem()))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the result"):
        Result.read(tmp_path / "none.json")


def test_the_machine_is_described_and_not_named() -> None:
    import platform

    found = machine()
    assert {"cpu", "cores", "threads"} <= found.keys()
    assert found["cores"] >= 1
    assert platform.node() not in json.dumps(found)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_marked_where_the_files_differ_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "core.hooksPath=/dev/null"]
        command = ["git", *identity, "-c", "commit.gpgsign=false", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    folder, code = tmp_path / "experiments", tmp_path / "code.py"
    folder.mkdir()
    code.write_text("1")
    (folder / "a.yaml").write_text("a")
    git("init")
    assert commit(folder) is None
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert commit(folder) == head
    (tmp_path / "notes").write_text("what was never added elsewhere changes nothing")
    assert commit(folder) == head
    code.write_text("2")
    assert commit(folder) == f"{head}+changes"
    code.write_text("1")
    (folder / "b.yaml").write_text("an experiment that nobody else has")
    assert commit(folder) == f"{head}+changes"


@pytest.mark.parametrize(
    ("of_code", "of_file", "said"),
    [
        ("a", "a", "a"),
        ("a", "a+changes", "a+changes"),
        ("a+changes", "a", "a+changes"),
        # The experiment's file lies in another repository: what ran is the code's.
        ("a", "b", "a"),
        ("a", "b+changes", "a"),
        ("a", None, "a"),
        # An installed package has none.
        (None, "b", "b"),
        (None, None, None),
    ],
)
def test_what_ran_is_of_the_commit_of_the_code(
    of_code: str | None, of_file: str | None, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing = {Path(machine_module.__file__).parents[1]: of_code, tmp_path: of_file}
    monkeypatch.setattr(machine_module, "commit", standing.get)
    assert commit_of_run(tmp_path) == said
    # What is committed meanwhile does not run.
    standing.clear()
    assert commit_of_run(tmp_path) == said


def test_outside_a_repository_there_is_no_commit(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    assert commit(tmp_path / "none") is None
