"""``ragmoe gates``: what a configuration can choose from, by name."""

from __future__ import annotations

import typer

from ragmoe.cli._output import JsonOption, print_json, print_tables

app = typer.Typer(help="List gates, selections and what else routes.", no_args_is_help=True)


@app.callback()
def _gates() -> None:
    """Gates, selections, scores and limits of capacity that a configuration can name."""


@app.command()
def ls(as_json: JsonOption = False) -> None:
    """List everything that a configuration can name, with one line on when to use it."""
    from ragmoe.evaluation.tables import Table
    from ragmoe.gates.catalogue import catalogue

    parts = catalogue()
    if as_json:
        print_json({part.setting: part.entries for part in parts})
        return
    tables = [
        Table(
            part.title,
            ["name", "when to use it"],
            [[name, summary] for name, summary in part.entries.items()],
            note=f"Set with {part.setting}=NAME.",
            labels=2,
        )
        for part in parts
    ]
    print_tables(tables)
