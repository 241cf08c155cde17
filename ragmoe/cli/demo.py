"""``ragmoe demo``: the whole job on the packaged data, in a few minutes on a laptop's CPU.

Index, search, ask the packaged reader, fine-tune three arms, evaluate them, look at the routing, ask:
every step is a command a user can give.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe._errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from ragmoe.evaluation.experiment_report import Outcome

SEARCH = "How much notice must a landlord give before coming into my flat?"
# About passages of the test split, which no arm has been trained on.
QUESTIONS = (
    "How long do I keep biting on the gauze after having a wisdom tooth out?",
    "Who led the tenants' protest over the Cormorant House lift bill?",
    "For how long does a repair estimate from Orrin & Tade hold?",
)


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where models and samples go.")] = Path("runs/demo"),
) -> None:
    """Index, fine-tune, evaluate and ask on the packaged city of Halvern: about five minutes on two free cores.

    What is there already is not done again: give another --out, or remove it, to start afresh.
    """
    from rich.console import Console

    root = Path.cwd()
    if not (root / "eval" / "experiments" / "demo.yaml").is_file():
        raise UsageError(
            f"{root} holds no eval/experiments/demo.yaml: the demo runs in a clone of the repository",
            hint="git clone the repository, then: make demo",
        )
    begin = time.perf_counter()
    console = Console(file=sys.stdout)
    outcome = _run(console, root, out)
    console.print(_table(outcome).rich())
    bundle = out / "retrieval" / "seed-0" / "bundle"
    _ask(console, root, bundle)
    console.print(f"\n{time.perf_counter() - begin:.0f} s in all. Go on with:", style="dim", highlight=False)
    for command in (
        f'ragmoe ask {bundle} "{SEARCH}" --index indexes/demo',
        f'ragmoe route {bundle} "{SEARCH}" --index indexes/demo',
        "ragmoe train eval/experiments/halvern.yaml --out runs/halvern",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)


def _run(console: Console, root: Path, out: Path) -> Outcome:
    from ragmoe.cli.index import print_hits
    from ragmoe.cli.progress import progress
    from ragmoe.evaluation.experiment import load_experiment
    from ragmoe.evaluation.experiment_run import run_experiment
    from ragmoe.evaluation.opening import index_of_recipe
    from ragmoe.models import load

    with progress() as show:
        show.say("1  Index: 200 passages in five domains")
        index = index_of_recipe(root / "indexes" / "demo.yaml", progress=show.stage)
        show.say(f"   {len(index)} passages, {index.width} wide, {index.manifest.faiss.factory}: {index.folder}")
        show.say(f"2  Search: {SEARCH}")
    print_hits([(hit, index.passage(hit.passage_id)) for hit in index.search([SEARCH], 3)[0]], SEARCH)
    console.print(f"\n3  Ask the packaged starter, which has never seen this city: {SEARCH}", highlight=False)
    _answer(index, load("starter"), SEARCH)
    with progress() as show:
        show.say("4  Fine-tune three arms from one start, on the same examples, and evaluate them")
        return run_experiment(
            load_experiment(root / "eval" / "experiments" / "demo.yaml"),
            out=out,
            say=show.say,
            progress=show.questions,
            index_progress=show.stage,
            show_training=show,
        )


def _table(outcome: Outcome) -> Any:
    """One line an arm: quality with its interval, size, and what its gate does."""
    from ragmoe.evaluation.perturbation import REAL
    from ragmoe.evaluation.statistics import interval
    from ragmoe.evaluation.tables import Table, bounds, number

    gold, opened = (task.name for task in outcome.tasks)
    rows = []
    for arm, runs in outcome.runs.items():
        span = interval([run.samples[REAL] for run in runs[gold]])
        figures = outcome.result.arms[arm]
        rows.append(
            [
                arm,
                number(figures.macro_f1),
                bounds(span.low, span.high) if span else "",
                number(runs[opened][0].macro_f1),
                f"{(figures.active_params or 0) / 1e6:.1f} M",
                number(figures.normalised_mi, 2),
                number(figures.seconds, 0),
            ]
        )
    recall = next(iter(outcome.runs.values()))[opened][0].retrieval or {"mean": {}}
    found = ", ".join(f"{name} {value:.2f}" for name, value in recall["mean"].items())
    return Table(
        "Answers to the questions of dev",
        ["arm", "F1 gold", "95 %", "F1 open", "active", "MI", "seconds"],
        rows,
        note="untrained: the start, before fine-tuning; gold: reads the right passage; open: reads the three best "
        "found and chooses, on sixteen questions a domain. "
        f"MI: how far a domain decides the expert, 0 to 1. Retrieval: {found}.",
    )


def _ask(console: Console, root: Path, bundle: Path) -> None:
    from ragmoe.cli.route import draw, trace
    from ragmoe.index import Index
    from ragmoe.models import load

    index, model = Index.open(root / "indexes" / "demo"), load(bundle)
    console.print(f"5  Routing: {QUESTIONS[0]}", highlight=False)
    draw(trace(model, index, QUESTIONS[0]))
    for number, question in enumerate(QUESTIONS, start=6):
        console.print(f"\n{number}  Ask: {question}", highlight=False)
        _answer(index, model, question)


def _answer(index: Any, model: Any, question: str) -> None:
    from ragmoe.cli.ask import print_answer

    answer = model.answer([question], index)[0]
    print_answer(answer, index.passage(answer.passage_id) if answer.passage_id else None)
