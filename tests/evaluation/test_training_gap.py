from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.training_gap import training_gap


def curve(*losses: float) -> list[tuple[int, float]]:
    return [(10 * (at + 1), loss) for at, loss in enumerate(losses)]


def test_the_gap_is_the_perplexitys_by_parts_of_the_training() -> None:
    dense = [curve(4.0, 3.0, 2.5, 2.0, 1.9, 1.8, 1.7, 1.6), curve(*[2.0] * 8)]
    ahead = [curve(4.0, 3.0, 2.4, 1.9, 1.7, 1.6, 1.4, 1.3), curve(*[2.0] * 4, *[1.9] * 4)]
    table = training_gap({"dense": dense, "token": ahead}, "dense")
    assert table is not None and table.columns == ["arm", "to step 20", "to step 40", "to step 60", "to step 80"]
    (row,) = table.rows
    # To step 40: -.1 twice in the one seed, nothing in the other; to step 60: -.2 and -.1; to step 80: -.3 and -.1.
    for cell, nats in zip(row[1:], (0.0, -0.05, -0.15, -0.2), strict=True):
        assert float(cell) == pytest.approx(100 * math.expm1(nats), abs=0.006)


def test_only_trainings_of_the_same_steps_are_compared() -> None:
    whole = curve(3.0, 2.0, 1.0, 1.0)
    table = training_gap(
        {"dense": [whole], "token": [whole[:2]], "started": [curve(*[1.0] * 9)], "oracle": [[]]}, "dense"
    )
    assert table is None
    table = training_gap({"dense": [whole], "token": [whole[:2]], "oracle": [whole]}, "dense")
    assert table is not None and [row[0] for row in table.rows] == ["oracle"]
    # The arm to compare with is not trained, or not there at all.
    assert training_gap({"token": [whole]}, "dense") is None
    assert training_gap({"dense": [[]], "token": [whole]}, "dense") is None


@pytest.mark.parametrize(
    ("record", "loss"),
    [
        ({"step": 5, "loss": 3.0, "answer_loss": 2.0}, 2.0),
        ({"step": 5, "loss": 3.0, "language_loss": 2.5, "balance_loss": 1.0}, 2.5),
        ({"step": 5, "loss": 3.0}, 3.0),
        ({"loss": 3.0}, None),
    ],
)
def test_losses_of_the_routing_are_left_out(tmp_path: Path, record: dict[str, Any], loss: float | None) -> None:
    folder = ExperimentFolder(SimpleNamespace(), tmp_path)  # type: ignore[arg-type]
    folder.bundle("a", 0).mkdir(parents=True)
    (folder.bundle("a", 0) / "history.jsonl").write_text(json.dumps(record) + "\n{torn")
    assert folder.losses("a", 0) == ([] if loss is None else [(5, loss)])
