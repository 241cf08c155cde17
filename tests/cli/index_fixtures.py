"""What the tests of ``ragmoe index`` and ``ragmoe data`` share: the program run in-process with a stub encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stub_encoder import StubEncoder

from ragmoe.__main__ import main


class Ended(NamedTuple):
    """How a run of the program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``ragmoe`` with some words; ``minilm`` is a stub, ``other`` another one."""
    from ragmoe.index import encoder

    real = encoder.load_encoder

    def load(name: Any) -> Any:
        if name in ("minilm", "stub-0"):
            return StubEncoder()
        return StubEncoder(1) if name == "other" else real(name)

    monkeypatch.setattr("ragmoe.index.build.load_encoder", load)
    monkeypatch.setattr("ragmoe.index.folder.load_encoder", load)
    monkeypatch.setattr("ragmoe.index.change.load_encoder", load)
    monkeypatch.setattr("ragmoe.index.given.load_encoder", load)

    def call(*words: object) -> Ended:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return call


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    """Write a jsonl file."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
