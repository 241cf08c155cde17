"""``ragmoe index add``, ``remove`` and ``merge`` from the outside: what they print, and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from index_fixtures import Run, run, write

__all__ = ["run"]

PASSAGES = [
    {"id": "a", "title": "Ferries", "text": "The ferry to [Northmoor] leaves at six.", "domain": "river"},
    {"id": "b", "title": "Bread", "text": "Bread from Millrace is baked at dawn.", "domain": "market"},
    {"id": "c", "title": "Charter", "text": "The charter lies in the archive.", "domain": "archive"},
]


@pytest.fixture
def folder(tmp_path: Path, run: Run) -> Path:
    assert run("index", "build", write(tmp_path / "two.jsonl", *PASSAGES[:2]), "--out", tmp_path / "index").code == 0
    return tmp_path / "index"


def test_add(run: Run, folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "more.jsonl", *PASSAGES[1:])
    tried = run("index", "add", folder, source, "--dry-run", "--json")
    assert tried.json["to_encode"] == 1 and tried.json["duplicates"] == 1 and tried.json["passages"] == 3
    done = run("index", "add", folder, source)
    assert done.code == 0 and done.out.startswith(f"{folder}: 3 passages, generation 2, ")
    assert "2: their vectors are taken over" in done.err and "1 are there already and are passed over" in done.err
    again = run("index", "add", folder, source, "--resume")
    assert again.code == 0 and "nothing to add: all of it is there already" in again.err
    assert again.out.startswith(f"{folder}: 3 passages, generation 2, ")
    assert run("index", "search", folder, "the charter", "-k", 1, "--json").json[0]["id"] == "c"


def test_what_was_read_is_told_the_same_way_by_all(run: Run, folder: Path, tmp_path: Path) -> None:
    """Also where there is nothing to do."""
    manifest = json.loads((folder / "manifest.json").read_text())
    source = write(tmp_path / "same.jsonl", *PASSAGES[:2], {"id": "d", "text": ""})
    done = run("index", "add", folder, source, "--on-error", "skip", "--json")
    bad = f"{source}:3: 'text' is empty"
    read = {"out": str(folder), "duplicates": 2, "skipped_lines": [bad]}
    assert done.json == {**read, "dry_run": False, **manifest}
    assert done.err.splitlines()[-1].endswith(f"all of it is there already; 1 bad line skipped, the first: {bad}")
    tried = run("index", "add", folder, source, "--on-error", "skip", "--dry-run", "--json").json
    assert tried.items() >= {**read, "dry_run": True, "to_encode": 0}.items() and "digest" not in tried
    built = run("index", "build", source, "--out", tmp_path / "new", "--on-error", "skip", "--json").json
    assert built.items() >= {"dry_run": False, "duplicates": 0, "skipped_lines": [bad]}.items()


def test_remove(run: Run, folder: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_bytes(b"\xef\xbb\xbfa\r\n\r\n")
    done = run("index", "remove", folder, "--ids", ids, "--json")
    assert done.code == 0 and done.json["passages"] == 1 and done.json["domains"] == {"market": 1}
    read = {"out": str(folder), "dry_run": False, "duplicates": 0, "skipped_lines": []}
    assert done.json == {**read, **json.loads((folder / "manifest.json").read_text())}
    again = run("index", "remove", folder, "--ids", ids, "--resume")
    assert again.code == 0 and "nothing to remove: all of it is gone already" in again.err


def test_merge(run: Run, folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "last.jsonl", PASSAGES[2])
    assert run("index", "build", source, "--out", tmp_path / "other").code == 0
    done = run("index", "merge", folder, tmp_path / "other", "--out", tmp_path / "both")
    assert done.code == 0 and done.out.startswith(f"{tmp_path / 'both'}: 3 passages, generation 1, ")
    assert run("index", "verify", tmp_path / "both").code == 0


ERRORS = {
    "no index": (["add", "{tmp}/none", "{tmp}/two.jsonl"], 1, "there is no index at {tmp}/none"),
    "no source": (["add", "{index}"], 2, "Missing argument 'SOURCE'"),
    "taken": (["add", "{index}", "{tmp}/taken.jsonl"], 1, "id 'a' is in {index} already, with another title or text"),
    "other encoder": (
        ["add", "{index}", "{tmp}/new.jsonl", "--encoder", "other"],
        1,
        "was built with encoder 'stub-0'",
    ),
    "what to remove": (["remove", "{index}"], 2, "neither of --ids and --domain given; expected one of them"),
    "both": (["remove", "{index}", "--ids", "x", "--domain", "y"], 2, "both of --ids and --domain given"),
    "no ids": (["remove", "{index}", "--ids", "{tmp}/empty.jsonl"], 1, "empty.jsonl holds no ids; expected one a line"),
    "no file": (["remove", "{index}", "--ids", "{tmp}/none"], 1, "{tmp}/none: No such file"),
    "no domain": (
        ["remove", "{index}", "--domain", "sea"],
        1,
        "does not hold the domain 'sea'; there are: market, river",
    ),
    "merge out": (["merge", "{index}", "{index}", "--out", "{index}"], 1, "is one of the two"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, run: Run, folder: Path, tmp_path: Path) -> None:
    words, code, message = ERRORS[name]
    write(tmp_path / "taken.jsonl", {"id": "a", "text": "Else."})
    write(tmp_path / "new.jsonl", {"id": "n", "text": "New."})
    write(tmp_path / "empty.jsonl")
    before = (folder / "manifest.json").read_bytes()
    done = run("index", *(word.format(index=folder, tmp=tmp_path) for word in words))
    assert done.code == code and done.out == ""
    assert message.format(index=folder, tmp=tmp_path) in " ".join(done.err.replace("│", " ").split())
    assert (folder / "manifest.json").read_bytes() == before


def test_stopped_by_the_user_it_says_how_to_go_on(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe.index import _crash

    def stop(point: str) -> None:
        if point == "encoded":
            raise KeyboardInterrupt

    monkeypatch.setattr(_crash, "hook", stop)
    source = write(tmp_path / "more.jsonl", PASSAGES[2])
    done = run("index", "add", folder, source)
    again = f"ragmoe index add {folder} {source} --resume"
    assert (done.code, done.err.splitlines()[-1]) == (
        130, f"stopped; what is encoded so far is kept; go on with: {again}"
    )  # fmt: skip
    monkeypatch.setattr(_crash, "hook", None)
    # Nor does it lose that where meanwhile something is given again that is there already.
    kept, known = sorted((folder / "partial").iterdir()), tmp_path / "two.jsonl"
    for words in ([], ["--dry-run"], ["--resume"]):
        assert "nothing to add" in run("index", "add", folder, known, *words).err
        assert sorted((folder / "partial").iterdir()) == kept and any(path.suffix == ".npz" for path in kept)
    assert run("index", "add", folder, source, "--resume").out.startswith(f"{folder}: 3 passages, ")
    assert not (folder / "partial").exists()


@pytest.mark.parametrize(("kind", "have"), [("disk", "free_disk"), ("memory", "free_memory")])
def test_what_cannot_fit_is_refused_with_numbers(
    kind: str, have: str, run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"ragmoe._room.{have}", lambda *_: 1234)
    source = write(tmp_path / "more.jsonl", PASSAGES[2])
    for words in (["--dry-run"], []):
        done = run("index", "build", source, "--out", tmp_path / "new", *words)
        assert done.code == 1 and "to encode, " in done.err
        assert f" of {kind} while it is written, 1.2 kB are " in done.err
        assert not (tmp_path / "new").exists()
    assert run("index", "add", folder, source).code == 1
    assert run("index", "verify", folder).code == 0


def test_export_and_import(run: Run, folder: Path, tmp_path: Path) -> None:
    done = run("index", "export", folder, tmp_path / "x.parquet", "--to", "parquet")
    assert done.code == 0 and done.out.startswith(f"{tmp_path / 'x.parquet'}: 2 passages of {folder} (")
    words = ["index", "import", tmp_path / "x.parquet", tmp_path / "two.jsonl", "--out", tmp_path / "made"]
    tried = run(*words, "--encoder", "minilm", "--windows", "--dry-run", "--json")
    assert tried.json["passages"] == 2 and tried.json["to_encode"] == 0 and not (tmp_path / "made").exists()
    done = run(*words, "--encoder", "minilm", "--windows")
    assert done.code == 0 and done.out.startswith(f"{tmp_path / 'made'}: 2 passages, generation 1, ")
    refused = run(*words, "--encoder", "other", "--overwrite")
    assert refused.code == 1 and "holds other vectors than encoder 'stub-1'" in refused.err
    assert run("index", "export", folder, tmp_path / "y", "--to", "csv").code == 2
    assert run("index", "export", folder, tmp_path / "y", "--to", "beir", "--json").json["form"] == "beir"
