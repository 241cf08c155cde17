"""``ragmoe losses``: the routing losses that a configuration can name."""

from __future__ import annotations

import typer

from ragmoe.cli._output import JsonOption, print_json, print_tables

app = typer.Typer(help="Show what a gate can be trained by.", no_args_is_help=True)


@app.callback()
def _losses() -> None:
    """The losses of a routing, which are added to the answers' loss, each with its weight."""


@app.command()
def ls(as_json: JsonOption = False) -> None:
    """List the routing losses: which key of a configuration sets their weight, and when to use them."""
    from ragmoe.evaluation.tables import Table
    from ragmoe.models.config import OWN_WEIGHTS
    from ragmoe.moe import loss_names, routing_loss

    rows = []
    for name in loss_names():
        loss = routing_loss(name)
        key = f"model.{OWN_WEIGHTS.get(name, f'losses.{name}')}"
        mean_of = "tokens" if loss.per_token else "batch"
        rows.append({"loss": name, "key": key, "of": mean_of, "use": loss.summary, "source": loss.source})
    if as_json:
        print_json(rows)
        return
    note = (
        "A loss of tokens is their mean, however a step is cut into micro-batches; one of the batch judges each "
        "micro-batch by itself, or with train.loss_scope=global the step."
    )
    cells = [list(row.values()) for row in rows]
    print_tables([Table("Routing losses", ["loss", "weight", "of", "when to use it", "source"], cells, note, labels=5)])
