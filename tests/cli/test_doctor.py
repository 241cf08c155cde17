"""`ragmoe doctor` runs its checks for real, and a failed or broken check shows in words and in the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ragmoe.cli import _checks
from ragmoe.cli._checks import FAIL, OK, WARN, Check
from ragmoe.cli.main import main


@pytest.mark.slow
def test_all_checks_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in answer["checks"]}
    assert (code, answer["ok"]) == (0, True), [check for check in answer["checks"] if check["status"] == FAIL]
    assert checks.keys() >= {"python", "torch", "faiss-cpu", "cpu", "bf16", "threads", "gpu", "memory", "disk"}
    assert "search and matrix product agree" in checks["torch then faiss"]["found"]
    assert "cosine of two sentences 0.56" in checks["offline model"]["found"]
    assert "times fp32" in checks["bf16"]["found"]
    assert all(check["advice"] for check in answer["checks"] if check["status"] != OK)


def test_lines_for_people_and_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fine() -> Iterator[Check]:
        yield Check("sky", OK, "blue")
        yield Check("wind", WARN, "strong", "Hold your hat.")

    def broken() -> Iterator[Check]:
        raise OSError("no ground")
        yield

    monkeypatch.setattr(_checks, "CHECKS", {"air": fine, "ground": broken})
    assert main(["doctor"]) == 1
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["ok", "sky", "blue"]
    assert lines[1] == ["warn", "wind", "strong"]
    assert " ".join(lines[2]) == "Hold your hat."
    assert lines[3] == ["fail", "ground", "OSError: no ground"]
    assert lines[-1] == ["failed:", "ground"]


def test_warnings_do_not_fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "CHECKS", {"air": lambda: iter([Check("wind", WARN, "strong", "Hold your hat.")])})
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import os\nos.abort()", "crashes with signal 6"),
        ("raise ImportError('libgomp is missing')", "ImportError: libgomp is missing"),
        ("import time\ntime.sleep(60)", "hangs: no answer within 1 s"),
        ("""print('{{"same": 0.5, "torch": 1, "faiss": 1}}')""", "finds 50% of what the matrix product finds"),
    ],
)
def test_torch_and_faiss_that_do_not_live_together(monkeypatch: pytest.MonkeyPatch, program: str, problem: str) -> None:
    monkeypatch.setattr(_checks, "_TOGETHER", program)
    # On a busy machine a child needs more than a second to start: only the one that hangs is cut short.
    monkeypatch.setattr(_checks, "_CHILD_SECONDS", 1 if "sleep" in program else 60)
    torch_first, faiss_first = _checks.torch_and_faiss()
    assert problem in torch_first.found
    assert (torch_first.status, faiss_first.status) == (FAIL, WARN)


def test_versions_are_held_against_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.10.0", "transformers": "5.23.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise _checks.metadata.PackageNotFoundError(name)
        return installed[name]

    asked = ["torch<2.14,>=2.11", "transformers>=5.23", "ruff>=0.12; extra == 'dev'"]
    monkeypatch.setattr(_checks.metadata, "version", version)
    monkeypatch.setattr(_checks.metadata, "requires", lambda name: asked)
    found = {check.name: check for check in _checks.versions()}
    assert (found["torch"].status, found["torch"].advice) == (WARN, "pip install 'torch<2.14,>=2.11'")
    assert found["transformers"].status == OK
    assert (found["pyarrow"].status, found["pyarrow"].found) == (FAIL, "not installed")


def test_a_damaged_encoder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")

    class Wrong:
        def encode(self, texts: list[str]) -> object:
            return numpy.eye(2, 384, dtype="float32")

    monkeypatch.setattr("ragmoe.index.load_encoder", lambda name: Wrong())
    (check,) = _checks.offline_model()
    assert check.status == FAIL
    assert "cosine of two sentences 0.0000; expected 384, 1 and 0.5639" in check.found
    assert "--force-reinstall" in check.advice


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    (check,) = _checks.threads()
    assert (check.status, "OMP_NUM_THREADS=" in check.advice) == (WARN, True)


def test_little_room_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "free_memory", lambda: 10**9)
    monkeypatch.setattr(_checks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e9})())
    assert [check.status for check in _checks.room()] == [WARN, WARN]
