"""The pictures: which are drawn, that their bytes are the same each time, and that they stay small."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ragmoe.evaluation import evaluate
from ragmoe.evaluation.figures import differences, load, neighbours, scores
from ragmoe.evaluation.loss_figure import losses, smoothed
from ragmoe.evaluation.plots import draw
from ragmoe.evaluation.results import Results

CURVE = [(step, 5.0 / step) for step in range(1, 41)]


@pytest.fixture
def runs(
    make_reader: Callable[..., Any], make_task: Callable[..., Path], index: Any
) -> dict[str, dict[str, list[Results]]]:
    task = make_task(perturbations=["null", "shuffled"])
    dense = make_reader(gate_sees_neighbours=False, sparse_layers=())
    found = {
        "dense": [evaluate(dense, task, index)],
        "retrieval": [evaluate(make_reader(), task, index), evaluate(make_reader(answers={}), task, index)],
    }
    return {arm: {"small": of_arm} for arm, of_arm in found.items()}


def arms(runs: dict[str, dict[str, list[Results]]]) -> dict[str, list[Results]]:
    return {arm: of_arm["small"] for arm, of_arm in runs.items()}


def chunks(content: bytes) -> list[bytes]:
    """The kinds of a PNG file's parts."""
    kinds, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kinds.append(content[at + 4 : at + 8])
        at += 12 + length
    return kinds


def test_the_same_results_give_the_same_bytes(runs: Any, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        drawn = draw(runs, {arm: [CURVE, CURVE] for arm in runs}, "dense", tmp_path / folder)
    assert [picture.file.name for picture in drawn] == [
        *("macro_f1.png", "differences.png", "load.png", "neighbours.png", "loss.png")
    ]
    for picture in drawn:
        content = picture.file.read_bytes()
        assert content == (tmp_path / "a" / picture.file.name).read_bytes()
        assert set(chunks(content)) == {b"IHDR", b"PLTE", b"IDAT", b"IEND"}


@pytest.mark.slow
def test_pictures_of_many_arms_stay_small(runs: Any, tmp_path: Path) -> None:
    many = {f"arm_number_{i}": runs["retrieval"] for i in range(13)} | {"dense": runs["dense"]}
    drawn = draw(many, {arm: [CURVE] for arm in many}, "dense", tmp_path)
    assert max(picture.file.stat().st_size for picture in drawn) < 200_000


def test_scores_show_mean_interval_and_seeds_from_the_best_down(runs: Any) -> None:
    drawn = scores({"small": arms(runs)})
    assert drawn is not None
    (axes,) = drawn.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["retrieval", "dense"]
    means = [line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 7]
    assert means == pytest.approx([37.5, 75.0])
    seeds = [list(line.get_xdata()) for line in axes.lines if line.get_markersize() == 3]
    assert seeds == [pytest.approx([75.0, 0.0])]
    assert axes.get_xlabel() == "macro F1 (points)"
    assert "the 2 seeds" in drawn.caption and "the dense arm" in drawn.caption


def test_of_many_documents_what_is_beside_zero_is_bold(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragmoe.evaluation.figures.FEW", 1)
    drawn = differences(arms(runs), "dense")
    assert drawn is not None
    assert "bold" in {text.get_fontweight() for text in drawn.figure.axes[0].texts[1:]}


def test_differences_to_the_baseline_by_domain(runs: Any) -> None:
    drawn = differences(arms(runs), "dense")
    assert drawn is not None
    axes = drawn.figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["macro", "rivers", "coins"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["retrieval"]
    first = axes.texts[0]
    assert first.get_text().startswith("−37.5\n[−") and first.get_fontweight() == "bold"
    # A domain of one or two documents has an interval beside zero by little more than chance.
    assert {text.get_fontweight() for text in axes.texts[1:]} == {"normal"}
    assert "too narrow where a domain has fewer than 10 documents: rivers 2, coins 1." in drawn.caption
    # The floor would take all the colours.
    with_floor = differences({**arms(runs), "untrained": runs["retrieval"]["small"]}, "dense")
    assert with_floor is not None and len(with_floor.figure.axes[0].get_yticklabels()) == 1
    assert differences(arms(runs), "token") is None
    assert differences({"dense": runs["dense"]["small"]}, "dense") is None


def test_load_is_drawn_for_arms_with_several_experts(runs: Any) -> None:
    drawn = load(arms(runs))
    assert drawn is not None
    panels = [axes for axes in drawn.figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["retrieval, layer 1", "retrieval, layer 3"]
    shares_DE = panels[0].images[0].get_array()
    assert shares_DE is not None and shares_DE.shape == (2, 4)
    assert list(shares_DE.sum(axis=1)) == pytest.approx([100.0, 100.0])
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["rivers", "coins"]
    assert load({"dense": runs["dense"]["small"]}) is None


def test_other_neighbours_have_a_mark_each(runs: Any) -> None:
    drawn = neighbours({"small": arms(runs)})
    assert drawn is not None
    found = {line.get_label(): list(line.get_ydata()) for line in drawn.figure.axes[0].lines}
    # The dense arm (row 1) sees none: it has its own mark alone.
    assert found == {"the question's own": [0, 1], "none": [0], "another question's": [0], "another domain's": []}
    assert neighbours({"small": {"dense": runs["dense"]["small"]}}) is None


def test_losses_are_means_over_the_steps_that_all_seeds_reached() -> None:
    drawn = losses({"a": [[(1, 2.0), (2, 2.0), (3, 9.0)], [(1, 4.0), (2, 2.0)], []], "b": [[]]})
    assert drawn is not None
    (line,) = drawn.figure.axes[0].lines
    assert (line.get_label(), list(line.get_xdata()), list(line.get_ydata())) == ("a", [1, 2], [3.0, 2.0])
    assert drawn.figure.axes[0].get_ylabel() == "training loss of the answers (nats)"
    assert losses({"a": [[]]}) is None


def test_what_is_learned_from_other_material_is_told() -> None:
    curves = {arm: [CURVE] for arm in ("a", "replay", "never")}
    drawn = losses({**curves, "never": [[]]}, ["replay", "never"])
    assert drawn is not None
    assert drawn.caption.endswith("Not to be compared with the others: replay, which learned from other material.")
    assert drawn.caption.startswith("Smoothed by")
    plain = losses({"a": [CURVE, CURVE]})
    assert plain is not None and plain.caption.startswith("Mean over the seeds, smoothed by")
    assert "other material" not in plain.caption


def test_smoothing_by_hand() -> None:
    # Fifteen points have a memory of three: half of what was, half of what is new.
    assert smoothed([(i, float(i)) for i in range(15)])[:3] == [(0, 0.0), (1, 0.5), (2, 1.25)]
    assert smoothed([(0, 4.0), (1, 2.0)]) == [(0, 4.0), (1, 2.0)]
    assert smoothed([]) == []


def test_nothing_finished_draws_the_losses_alone(tmp_path: Path) -> None:
    assert [picture.title for picture in draw({}, {"dense": [CURVE]}, "dense", tmp_path)] == ["Training loss"]
    assert draw({}, {}, "dense", tmp_path) == []
