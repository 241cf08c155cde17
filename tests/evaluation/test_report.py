from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ragmoe.evaluation import Results, compare, evaluate
from ragmoe.evaluation.report import comparison_table, few_documents, report, to_markdown
from ragmoe.evaluation.tables import Table, bounds, number

MakeReader, MakeTask = Callable[..., Any], Callable[..., Path]


@pytest.fixture
def arms(make_reader: MakeReader, make_task: MakeTask, index: Any) -> dict[str, list[Any]]:
    task = make_task(perturbations=["null", "shuffled"])
    dense = make_reader(gate_sees_neighbours=False, sparse_layers=())
    return {
        "dense": [evaluate(dense, task, index)],
        "retrieval": [evaluate(make_reader(), task, index), evaluate(make_reader(answers={}), task, index)],
    }


def cells(table: Table, label: str) -> list[str]:
    return next(list(row) for row in table.rows if row[0] == label)


def test_every_report_shows_what_the_design_asks_for(arms: dict[str, list[Any]]) -> None:
    tables = {table.title: table for table in report(arms, seconds={"dense": 12.0, "retrieval": None})}
    quality = tables["small (gold): F1 / EM"]
    assert cells(quality, "rivers")[:3] == ["rivers", "3", "83.3 / 66.7"]
    # Two seeds, one with every answer wrong: half of what the other has.
    assert cells(quality, "macro") == ["macro", "4", "75.0 / 33.3", "37.5 ± 53.0 / 16.7 ± 23.6"]
    assert cells(quality, "95 % of macro F1")[2].startswith("[")
    assert cells(quality, "seeds")[2:] == ["1", "2"]
    assert cells(quality, "coverage")[2] == "100.0 %"
    assert cells(tables["Parameters and routing"], "dense") == ["dense", "1.50 M", "4.00 M", "12", "–", "–", "–"]
    assert cells(tables["Retrieval"], "mean")[1] == "4"
    assert [row[:2] for row in tables["Load per expert, %"].rows] == [["retrieval", "1"], ["retrieval", "3"]]
    assert list(tables["Load per expert, %"].columns) == ["arm", "layer", "0", "1", "2", "3"]
    other = tables["Other neighbours shown to the gate"]
    assert [row[:2] for row in other.rows] == [["dense", "sees none"], ["retrieval", "null"], ["retrieval", "shuffled"]]
    assert cells(tables["Yes/no/maybe, and no answer"], "dense")[1] == "100.0"


def test_what_limits_cost_is_shown_where_it_costs_something(
    make_reader: MakeReader, make_task: MakeTask, index: Any, tmp_path: Path
) -> None:
    limited = evaluate(make_reader(limited=True), make_task(), index, out=tmp_path)
    title = "Choices and tokens lost, %"
    tables = {table.title: table for table in report({"free": [evaluate(make_reader(), make_task(), index)]})}
    assert title not in tables
    # One token of each question's three, in both layers.
    for found in (limited, Results.load(tmp_path)):
        tables = {table.title: table for table in report({"limited": [found]})}
        assert tables[title].rows == [["limited", "1", "33.3", "33.3"], ["limited", "3", "33.3", "33.3"]]


def test_many_arms_are_rows_in_a_table_for_each_metric(arms: dict[str, list[Any]]) -> None:
    many = {f"arm{i}": arms["retrieval"] for i in range(6)}
    f1, em = report(many)[:2]
    assert (f1.title, em.title) == ("small (gold): F1", "small (gold): EM")
    assert list(f1.columns[:5]) == ["arm", "rivers", "coins", "macro", "95 % of macro F1"]
    assert [row[0] for row in f1.rows] == ["n", *many]
    assert (cells(f1, "arm0")[3], cells(em, "arm0")[3]) == ("37.5 ± 53.0", "16.7 ± 23.6")
    assert "95 % of macro EM" in em.columns


def test_figures_are_never_cut() -> None:
    table = Table("t", ["arm", *"abcdefgh"], [["a long name", *["61.2 ± 0.4"] * 8]], command="ragmoe")
    console = Console(width=table.width, record=True, file=io.StringIO())
    console.print(table.rich())
    lines = console.export_text().splitlines()
    # The label folds between its words.
    assert [line.split("6")[0].strip() for line in lines[4:7]] == ["a", "long", "name"]
    assert lines[4].count("61.2 ± 0.4") == 8
    assert table.markdown().endswith("|\n\nMade by `ragmoe`\n")


def test_errors_stand_beside_the_coverage(make_reader: MakeReader, make_task: MakeTask, index: Any) -> None:
    results = evaluate(make_reader(fails_on=lambda question: "barges" in question), make_task(), index)
    quality = report({"one": [results]})[0]
    assert cells(quality, "coverage")[2] == "75.0 %, 1 error"
    assert cells(quality, "rivers")[1] == "2 of 3"


def test_terminal_and_markdown_say_the_same(arms: dict[str, list[Any]]) -> None:
    tables = report(arms)
    text = to_markdown(tables, "Title", ["- a line"])
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables:
        console.print(table.rich())
    shown = console.export_text()
    for table in tables:
        assert f"### {table.title}" in text
        for row in table.rows:
            assert "| " + " | ".join(row) + " |" in text
            assert all(cell in shown for cell in row)
    assert text.startswith("# Title\n\n- a line\n")


def test_comparisons_with_their_spread(arms: dict[str, list[Any]]) -> None:
    runs = {name: [run.samples["real"] for run in of] for name, of in arms.items()}
    table = comparison_table([("retrieval", "dense", compare(runs["retrieval"], runs["dense"], setting="gold"))])
    assert table is not None
    row = table.rows[0]
    assert (row[0], row[1], row[3], row[5], row[6]) == ("retrieval − dense", "gold", "-37.50", "53.03 / –", "4")
    assert comparison_table([]) is None


def test_intervals_over_few_documents_are_marked(arms: dict[str, list[Any]]) -> None:
    said = "Intervals are too narrow where a domain has fewer than 10 documents: rivers 2, coins 1."
    quality = report(arms)[0]
    assert quality.note.endswith(said)
    assert said in to_markdown([quality], "Title")
    runs = {name: [run.samples["real"] for run in of] for name, of in arms.items()}
    table = comparison_table([("retrieval", "dense", compare(runs["retrieval"], runs["dense"]))])
    assert table is not None and table.note.endswith(said)
    assert few_documents({"a": 10, "b": 9}, {"a": 10, "b": 4}).endswith("10 documents: b 4.")
    assert few_documents({"a": 10}) == few_documents() == ""


def test_brackets_and_bars_are_text() -> None:
    table = Table("t", ["a"], [["[red]x[/red] | y"]])
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(table.rich())
    assert "[red]x[/red] | y" in console.export_text()
    assert "[red]x[/red] \\| y" in table.markdown()


def test_figures_as_text() -> None:
    assert (number(None), number(1.25, 2), number(1.0, sign=True)) == ("–", "1.25", "+1.0")
    assert (bounds(-1.0, 2.0, sign=True), bounds(None, 1.0)) == ("[-1.0, +2.0]", "–")
