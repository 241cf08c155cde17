"""``ragmoe bundle`` and the bundle that is called ``starter``."""

from __future__ import annotations

import json
import shutil
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
    # Wherever it was unpacked, it is called what the user calls it.
    block = json.loads(Path("scores/small/results.json").read_text())["ragmoe"]["tasks"]["small"]
    assert block["model"] == "starter"
    for words in (("experts", "ls"), ("bundle", "versions")):
        code, out, _ = ragmoe(*words, "starter")
        assert code == 0 and "of starter" in out and "cache" not in out


@pytest.mark.usefixtures("packaged")
def test_the_starter_is_changed_in_a_copy_alone(ragmoe: Any, small_city: Path, tmp_path: Path) -> None:
    for words in (("rename", "starter", 0, "x"), ("prune", "starter", 0), ("merge", "starter", 0, 1, "--name", "x")):
        code, _, err = ragmoe("experts", *words)
        assert code == 2 and "ragmoe bundle unpack starter --out my-starter" in err
    rows = (small_city / "questions.jsonl").read_text().splitlines()
    coins = tmp_path / "coins.jsonl"
    coins.write_text("\n".join(row for row in rows if json.loads(row)["domain"] == "coins"))
    given = ("--name", "coins", "--index", small_city / "index", "--questions", coins)
    code, _, err = ragmoe("experts", "add", "starter", *given)
    assert code == 2 and "--out NEW_BUNDLE makes one" in err
    code, out, _ = ragmoe("experts", "add", "starter", *given, "--out", "mine", "--dry-run")
    assert code == 0 and "parameters" in out
    assert ragmoe("bundle", "unpack", "starter", "--out", "mine")[0] == 0
    assert ragmoe("experts", "rename", "mine", 0, "first")[0] == 0


def test_versions_and_the_way_back(ragmoe: Any, make_bundle: Any) -> None:
    bundle = make_bundle("versions")
    assert ragmoe("experts", "prune", bundle, 2)[0] == 0
    code, out, _ = ragmoe("bundle", "versions", bundle)
    assert code == 0 and "prune expert 2" in out and f"ragmoe bundle rollback {bundle} --to N" in " ".join(out.split())
    code, out, _ = ragmoe("bundle", "rollback", bundle)
    assert (code, out.splitlines()[0]) == (0, f"{bundle}: version 3, roll back to version 1")
    assert "  expert 2 (expert 2): back, version 1" in out.splitlines()
    assert [row["version"] for row in json.loads(ragmoe("bundle", "versions", bundle, "--json")[1])] == [1, 2, 3]
    code, _, err = ragmoe("bundle", "rollback", bundle, "--to", 9)
    assert code == 1 and "has no version 9; it has [1, 2, 3]" in err
    code, out, _ = ragmoe("experts", "lock", bundle, 1, 2)
    assert (code, out) == (0, f"{bundle}: version 4, lock expert 1, expert 2\n")
    assert "locked" in ragmoe("experts", "ls", bundle)[1]
    code, _, err = ragmoe("experts", "prune", bundle, 1)
    assert (
        code == 1
        and "is locked and cannot be pruned" in err
        and f"ragmoe experts unlock {bundle}" in err.replace("\n", "")
    )
    assert ragmoe("experts", "lock", bundle, 1)[1] == f"{bundle}: version 4, nothing to do\n"
    assert ragmoe("experts", "unlock", bundle, 1, 2)[1] == f"{bundle}: version 5, unlock expert 1, expert 2\n"


def test_a_flipped_byte_is_found(ragmoe: Any, make_bundle: Any, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(make_bundle("checked"), tmp_path / "bundle"))
    assert ragmoe("bundle", "verify", bundle)[:2] == (0, f"{bundle}: all is well\n")
    assert ragmoe("experts", "prune", bundle, 1)[0] == 0
    file = bundle / "expert.1.1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    # Only the version before has it.
    assert json.loads(ragmoe("bundle", "verify", bundle, "--json")[1]) == {"ok": True, "problems": []}
    code, out, _ = ragmoe("bundle", "verify", bundle, "--version", 1, "--json")
    found = json.loads(out)
    assert code == 1 and not found["ok"] and "expert.1.1.safetensors was changed: its sha256 is" in found["problems"][0]
    (bundle / "gate.1.safetensors").unlink()
    code, _, err = ragmoe("bundle", "verify", bundle)
    assert code == 1 and f"error: {bundle} is damaged: gate.1.safetensors is missing\n" in err
