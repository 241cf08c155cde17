"""``ragmoe index annotate``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

NAMES = ["rivers", "coins", "a", "b"]


@pytest.fixture
def city(small_city: Path, tmp_path: Path) -> Path:
    """A copy of the index, which the command writes beside."""
    shutil.copytree(small_city / "index", tmp_path / "index")
    return tmp_path


def test_routing_is_recorded_and_used(ragmoe: Any, small_city: Path, city: Path, make_bundle: Any) -> None:
    from ragmoe import Index
    from ragmoe.models import load

    bundle = make_bundle("memory", gate="memory", sparse_layers=[0, 1], expert_names=NAMES)
    words = ("index", "annotate", city / "index", "--model", bundle, "--questions", small_city / "questions.jsonl")
    index, model = Index.open(city / "index"), load(bundle)
    before = model.memory(index)
    assert not before.bundle and before.votes([index.row("bridge")])[0].tolist() == [[1, 0, 0, 0]] * 2
    code, out, _ = ragmoe(*words, "--json")
    found = json.loads(out)
    assert code == 0 and (found["passages"], found["recorded"], found["by_domain"]) == (6, 4, 2)
    assert (found["questions"], found["used"]) == (4, 4)
    after = load(bundle).memory(index)
    assert after.bundle == found["bundle"] and Path(found["memory"]).is_file()
    votes_LE = after.votes([index.row("bridge")])[0]
    assert votes_LE.sum(axis=1).tolist() == pytest.approx([1.0, 1.0], abs=2e-3)
    # Two experts are chosen for each token, so no one has all of a passage.
    assert votes_LE.max() <= 0.5 + 1e-3
    assert after.votes([index.row("ferry")])[0].tolist() == [[1, 0, 0, 0]] * 2
    code, out, _ = ragmoe(*words)
    assert code == 0 and out.startswith("4 of 6 passages speak for the experts that served them, 2 for their domain's")


def test_an_index_that_changes_meanwhile_is_refused_before_anything_is_routed(
    ragmoe: Any, small_city: Path, city: Path, make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe import Index, IndexFolderError
    from ragmoe.evaluation import annotate
    from ragmoe.index.target import locked
    from ragmoe.models import load
    from ragmoe.training.data import load_questions

    folder, bundle = city / "index", make_bundle("memory", gate="memory", sparse_layers=[0, 1], expert_names=NAMES)
    model, index = load(bundle), Index.open(folder)
    questions = load_questions([str(small_city / "questions.jsonl")])
    monkeypatch.setattr(model, "read", None)
    with locked(folder):
        done = ragmoe("index", "annotate", folder, "--model", bundle, "--questions", small_city / "questions.jsonl")
    assert done[0] == 1 and "is locked: another process is writing to it\nhint: wait" in done[2]
    assert ragmoe("index", "remove", folder, "--domain", "coins")[0] == 0
    with pytest.raises(IndexFolderError, match="was changed meanwhile"):
        annotate.annotate(model, index, questions)
    assert not (folder / "memory").exists()


def test_what_was_recorded_counts_at_once_and_is_of_the_whole_bundle(
    small_city: Path, city: Path, make_bundle: Any
) -> None:
    from ragmoe import Index, ModelError
    from ragmoe.evaluation.annotate import annotate
    from ragmoe.models import load
    from ragmoe.training.data import load_questions

    bundle = make_bundle("memory", gate="memory", sparse_layers=[0, 1], expert_names=NAMES)
    model, index = load(bundle), Index.open(city / "index")
    questions = load_questions([str(small_city / "questions.jsonl")])
    before = model.memory(index).digest
    recorded = annotate(model, index, questions).digest
    assert model.memory(index).digest == load(bundle).memory(index).digest == recorded != before
    with pytest.raises(ModelError, match=f"was opened without {NAMES[1]}"):
        annotate(load(bundle, experts=[NAMES[0], *NAMES[2:]]), index, questions)
    model.hold_back([NAMES[0]])
    with pytest.raises(ModelError, match="some experts are held back"):
        annotate(model, index, questions)


def test_a_look_takes_some_questions_of_each_domain(
    ragmoe: Any, small_city: Path, city: Path, make_bundle: Any, tmp_path: Path
) -> None:
    bundle = make_bundle("memory", gate="memory", sparse_layers=[0, 1], expert_names=NAMES)
    more = tmp_path / "more.jsonl"
    elsewhere = {"id": "x", "question": "what?", "answers": ["a"], "gold_ids": ["gone"], "domain": "coins"}
    more.write_text((small_city / "questions.jsonl").read_text() + json.dumps(elsewhere) + "\n")
    words = ("index", "annotate", city / "index", "--model", bundle, "--questions", more, "--limit", 1)
    code, out, _ = ragmoe(*words)
    assert code == 0 and out.startswith("2 of 6 passages speak for the experts that served them")
    assert "used: 2 of 5 questions; 1 have no gold passage in this index\n" in out
    found = json.loads(ragmoe(*words, "--json")[1])
    assert (found["questions"], found["used"], found["recorded"]) == (5, 2, 2)


def test_a_gate_without_memory_is_told_so(ragmoe: Any, small_city: Path, city: Path, make_bundle: Any) -> None:
    bundle = make_bundle("retrieval", gate="retrieval", sparse_layers=[0, 1])
    words = ("index", "annotate", city / "index", "--model", bundle, "--questions", small_city / "questions.jsonl")
    code, _, err = ragmoe(*words)
    assert code == 0 and "the retrieval gate has no memory and does not use it" in err


def test_errors(ragmoe: Any, small_city: Path, city: Path, make_bundle: Any, tmp_path: Path) -> None:
    dense = make_bundle("dense", sparse_layers=[])
    asked = small_city / "questions.jsonl"
    code, _, err = ragmoe("index", "annotate", city / "index", "--model", dense, "--questions", asked)
    assert code == 1 and "the model is dense" in err
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "x", "question": "what?", "answers": ["a"], "gold_ids": ["gone"]}) + "\n")
    bundle = make_bundle("retrieval", gate="retrieval", sparse_layers=[0, 1])
    code, _, err = ragmoe("index", "annotate", city / "index", "--model", bundle, "--questions", other)
    assert code == 1 and "none of the 1 questions has a gold passage" in err
    code, _, err = ragmoe("index", "annotate", city / "index", "--model", bundle, "--questions", tmp_path / "no.jsonl")
    assert code == 1 and "no question file matches" in err
    code, _, err = ragmoe("index", "annotate", city / "index", "--model", bundle)
    assert code == 2 and "--questions" in err
    assert not (city / "index" / "memory").exists()
