"""Variables in paths mean the same in every file that users write."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragmoe import ConfigError
from ragmoe._variables import expand


def test_variables_and_home_are_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/somewhere")
    assert expand("${PLACE}/a.jsonl") == expand("$PLACE/a.jsonl") == "/somewhere/a.jsonl"
    assert expand("~/a.jsonl") == str(Path.home() / "a.jsonl")
    monkeypatch.setenv("PLACE", "~")
    assert expand("$PLACE/a.jsonl") == str(Path.home() / "a.jsonl")
    assert expand("plain/a~b.jsonl") == "plain/a~b.jsonl"


@pytest.mark.parametrize("value", [None, ""])
def test_one_that_is_not_set_makes_no_other_path(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("RAGMOE_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("RAGMOE_DATA", value)
    with pytest.raises(
        ConfigError, match=r"^here: '\$RAGMOE_DATA/q' needs the environment variable RAGMOE_DATA"
    ) as caught:
        expand("$RAGMOE_DATA/q", "here", given="--data FOLDER")
    assert caught.value.hint == "export RAGMOE_DATA=FOLDER, or give --data FOLDER"
