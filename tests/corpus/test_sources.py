"""Sources: which files a folder, a glob and several of them together give, and the names of what has no id."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragmoe import DataError
from ragmoe.corpus import read_passages


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder we stand in, with ``docs/index.md``, ``docs/fees/index.md``, ``docs/logo.png`` and ``wiki/index.md``."""
    for name in ("docs/index.md", "docs/fees/index.md", "wiki/index.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"What stands in {name}.")
    (tmp_path / "docs" / "logo.png").write_bytes(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids(*sources: str) -> list[str]:
    return [passage.id for passage in read_passages(list(sources))]


def test_names_are_paths_within_the_folder_or_after_the_fixed_part_of_a_pattern(docs: Path) -> None:
    assert ids("docs") == ids("docs/**/*.md") == ids(str(docs / "docs")) == ["fees/index.md", "index.md"]
    assert ids("*/index.md") == ["docs/index.md", "wiki/index.md"]


def test_files_of_the_same_name_are_told_apart_by_their_folders(docs: Path) -> None:
    expected = ["fees/index.md", "docs/index.md", "wiki/index.md"]
    assert ids("docs", "wiki") == ids(str(docs / "docs"), "../" + docs.name + "/wiki") == expected


def test_a_file_named_by_several_sources_is_read_once(docs: Path) -> None:
    assert ids("docs", "docs/index.md", "docs/*", "./docs") == ["fees/index.md", "index.md"]


def test_patterns_pass_over_what_cannot_be_read(docs: Path) -> None:
    assert ids("docs/**/*") == ["fees/index.md", "index.md"]
    with pytest.raises(DataError, match=r"docs/\*\.png: 1 matches, none of a known format \(csv htm html jsonl"):
        ids("docs/*.png")
    with pytest.raises(DataError, match=r"source docs/logo\.png: the format '\.png' is unknown; known are: csv htm"):
        ids("docs/logo.png")
    (docs / "LICENSE").write_text("?")
    with pytest.raises(DataError, match="source LICENSE: the format of a name without a suffix is unknown"):
        ids("LICENSE")


def test_hidden_files_and_an_index_inside_a_folder_are_left_out(docs: Path) -> None:
    for name in ("docs/.git/notes.txt", "docs/.draft.md", "docs/built/passages-1.parquet", "docs/built/manifest.json"):
        (docs / name).parent.mkdir(exist_ok=True)
        (docs / name).write_text("not for the index")
    assert ids("docs") == ["fees/index.md", "index.md"]


def test_a_file_that_may_not_be_read_is_named(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"^wiki/index\.md cannot be read: Permission denied$"):
        ids("wiki")


def test_an_index_in_the_folder_is_left_out_with_its_card(docs: Path) -> None:
    for name in ("manifest.json", "passages-1.parquet", "README.md", "memory/notes.md"):
        (docs / "docs/index" / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / "docs/index" / name).write_text("{}")
    assert ids("docs") == ["fees/index.md", "index.md"]
    (docs / "docs/index/passages-1.parquet").unlink()
    assert "index/README.md" in ids("docs")


def test_an_index_is_left_out_of_what_a_pattern_matches(docs: Path) -> None:
    for name in ("manifest.json", "passages-1.parquet", "README.md", "memory/notes.md"):
        (docs / "docs/index" / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / "docs/index" / name).write_text("{}")
    assert ids("docs/**/*.md") == ids("docs/**/*") == ids("docs/*") == ["fees/index.md", "index.md"]
    with pytest.raises(DataError, match=r"index/\*\.parquet: 1 matches, none of a known format .* outside an index"):
        ids("docs/index/*.parquet")
    (docs / "docs/index/manifest.json").rename(docs / "docs/index/build.lock")
    assert ids("docs") == ids("docs/**/*") == ["fees/index.md", "index.md"]


def test_a_document_called_corpus_hides_nothing(docs: Path) -> None:
    (docs / "docs" / "corpus.md").write_text("What a corpus is.")
    assert ids("docs") == ["corpus.md", "fees/index.md", "index.md"]
    (docs / "docs" / "corpus.csv").write_text("id,text\na,A record.\n")
    assert ids("docs") == ["a", "corpus.md", "fees/index.md"]


def test_linked_folders_are_read_once(docs: Path) -> None:
    (docs / "docs" / "a-wiki").symlink_to(docs / "wiki")
    assert ids("docs") == ids("docs/**/*") == ["a-wiki/index.md", "fees/index.md", "index.md"]
    # What is there anyway keeps its name, and nothing is read that lies around the source.
    for name, to in {"a-fees": "fees", "loop": ".", "fees/up": "../..", "fees/wiki": "../../wiki"}.items():
        (docs / "docs" / name).symlink_to(to)
    assert ids("docs") == ["a-wiki/index.md", "fees/index.md", "index.md"]
    (docs / "link").symlink_to("docs")
    assert ids("link") == ids("docs")
