"""Three passages, indexed by a stub encoder."""

from __future__ import annotations

import json

import pytest
from stub_encoder import StubEncoder

from ragmoe import Index
from ragmoe.index import BuildOptions, build_index

TEXTS = {"quay": "The keeper of the quay is Anna.", "lock": "Bert opens the lock at nine.", "map": "A map of the city."}


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("small")
    rows = [{"id": name, "text": text, "domain": "port"} for name, text in TEXTS.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(BuildOptions((str(folder / "corpus.jsonl"),), folder / "index", encoder=StubEncoder()))
    return Index.open(folder / "index", encoder=StubEncoder())
