"""``ragmoe eval experiment`` and ``ragmoe eval report``: run an experiment, and write its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe._errors import UsageError
from ragmoe.cli._output import (
    OVERRIDES,
    OVERRIDES_HELP,
    DataOption,
    JsonOption,
    complain,
    print_json,
    print_tables,
    set_data,
)
from ragmoe.cli._stopped import again, on_stop
from ragmoe.cli.progress import progress

if TYPE_CHECKING:
    from ragmoe.evaluation.experiment_report import Outcome

EXPERIMENT_EXAMPLES = """Examples:

  ragmoe eval experiment eval/experiments/demo.yaml --out runs/demo
  ragmoe eval experiment eval/experiments/core7.yaml --data path/to/data --only retrieval --seeds 0
  ragmoe eval experiment eval/experiments/core7.yaml train.steps=50 --data path/to/data --out runs/quick"""
REPORT_EXAMPLES = """Example:

  ragmoe eval report eval/experiments/core7.yaml --data path/to/data"""

FileArgument = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The experiment.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar=OVERRIDES,
        help=f"For the training of every arm, such as train.steps=50; {OVERRIDES_HELP}",
        show_default=False,
    ),
]
SeedsOption = Annotated[
    str | None, typer.Option(metavar="0,1", help="In place of the file's seeds.", show_default=False)
]


def experiment(
    file: FileArgument,
    overrides: OverridesArgument = None,
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where models and samples go.", show_default="runs/NAME")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ARM", help="Run only this arm; may be repeated.", show_default=False)
    ] = None,
    seeds: SeedsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train and evaluate the arms of an experiment and write its result; one that was stopped goes on."""
    set_data(data)
    from ragmoe.evaluation.experiment import LanguageExperiment, load_experiment
    from ragmoe.evaluation.experiment_report import default_folder
    from ragmoe.evaluation.experiment_run import run_experiment
    from ragmoe.evaluation.language_experiment import run_language_experiment

    loaded = load_experiment(file, overrides=overrides or (), seeds=_seeds(seeds))
    folder = out or default_folder(loaded)
    kept = f"what was trained and read so far is kept in {folder}, an arm in training from its last checkpoint on"
    with on_stop(lambda: f"{kept}; go on with: {again()}"), progress() as show:
        told: dict[str, Any] = {"say": show.say, "index_progress": show.stage, "show_training": show}
        if isinstance(loaded, LanguageExperiment):
            outcome = run_language_experiment(loaded, out=out, only=only or (), **told)
        else:
            outcome = run_experiment(loaded, out=out, only=only or (), progress=show.questions, **told)
    _tell(outcome, as_json)
    complain(outcome.results, outcome.folder)


def report(
    file: FileArgument,
    overrides: OverridesArgument = None,
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the experiment was run.", show_default="runs/NAME")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the pictures go.", show_default="beside the Markdown"),
    ] = None,
    seeds: SeedsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the result of an experiment from what was run already: tables, pictures, JSON; nothing is run."""
    set_data(data)
    from ragmoe.evaluation.experiment import LanguageExperiment, load_experiment
    from ragmoe.evaluation.experiment_report import command_of, report_experiment
    from ragmoe.evaluation.language_report import report_language_experiment

    loaded = load_experiment(file, overrides=overrides or (), seeds=_seeds(seeds))
    if plots and isinstance(loaded, LanguageExperiment):
        raise UsageError("--plots is given, but an experiment with documents in the place of tasks has no pictures")
    with progress() as show:
        if isinstance(loaded, LanguageExperiment):
            outcome = report_language_experiment(loaded, out=out)
        else:
            outcome = report_experiment(loaded, out=out, plots=plots, say=show.say)
    _tell(outcome, as_json)
    complain(outcome.results, outcome.folder, again=command_of(loaded, out=out))


def _tell(outcome: Outcome, as_json: bool) -> None:
    """The result on stdout; what was written and what is missing on stderr."""
    if as_json:
        print_json(outcome.result.model_dump())
    else:
        print_tables(outcome.tables)
    for path in outcome.written:
        typer.echo(f"wrote {path}", err=True)
    if outcome.missing:
        typer.echo(f"not run yet: {', '.join(outcome.missing)}", err=True)


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {text}: expected whole numbers with commas between them, such as 0,1,2") from None
