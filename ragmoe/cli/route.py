"""``ragmoe route``: what a question's neighbours are, and where they send its tokens.

L layers with experts, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe.cli._bundles import BundleArgument, WithoutOption
from ragmoe.cli._output import JsonOption, check_question, print_json
from ragmoe.cli._thrift import Thrift

if TYPE_CHECKING:
    from rich.console import Console

ROUTE_EXAMPLES = """Example:

  ragmoe route runs/halvern 'How long do I keep biting on the gauze?' --index indexes/demo"""
_LABEL, _CELL = 8, 6
# Passages that a language model is given at most, as ``ragmoe ask`` does.
_READ = 5


def route(
    bundle: BundleArgument,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.", show_default=False)],
    index: Annotated[
        Path, typer.Option(metavar="DIR", help="The index that gives the neighbours.", show_default=False)
    ],
    without: WithoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw which experts the gates prefer for a question, with its neighbours and without them."""
    check_question(question)
    from ragmoe.generation import Generator
    from ragmoe.index import Index

    opened, model = Index.open(index), Thrift(without=without or ()).load(bundle)
    if as_json:
        print_json(trace(model, opened, question))
    elif not model.sparse_layers and isinstance(model, Generator):
        typer.echo(
            f"{bundle} has no gate of ragmoe's: there is nothing to draw\n"
            f"ragmoe init --base {bundle} --out DIR makes a bundle of it that has some"
        )
    elif not model.sparse_layers or model.config.experts == 1:
        typer.echo(f"{bundle} sends every token through the same network: there is nothing for a gate to choose")
    else:
        draw(trace(model, opened, question))


def trace(model: Any, index: Any, question: str) -> dict[str, Any]:
    """Everything that is drawn, as JSON holds it."""
    from ragmoe.generation import Generator
    from ragmoe.neighbours import Neighbours

    model.check_index(index)
    N = getattr(model.config, "neighbours", 0)
    found = index.neighbours([question], max(N, _READ))
    neighbours = model.recall(found.first(N or _READ), index)
    if isinstance(model, Generator):
        # All in one prompt, as far as there is room for them.
        passages = list(model.prompts.make(question, index.passages(found.passage_ids[0][:_READ])).passages)
    else:
        # A reader sees them one by one: the one that it answers from.
        answer = model.answer([question], index)[0]
        passages = index.passages([answer.passage_id] if answer.passage_id else neighbours.passage_ids[0][:1])
    given_LE = model.route(question, passages, neighbours)
    bare_LE = model.route(question, passages, Neighbours.empty(1, index.width))
    shown = index.passages(neighbours.passage_ids[0])
    return {
        "question": question,
        "passages": [passage.id for passage in passages],
        "gate": getattr(model.config, "gate", None),
        "gate_sees_neighbours": model.gate_sees_neighbours,
        "retriever": index.retriever,
        "neighbours": [
            {"id": p.id, "domain": p.domain, "title": p.title, "score": float(score)}
            for p, score in zip(shown, neighbours.scores_BN[0].tolist(), strict=False)
        ],
        "layers": list(model.sparse_layers),
        "experts": list(model.expert_names),
        "expert_ids": list(getattr(model.config, "expert_ids", None) or range(len(model.expert_names))),
        "with_neighbours": given_LE.tolist(),
        "without_neighbours": bare_LE.tolist(),
        "difference": (given_LE - bare_LE).tolist(),
    }


def draw(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, ids = Console(file=sys.stdout), found["expert_ids"]
    console.print(Text(f"Neighbours (by {found['retriever']}, with their cosine)", style="bold"))
    rows = [(f"{n['score']:.3f}", n["domain"], n["id"], n["title"]) for n in found["neighbours"]]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    for _ in range(3):
        table.add_column(no_wrap=True)
    # Score, domain and id stay whole, to be copied: the title gives way to a narrow terminal.
    used = sum(2 + max((len(row[at]) for row in rows), default=0) for at in range(3))
    for *cells, title in rows:
        table.add_row(*map(Text, cells), Text(_short(title, max(8, console.width - used))))
    console.print(table, soft_wrap=True)
    named = [f"{id} {name}" for id, name in zip(ids, found["experts"], strict=True) if name != f"expert {id}"]
    if named:
        console.print(Text("\nexperts: " + ", ".join(named)))
    where = f"mean gate probability over the question and {', '.join(found['passages']) or 'no passage'}"
    if not found["gate_sees_neighbours"]:
        _heat_map(console, f"\n{where}, by layer and expert", ids, found["layers"], found["with_neighbours"])
        console.print(Text(f"the {found['gate']} gate sees no neighbours: there is nothing to compare", style="dim"))
        return
    _heat_map(console, f"\nWith the neighbours: {where}", ids, found["layers"], found["with_neighbours"])
    _heat_map(console, "\nWithout them", ids, found["layers"], found["without_neighbours"])
    _heat_map(console, "\nDifference", ids, found["layers"], found["difference"], signed=True)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _heat_map(
    console: Console,
    title: str,
    ids: Sequence[int],
    layers: Sequence[int],
    values_LE: Sequence[Sequence[float]],
    *,
    signed: bool = False,
) -> None:
    """Layers down, experts across by their ids, in as many blocks as the width of the terminal asks for."""
    from rich.text import Text

    console.print(Text(title, style="bold"))
    experts = len(values_LE[0])
    # A difference that reads 0.00 must not be painted as the strongest one.
    most = max(0.05, *(abs(value) for row in values_LE for value in row))
    across = max(1, (console.width - _LABEL) // _CELL)
    for begin in range(0, experts, across):
        shown = range(begin, min(begin + across, experts))
        console.print(
            Text("expert".ljust(_LABEL) + "".join(str(ids[e]).rjust(_CELL - 1) + " " for e in shown), style="dim")
        )
        for layer, row in zip(layers, values_LE, strict=True):
            line = Text(f"layer {layer}".ljust(_LABEL))
            for e in shown:
                text = f"{row[e]:+z.2f}" if signed else f"{row[e]:.2f}"
                line.append(text.rjust(_CELL - 1) + " ", style=_shade(row[e] / most))
            console.print(line)


def _shade(share: float) -> str:
    """A background between black and orange (more) or blue (less), for a share between -1 and 1."""
    strength = min(1.0, abs(share))
    red, green, blue = (235, 140, 30) if share >= 0 else (50, 110, 235)
    text = "black" if strength > 0.6 and share > 0 else "white"
    return f"{text} on rgb({int(red * strength)},{int(green * strength)},{int(blue * strength)})"
