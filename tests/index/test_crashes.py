"""Killed at any moment, an index opens as it was or as it is to be, and the same command goes on with --resume."""

from __future__ import annotations

from pathlib import Path

import crash_driver
import pytest
from stub_encoder import StubEncoder

from ragmoe import Index
from ragmoe.index import _crash, blocks

CASES = [(command, point) for command in crash_driver.BEFORE for point in _crash.POINTS]


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("crashed")
    assert crash_driver.drive("points", store, timeout=200) == [[command, point, "9"] for command, point in CASES]
    return store


@pytest.mark.parametrize(("command", "point"), CASES)
def test_killed_at_any_point_the_index_opens_and_the_command_goes_on(
    command: str, point: str, crashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 5)
    folder = crashed / f"{command}-{point}"
    committed = _crash.POINTS.index(point) >= _crash.POINTS.index("committed")
    ids = (crash_driver.AFTER if committed else crash_driver.BEFORE)[command]
    assert Index.open(folder, encoder=StubEncoder()).passage_ids == ids
    assert crash_driver.check(crashed, command, folder) == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments(tmp_path: Path) -> None:
    ends = crash_driver.drive("random", tmp_path, 7, 50, timeout=800)
    assert len(ends) == 50 and all(words[-1] == "0" for words in ends), ends
    # All four commands were hit.
    assert {words[1] for words in ends} == set(crash_driver.BEFORE)
