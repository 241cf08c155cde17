"""An index of the small corpus, made with a stub encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_corpus import rows
from stub_encoder import StubEncoder

from ragmoe.index import BuildOptions, Manifest, build_index


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture
def build(tmp_path: Path, corpus: Path) -> Callable[..., Manifest]:
    """Builds ``tmp_path / "index"`` of the corpus with a stub encoder; options may be changed."""

    def run(**options: Any) -> Manifest:
        given = {"sources": (str(corpus),), "out": tmp_path / "index", "encoder": StubEncoder(), **options}
        return build_index(BuildOptions(**given))

    return run


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    build_index(BuildOptions((str(source),), folder / "index", encoder=StubEncoder()))
    return folder / "index"


@pytest.fixture
def folder(_built: Path, tmp_path: Path) -> Path:
    """An index folder of the test's own, to be damaged at will."""
    return Path(shutil.copytree(_built, tmp_path / "own-index"))
