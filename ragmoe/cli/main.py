"""The ``ragmoe`` program: its commands, its exit codes, and how quiet the libraries beneath it are.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from ragmoe._errors import RagmoeError
from ragmoe._version import __version__
from ragmoe.cli import data, index
from ragmoe.cli import eval as eval_
from ragmoe.cli.ask import ask
from ragmoe.cli.demo import demo
from ragmoe.cli.doctor import doctor
from ragmoe.cli.route import route
from ragmoe.cli.train import train

_LIBRARIES = "torch|transformers|sentence_transformers|datasets|huggingface_hub|peft|accelerate|faiss|numpy"
_QUIET = {
    # Otherwise tokenizers warns at each fork of a data loader, and turns itself off all the same.
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
_GROUPS = "Groups of commands"

app = typer.Typer(
    name="ragmoe",
    help="Mixture-of-experts readers whose gates see what a question retrieves: index, train, evaluate, ask.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"ragmoe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Mixture-of-experts readers whose gates see what a question retrieves: index, train, evaluate, ask."""


app.add_typer(index.app, name="index", help="Build, search, inspect and verify indexes.", rich_help_panel=_GROUPS)
app.add_typer(data.app, name="data", help="Check and remap question files.", rich_help_panel=_GROUPS)
app.add_typer(eval_.app, name="eval", help="Run and compare evaluations and experiments.", rich_help_panel=_GROUPS)
app.command("train", short_help="Fine-tune a model from a configuration file.")(train)
app.command("ask", short_help="Answer a question, with the passage it comes from.")(ask)
app.command("route", short_help="Draw which experts a question's tokens go to.")(route)
app.command("doctor", short_help="Check this machine and this installation.")(doctor)
app.command("demo", short_help="Index, train, evaluate and ask on the packaged data.")(demo)


def _quieten() -> None:
    """Keep progress bars and warnings of the libraries out of our output; what the user set in the environment wins."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=rf"({_LIBRARIES})(\.|$)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with the arguments given (those of the process if None) and return its exit code.

    An exception that is not a ``RagmoeError`` passes through: it is a fault of ours, and shows its traceback.
    """
    _quieten()
    try:
        app(args=list(argv) if argv is not None else None, prog_name="ragmoe")
    except RagmoeError as error:
        typer.echo(f"error: {error.message}", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        if isinstance(end.code, str):
            typer.echo(end.code, err=True)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
