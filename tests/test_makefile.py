"""`make` finds a Python that works, installs once, and recovers from an installation that was interrupted."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

TESTS = "pytest -n auto --maxprocesses 4"

# Stands for an interpreter, and for the one inside the environment that it makes; writes down what it is asked to do.
PYTHON = """#!/bin/sh
case "$*" in
  --version) echo "Python 3.12.1" ;;
  "-m venv"*) rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo made >> log ;;
  "-m pip install"*) echo "install $7" >> log; test ! -e broken-index ;;
  "-m pytest"*) shift 2; echo "pytest $*" >> log ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile and, on its PATH, python3.13 that does not run and python3.12 that does."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "rm", "touch", "mkdir", "cp", "echo", "test"):
        (tools / name).symlink_to(str(shutil.which(name)))
    script(tools / "python3.13", "#!/bin/sh\necho 'pyenv: python3.13: command not found' >&2\nexit 127\n")
    script(tools / "python3.12", PYTHON)
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(clone / "tools")}
    return subprocess.run(
        [str(MAKE), *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )


def log(clone: Path) -> list[str]:
    return (clone / "log").read_text().splitlines() if (clone / "log").exists() else []


def test_the_first_python_that_runs_is_taken_and_installed_once(clone: Path) -> None:
    first = make(clone, "test")
    assert first.returncode == 0, first.stderr
    assert "Making .venv with Python 3.12.1" in first.stdout
    assert log(clone) == ["made", "install .[dev]", TESTS]
    assert make(clone, "test-all").returncode == 0
    assert log(clone)[3:] == [f"{TESTS} -m "]


def test_an_interrupted_installation_is_done_again(clone: Path) -> None:
    (clone / "broken-index").touch()
    assert make(clone, "test").returncode != 0
    assert not (clone / ".venv/.installed").exists()
    (clone / "broken-index").unlink()
    assert make(clone, "test").returncode == 0
    assert log(clone) == ["made", "install .[dev]", "install .[dev]", TESTS]


def test_an_environment_without_a_working_python_is_made_anew(clone: Path) -> None:
    assert make(clone, "test").returncode == 0
    (clone / ".venv/.installed").unlink()
    (clone / ".venv/bin/python").unlink()
    assert make(clone, "test").returncode == 0
    assert log(clone).count("made") == 2


def test_a_changed_pyproject_installs_again(clone: Path) -> None:
    assert make(clone, "test").returncode == 0
    stamp = (clone / ".venv/.installed").stat().st_mtime
    os.utime(clone / "pyproject.toml", (stamp + 10, stamp + 10))
    assert make(clone, "test").returncode == 0
    assert log(clone).count("install .[dev]") == 2


def test_no_python_is_told(clone: Path) -> None:
    (clone / "tools/python3.12").unlink()
    found = make(clone, "demo")
    assert found.returncode == 2
    assert "needs Python 3.11 or newer" in found.stderr
    assert not (clone / ".venv").exists()


def test_targets_that_are_promised_exist(clone: Path) -> None:
    for target in ("demo", "test", "test-all", "lint", "clean"):
        assert make(clone, "--dry-run", target).returncode == 0
