"""``ragmoe experts``: what it prints, what it changes, and how it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

QUICK = ("train.gate_learning_rate=0.1", "train.precision=fp32", "train.batch_size=4", "raft.max_length=64")


@pytest.fixture
def bundle(make_bundle: Any, tmp_path: Path) -> Path:
    """A copy, since these commands change it; it is named as wide as a terminal allows."""
    return Path(shutil.copytree(make_bundle("experts"), tmp_path / "b"))


@pytest.fixture
def coins(small_city: Path, tmp_path: Path) -> Path:
    rows = (small_city / "questions.jsonl").read_text().splitlines()
    (tmp_path / "coins.jsonl").write_text("".join(row + "\n" for row in rows if json.loads(row)["domain"] == "coins"))
    return tmp_path / "coins.jsonl"


@pytest.fixture
def add(ragmoe: Any, small_city: Path, bundle: Path, coins: Path) -> Any:
    def run(*words: object) -> tuple[int, str, str]:
        given = ("--name", "coins", "--index", small_city / "index", "--questions", coins)
        return ragmoe("experts", "add", bundle, *QUICK, *given, *words)

    return run


def test_ls_and_show(ragmoe: Any, bundle: Path) -> None:
    code, out, _ = ragmoe("experts", "ls", bundle)
    assert code == 0 and "expert 3" in out and "load (%)" in out
    code, out, _ = ragmoe("experts", "ls", bundle, "--json")
    rows = json.loads(out)
    assert [(row["id"], row["name"], row["locked"]) for row in rows] == [(i, f"expert {i}", False) for i in range(4)]
    code, out, _ = ragmoe("experts", "show", bundle, "expert 2")
    assert code == 0 and "expert.2.1.safetensors" in out and "2 (expert 2)" in out and rows[2]["digest"] in out
    code, out, _ = ragmoe("experts", "show", bundle, 2, "--json")
    assert json.loads(out) == rows[2]


def test_renaming_and_looking_back(ragmoe: Any, bundle: Path) -> None:
    code, out, _ = ragmoe("experts", "rename", bundle, 1, "bank")
    assert (code, out) == (0, f"{bundle}: version 2, rename expert 1 to bank\n")
    names = [
        [row["name"] for row in json.loads(ragmoe("experts", "ls", bundle, *version, "--json")[1])][1]
        for version in ((), ("--version", 1))
    ]
    assert names == ["bank", "expert 1"]


def test_renaming_an_expert_that_votes_lead_to(ragmoe: Any, make_bundle: Any, tmp_path: Path) -> None:
    names = ["rivers", "coins", "a", "b"]
    made = make_bundle("memory", gate="memory", sparse_layers=[0, 1], expert_names=names)
    own = shutil.copytree(made, tmp_path / "own")
    code, out, _ = ragmoe("experts", "rename", own, 1, "bank")
    assert code == 0 and "passages of the domain coins speak for this expert no longer, and those of bank do" in out


def test_pruning_predicts_and_measures(ragmoe: Any, small_city: Path, bundle: Path) -> None:
    words = ("experts", "prune", bundle, "expert 1", 3)
    code, out, _ = ragmoe(*words, "--dry-run")
    assert code == 0 and "predicted: unknown" in out and "expert 1, expert 3 would go; 2 experts" in out
    code, out, _ = ragmoe(*words, "--task", small_city / "task.yaml", "--json", "--dry-run")
    found = json.loads(out)
    (measured,) = found["measured"]
    assert (found["version"], found["dry_run"], found["predicted"]) == (1, True, None)
    assert (measured["task"], measured["n"]) == ("small", 4) and 0 < measured["load"] < 1
    assert measured["difference"] == pytest.approx(measured["after"] - measured["before"])
    code, out, _ = ragmoe(*words, "--task", small_city / "task.yaml", "--index", small_city / "index")
    assert code == 0 and "measured: small (gold, 4 questions): F1" in out
    assert f"{bundle}: version 2 without expert 1, expert 3; 2 experts" in out
    history = json.loads(ragmoe("experts", "ls", bundle, "--json")[1])
    assert [row["id"] for row in history] == [0, 2]
    message = json.loads((bundle / "bundle.json").read_text())["message"]
    assert message.startswith("prune expert 1, expert 3; predicted: unknown") and "measured: small" in message
    code, _, err = ragmoe("experts", "prune", bundle, 0)
    assert code == 1 and "error: 1 of 2 experts would be left, but each token chooses 2" in err


def test_a_reader_needs_the_index_of_its_passages(ragmoe: Any, bundle: Path, coins: Path) -> None:
    code, _, err = ragmoe("experts", "add", bundle, "--name", "coins", "--questions", coins)
    assert code == 2 and "needs the index that holds its passages" in err and "--index DIR" in err
    code, _, err = ragmoe("experts", "add", bundle, "--name", "coins", "--index", "i", "--known", coins)
    assert code == 1 and "a reader is judged by questions" in err


def test_merging(ragmoe: Any, bundle: Path) -> None:
    code, out, _ = ragmoe("experts", "merge", bundle, 0, 2, "--name", "both")
    assert code == 0 and "version 2, expert 4 (both) in the place of 0 and 2" in out and "weights 0.50 and 0.50" in out
    code, out, _ = ragmoe("experts", "merge", bundle, 4, 1, "--name", "both", "--json")
    found = json.loads(out)
    assert (found["expert"], found["version"]) == ({"id": 5, "name": "both"}, 3) and 0 < found["kept"] <= 1


def test_taking(ragmoe: Any, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    assert ragmoe("experts", "rename", copy, 1, "bank")[0] == ragmoe("experts", "rename", copy, 2, "court")[0] == 0
    code, out, _ = ragmoe("experts", "take", bundle, "bank", 2, "--from", copy)
    assert code == 0 and f"{bundle}: version 2, with 4 (bank), 5 (court); 6 experts" in out
    assert f"not measured yet; back to what was: ragmoe bundle rollback {bundle}" in out and "annotate" not in out
    # One that was pruned comes back from the version that had it.
    assert ragmoe("experts", "prune", bundle, "expert 0")[0] == 0
    code, out, _ = ragmoe("experts", "take", bundle, "expert 0", "--from", bundle, "--version", 2, "--json")
    assert (code, json.loads(out)) == (0, {"taken": [{"id": 6, "name": "expert 0"}], "version": 4})
    code, _, err = ragmoe("experts", "take", bundle, "court", "--from", copy)
    assert code == 1 and err.startswith("error: there is an expert 'court' already")
    assert err.endswith(f"ragmoe experts rename {copy} court ANOTHER_NAME\n")


def test_taking_one_that_votes_lead_to(ragmoe: Any, make_bundle: Any, tmp_path: Path) -> None:
    names = ["rivers", "coins", "a", "b"]
    made = make_bundle("memory", gate="memory", sparse_layers=[0, 1], expert_names=names)
    own = shutil.copytree(made, tmp_path / "own")
    assert ragmoe("experts", "prune", own, "a")[0] == 0
    code, out, _ = ragmoe("experts", "take", own, "a", "--from", made)
    assert code == 0 and "ragmoe index annotate DIR" in out


def test_adding_an_expert(add: Any, ragmoe: Any, small_city: Path, bundle: Path, coins: Path) -> None:
    code, out, _ = add("--dry-run", "--json")
    report = json.loads(out)
    assert code == 0 and report["parameters"]["trained"] < report["parameters"]["total"] / 10
    code, out, err = add("--steps", 20, "--dev", coins, "--task", small_city / "task.yaml")
    assert code == 0, err
    assert "Certificate of coins" in out and "identical" in out and "small (gold)" in out
    assert "version 2 has the expert 4 (coins)" in out
    code, out, _ = ragmoe("experts", "show", bundle, "coins")
    assert code == 0 and "Certificate of coins" in out and "add expert coins" in out
    code, _, err = add()
    assert code == 1 and err.startswith("error: there is an expert 'coins' already")


def test_adding_to_a_copy(add: Any, small_city: Path, bundle: Path, tmp_path: Path) -> None:
    rows = (small_city / "corpus.jsonl").read_text().splitlines()
    corpus = tmp_path / "coin_passages.jsonl"
    corpus.write_text("\n".join(row for row in rows if json.loads(row)["domain"] == "coins"))
    code, out, err = add("--steps", 20, "--out", tmp_path / "new", "--json", "--corpus", corpus)
    assert code == 0, err
    found = json.loads(out)
    assert (found["version"], found["id"], found["name"], found["old"]) == (2, 4, "coins", [])
    assert json.loads((bundle / "bundle.json").read_text())["version"] == 1
    code, _, err = add("--out", tmp_path / "new")
    assert code == 1 and "is there already" in err and "--out" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("ls", "NOWHERE"), 1, "there is no bundle at"),
        (("show", "BUNDLE", "mint"), 1, "there is no expert 'mint'; there are: 0 (expert 0)"),
        (("ls", "BUNDLE", "--version", 7), 1, "has no version 7; it has [1]"),
        (("rename", "BUNDLE", "0", "expert 1"), 1, "there is an expert 'expert 1' already"),
        (("prune", "BUNDLE"), 2, "EXPERT"),
        (("prune", "BUNDLE", "0", "--index", "x"), 2, "--index says how a task is read, but no --task was given"),
        (("prune", "BUNDLE", "0", "--limit", "3"), 2, "--limit says how a task is read, but no --task was given"),
        (
            ("add", "BUNDLE", "--name", "x", "--index", "x", "--task-index", "x"),
            2,
            "--task-index says where a task is read, but no --task was given",
        ),
        (("prune", "BUNDLE", "0", "--task", "nonsense"), 2, "there is no task file 'nonsense'"),
        (("merge", "BUNDLE", "0", "1"), 2, "--name"),
        (("take", "BUNDLE", "0"), 2, "--from"),
        (("take", "BUNDLE", "0", "--from", "NOWHERE"), 1, "there is no bundle at"),
        (("take", "BUNDLE", "mint", "--from", "BUNDLE"), 1, "there is no expert 'mint'; there are: 0 (expert 0)"),
        (("take", "starter", "0", "--from", "BUNDLE"), 2, "the starter belongs to the package"),
        (("add", "BUNDLE", "--name", "coins"), 2, "--index"),
    ],
)
def test_errors(ragmoe: Any, bundle: Path, words: tuple[Any, ...], code: int, said: str) -> None:
    names = {"BUNDLE": bundle, "NOWHERE": bundle / "nowhere"}
    found, _, err = ragmoe("experts", *(names.get(word, word) for word in words))
    assert found == code and said in " ".join(err.split())


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (("train.stepz=1",), 2, "unknown key 'train.stepz'"),
        (("--out", "CORPUS"), 1, "other.jsonl is a file; expected a folder"),
        (("--from", "mint"), 1, "there is no expert 'mint' to start from; there are: shared, nearest, 0 (expert 0)"),
        (("--corpus", "CORPUS"), 1, "1 of 1 documents of"),
        (("--corpus", "nowhere.jsonl"), 1, "nowhere.jsonl: there is no such file"),
        (("--questions", "none.jsonl"), 1, "no question file matches"),
    ],
)
def test_errors_of_adding(
    add: Any,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    exit_code: int,
    said: str,
) -> None:
    (tmp_path / "other.jsonl").write_text('{"id": "unknown", "text": "Nobody has indexed this."}\n')
    monkeypatch.chdir(tmp_path)
    code, _, err = add(*(str(tmp_path / "other.jsonl") if word == "CORPUS" else word for word in words))
    assert code == exit_code and said in " ".join(err.split())
    assert "Traceback" not in err and not (bundle / "adding").exists()


def test_a_certificate_says_where_an_expert_is_called() -> None:
    from ragmoe.cli.experts import certificate_table

    change = {"task": "core", "setting": "gold", "n": 3, "before": 50.0, "live": 51.0, "difference": 1.0, "low": 0.0}
    change |= {"high": 2.0, "identical": True, "routed": {"tokens": 0.1, "questions": 0.0, "touched": 0.5}}
    certificate = {"name": "port", "minutes": 1.0, "steps": 2, "questions": 3, "parameters": {"trained": 4, "total": 5}}
    # As earlier versions recorded it.
    assert "by domain" not in certificate_table({**certificate, "old": [change], "new": None}).note
    leaks = {"per_domain": {"law": 0.02, "reviews": 0.54, "": 0.1}}
    told = {**change, "routed": {**change["routed"], **leaks}}
    table = certificate_table({**certificate, "old": [told], "new": None})
    assert "Tokens by domain, core: reviews 54.0, – 10.0, law 2.0." in table.note
    taken = certificate_table(
        {**certificate, "old": [], "new": None, "beside": ["law", "bank"], "taken": {"from": "d"}}
    )
    assert "Measured in the copy that it was taken from, beside law, bank." in taken.note
