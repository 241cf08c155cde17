"""``ragmoe gates ls``."""

from __future__ import annotations

import json

import pytest

from ragmoe.cli.main import main
from ragmoe.gates import gate_names, scores_names, selection_names
from ragmoe.moe.capacity import overflow_names, priority_names


def test_everything_that_can_be_named_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gates", "ls", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {setting: sorted(entries) for setting, entries in told.items()} == {
        "model.gate": gate_names(),
        "model.selection": selection_names(),
        "model.scores": scores_names(),
        "model.overflow": overflow_names(),
        "model.overflow_priority": priority_names(),
    }
    lines = [line for entries in told.values() for line in entries.values()]
    assert all(len(line) > 20 for line in lines) and len(set(lines)) == len(lines)


def test_the_tables_name_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gates", "ls"]) == 0
    told = capsys.readouterr().out
    for name in [*gate_names(), *selection_names(), "model.gate=NAME", "model.overflow=NAME"]:
        assert name in told
