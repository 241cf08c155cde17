"""The program as a whole: help without heavy imports, exit codes, and errors in words."""

from __future__ import annotations

import errno
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from ragmoe import BundleError, UsageError, __version__
from ragmoe.cli import main as program
from ragmoe.cli.main import main

HEAVY = {"torch", "faiss", "transformers", "datasets", "pyarrow", "numpy", "pandas", "sentence_transformers", "scipy"}
COMMANDS = [
    "index", "bundle", "data", "eval", "experts", "gates", "losses", "init", "train", "ask", "route", "plan",
    "doctor", "demo",
]  # fmt: skip
IN_CHILD = """
import json, sys
from ragmoe.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)
"""


def run(*arguments: str) -> tuple[int, str, set[str]]:
    """Exit code, standard output and the packages imported, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", IN_CHILD, *arguments], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    return code, done.stdout, set(modules)


HELP = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code, output, modules = run(*arguments)
    assert (code, modules & HEAVY) == (0, set())
    assert output.strip()


def test_help_names_every_command_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        (line,) = [line for line in lines if line.lstrip("│ ").startswith(f"{name} ")]
        assert line.rstrip("│ ").endswith("."), line


def test_version_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "ragmoe", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ragmoe {__version__}\n"


def test_completion_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--install-completion" in capsys.readouterr().out


def examples(command: Any = None) -> list[str]:
    """The commands that the help of all commands gives as examples."""
    command = command or typer.main.get_command(program.app)
    lines = [line.strip() for line in (command.epilog or "").splitlines()]
    own = [line for line in lines if line.startswith("ragmoe ")]
    return own + [line for inner in getattr(command, "commands", {}).values() for line in examples(inner)]


@pytest.mark.parametrize("example", examples())
def test_every_example_in_the_help_is_understood(example: str) -> None:
    found, context, words = typer.main.get_command(program.app), None, shlex.split(example)[1:]
    while hasattr(found, "get_command"):
        context = found.make_context(words[0], list(words), parent=context, resilient_parsing=True)
        found, words = found.get_command(context, words[0]), words[1:]
        assert found is not None
    assert found.make_context("x", list(words), parent=context).params


def parameters(command: Any = None, name: str = "ragmoe") -> dict[str, Any]:
    """All arguments and options of all commands."""
    command = command or typer.main.get_command(program.app)
    own = {f"{name} {parameter.name}": parameter for parameter in getattr(command, "params", [])}
    inner = getattr(command, "commands", {}).items()
    return own | {key: value for word, sub in inner for key, value in parameters(sub, f"{name} {word}").items()}


def test_the_help_names_what_is_wanted_and_nothing_twice() -> None:
    found = parameters()
    assert "ragmoe eval run out" in found
    for name, parameter in found.items():
        text = getattr(parameter, "help", None) or ""
        # Rich takes square brackets for markup and would print nothing of a default in them.
        assert "[default" not in text and ".." not in text, name
        assert "..." not in (parameter.metavar or ""), name
        if parameter.type_descriptor is not None and parameter.type_descriptor.is_path:
            assert parameter.metavar and (parameter.metavar.isupper() or parameter.metavar == "FILE.yaml"), name


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            ["train"],
            ["{FILE.yaml} [KEY=VALUE]...", "paths in them count from the current folder", "[default: runs/train]"],
        ),
        (["eval", "run"], ["{TASK}...", "[default: (runs/eval/BUNDLE)]"]),
        (["eval", "compare"], ["{RUN_A} {RUN_B}", "[default: f1]"]),
        (["eval", "experiment"], ["{FILE.yaml} [KEY=VALUE]...", "[default: (runs/NAME)]", "current folder"]),
        (["eval", "report"], ["[default: (beside the Markdown)]"]),
    ],
    ids=" ".join,
)
def test_help_shows_defaults_and_examples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], shown: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"ragmoe {' '.join(words)} " in text.partition("Example")[2]
    assert [part for part in shown if part not in text] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["fly"], "No such command"), (["--loud"], "No such option"), (["doctor", "--loud"], "No such option")],
)
def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], None]:
    """Make the program a single command that raises what it is given."""

    def install(error: BaseException | None) -> None:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.command()
        def act() -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(program, "app", app)

    return install


@pytest.mark.parametrize(
    ("error", "code", "written"),
    [
        (None, 0, ""),
        (BundleError("no bundle at x", hint="ragmoe train"), 1, "error: no bundle at x\nhint: ragmoe train\n"),
        (BundleError("no bundle at x"), 1, "error: no bundle at x\n"),
        (UsageError("--k must be positive"), 2, "error: --k must be positive\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 1, "error: x/y: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: the disk: No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(3), 3, ""),
        (SystemExit("stopped"), 1, "stopped\n"),
    ],
)
def test_errors_become_words_and_exit_codes(
    capsys: pytest.CaptureFixture[str],
    command: Callable[[BaseException | None], None],
    error: BaseException | None,
    code: int,
    written: str,
) -> None:
    command(error)
    assert main([]) == code
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", written)


def test_a_fault_of_ours_shows_its_traceback(command: Callable[[BaseException | None], None]) -> None:
    command(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main([])
    command(OSError("of no file"))
    with pytest.raises(OSError, match="of no file"):
        main([])


def test_a_fault_of_ours_exits_with_1_and_a_plain_traceback() -> None:
    code = """
import sys
from ragmoe.__main__ import main
from ragmoe.cli import _checks
_checks.run_checks = None
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == "TypeError: 'NoneType' object is not callable"


def test_libraries_are_quiet_and_the_users_own_settings_win() -> None:
    code = """
import os, warnings
os.environ["TRANSFORMERS_VERBOSITY"] = "info"
from ragmoe.cli.main import main
main(["--version"])
import transformers
from transformers.utils import logging
warnings.warn_explicit("from a library", UserWarning, "f.py", 1, module="torch.nn")
warnings.warn_explicit("from us", UserWarning, "f.py", 1, module="ragmoe.index")
print(logging.get_verbosity(), logging.is_progress_bar_enabled())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "20 False"
    assert "from us" in done.stderr
    assert "from a library" not in done.stderr


def test_each_of_several_processes_says_which_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["index", "info", str(tmp_path / "none")]) != 0
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith(("rank 1: error: ", "rank 1: hint: ")) for line in lines)
