"""Every command and every line of Python in the README runs, in its order, in a copy of the repository."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes the quick version quick: fewer steps and fewer questions, nothing else.
QUICKER = {"train.steps=40": "train.steps=2", "--out runs/halvern-eval": "--out runs/halvern-eval --limit 3"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("console") for line in block.splitlines() if line.startswith("ragmoe ")]


def quicker(command: str) -> str:
    for slow, fast in QUICKER.items():
        command = command.replace(slow, fast)
    return command


def test_the_tree_is_true() -> None:
    tree = README.partition("## What is where\n\n```\n")[2].partition("```")[0]
    assert tree
    for line in tree.splitlines():
        at = "ragmoe" if line.startswith((" ", "ragmoe/")) else ""
        name = line.removeprefix("ragmoe/").split()[0]
        assert (ROOT / at / name).is_dir(), line
    inside = {path.name for path in (ROOT / "ragmoe").iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert all(f" {name}/" in tree for name in inside)


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^(make [a-z-]+)|`(make [a-z-]+)`", README, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    for target in {one or other for one, other in targets}:
        assert re.search(rf"^{target.split()[1]}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", ["README.md", "eval/results/README.md", "data/README.md", "ragmoe/starter/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    """To files that are there, and to headings of theirs."""
    place = ROOT / page
    for target in re.findall(r"\]\(<?([^)>]+)>?\)", place.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        found = (place.parent / path) if path else place
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for words in headings}, target


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("data", "eval", "indexes"):
        skip = shutil.ignore_patterns("results", "bench") if name == "eval" else shutil.ignore_patterns("core7", "demo")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    return tmp_path


def run_tour(clone: Path, commands: list[str]) -> None:
    program = f"{shlex.quote(sys.executable)} -m ragmoe "
    for command in commands:
        line = program + command.removeprefix("ragmoe ")
        done = subprocess.run(line, shell=True, cwd=clone, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), command
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr, f"{command}\n{done.stderr}"
    script = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", script], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command: str) -> None:
    """Its verbs, arguments and options exist, and so do the files it names that the repository holds."""
    import typer

    from ragmoe.cli.main import app

    words = shlex.split(command)[1:]
    found, context = typer.main.get_command(app), None
    while hasattr(found, "get_command"):
        context = found.make_context(words[0], words, parent=context, resilient_parsing=True)
        found, words = found.get_command(context, words[0]), words[1:]
        assert found is not None, command
    found.make_context(command, list(words), parent=context)
    for word in words:
        if word.startswith(("eval/", "indexes/", "data/")) and word != "indexes/demo":
            assert list(ROOT.glob(word)), word


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tour_runs(clone: Path) -> None:
    """Doctor is left out here: it measures the machine for some seconds, and has its own tests."""
    run_tour(clone, [quicker(command) for command in commands() if command != "ragmoe doctor"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tour_runs_word_for_word(clone: Path) -> None:
    run_tour(clone, commands())
