"""The documents that a new expert is for: those of the sources, by what they say and not by what they are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stub_encoder import StubEncoder

from ragmoe import DataError, Index
from ragmoe.index import BuildOptions, build_index, plan_add, plan_merge
from ragmoe.training.config import NewExpertConfig
from ragmoe.training.documents import find_documents


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ours, with two pages of one name in it, and one that only its folder has."""
    for name in ("index.md", "fees.md", "new/index.md", "new/rates.md"):
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(f"All that {name.replace('/', ' ')} says stands here.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(out: str, *sources: str, **options: int) -> Index:
    build_index(BuildOptions(sources, Path(out), encoder=StubEncoder(), **options))  # type: ignore[arg-type]
    return Index.open(out)


def new(index: Index, *sources: str) -> list[str]:
    """The passages that an expert for some sources is for."""
    config = NewExpertConfig(name="new", corpus=list(sources), unseen=[], others=[])
    return sorted(document.passage_id for document in find_documents(config, index, [], []).new)


def write(name: str, *texts: str, first: int) -> str:
    rows = [{"id": f"n{number}", "text": text} for number, text in enumerate(texts, start=first)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_a_page_is_not_taken_for_another_of_its_name(docs: Path) -> None:
    index = build("idx", "docs")
    assert new(index, "docs/new") == ["new/index.md", "new/rates.md"]
    assert new(index, "docs/index.md") == ["index.md"]
    (docs / "docs/new/index.md").write_text("Another text by now.")
    with pytest.raises(DataError, match=r"1 of 2 .* are not in idx, for example 'index\.md', whose name is that of an"):
        new(index, "docs/new")
    # What one page begins with is not all that it says.
    (docs / "docs/new/index.md").write_text((docs / "docs/index.md").read_text() + "And more.")
    with pytest.raises(DataError, match="whose name is that of another text there"):
        new(index, "docs/new")


def test_texts_that_were_added_under_other_ids_are_found(docs: Path) -> None:
    long = " ".join(f"word{number}." for number in range(50))
    old = write("old.jsonl", "First of all.", "Second to it.", "The third.", first=0)
    build("idx", old, chunk_words=20, chunk_overlap=4)
    (docs / "a.txt").write_text(long)
    for source in ("a.txt", "more.jsonl"):
        write("more.jsonl", "The third.", "A fourth.", first=3)
        plan = plan_add("idx", [source], encoder=StubEncoder())
        plan.run()
    index = Index.open("idx")
    assert new(index, "more.jsonl") == ["n2", "n4"]
    (docs / "a.txt").rename(docs / "docs" / "a.txt")
    assert new(index, str(docs / "*" / "a.txt")) == ["a.txt#1", "a.txt#2", "a.txt#3"]


def test_documents_are_found_however_they_were_cut(docs: Path) -> None:
    (docs / "a.txt").write_text(" ".join(f"word{number}." for number in range(50)) + "\n")
    build("coarse", "docs", chunk_words=20, chunk_overlap=4)
    build("fine", "a.txt", chunk_words=8, chunk_overlap=2)
    plan_merge("coarse", "fine", "both").run()
    assert len(new(Index.open("both"), "a.txt")) == 8
