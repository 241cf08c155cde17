"""The ``ragmoe`` program: its commands, its exit codes, and how quiet the libraries beneath it are.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from ragmoe._errors import RagmoeError
from ragmoe._memory import keep_freed_memory
from ragmoe._ranks import Ranks
from ragmoe._version import __version__
from ragmoe.cli import bundle, data, experts, gates, index, losses
from ragmoe.cli import eval as eval_
from ragmoe.cli._stopped import WORDS
from ragmoe.cli.annotate import annotate
from ragmoe.cli.ask import ASK_EXAMPLES, ask
from ragmoe.cli.demo import demo
from ragmoe.cli.doctor import doctor
from ragmoe.cli.init import INIT_EXAMPLES, init
from ragmoe.cli.plan import PLAN_EXAMPLES, plan
from ragmoe.cli.route import ROUTE_EXAMPLES, route
from ragmoe.cli.train import TRAIN_EXAMPLES, train

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
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_GROUPS = "Groups of commands"
_EXAMPLES = """Examples:

  ragmoe index build docs --out indexes/mine
  ragmoe train eval/experiments/halvern.yaml --out runs/mine
  ragmoe ask runs/mine 'Who may look at the parish registers?' --index indexes/demo"""

app = typer.Typer(
    name="ragmoe",
    help="Mixture-of-experts readers whose gates see what a question retrieves: index, train, evaluate, ask.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXAMPLES,
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


index.app.command("annotate", short_help="Record which experts served the passages.")(annotate)
app.add_typer(index.app, name="index", help="Build, search, inspect and verify indexes.", rich_help_panel=_GROUPS)
app.add_typer(
    bundle.app,
    name="bundle",
    help="A model's versions and the way back; pack one for shipping.",
    rich_help_panel=_GROUPS,
)
app.add_typer(data.app, name="data", help="Check, remap and make question files.", rich_help_panel=_GROUPS)
app.add_typer(eval_.app, name="eval", help="Run and compare evaluations and experiments.", rich_help_panel=_GROUPS)
app.add_typer(
    experts.app, name="experts", help="Show, add, take, prune and merge single experts.", rich_help_panel=_GROUPS
)
app.add_typer(gates.app, name="gates", help="List gates and what else routes.", rich_help_panel=_GROUPS)
app.add_typer(losses.app, name="losses", help="Show what a gate can be trained by.", rich_help_panel=_GROUPS)
app.command("init", short_help="Give any checkpoint gates that see neighbours.", epilog=INIT_EXAMPLES)(init)
app.command("train", short_help="Fine-tune a model from a configuration file.", epilog=TRAIN_EXAMPLES)(train)
app.command("ask", short_help="Answer a question, with the passage it comes from.", epilog=ASK_EXAMPLES)(ask)
app.command("route", short_help="Draw which experts a question's tokens go to.", epilog=ROUTE_EXAMPLES)(route)
app.command("plan", short_help="Count what a model would cost, without making it.", epilog=PLAN_EXAMPLES)(plan)
app.command("doctor", short_help="Check this machine and this installation.")(doctor)
app.command("demo", short_help="Index, train, evaluate and ask on the packaged data.")(demo)


def _quieten() -> None:
    """Keep progress bars and warnings of the libraries out of our output; what the user set in the environment wins."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=rf"({_LIBRARIES})(\.|$)")


def _complain(message: str, hint: str | None = None) -> None:
    """An error on stderr; of several processes each says which it is."""
    ranks = Ranks.launched()
    which = f"rank {ranks.rank}: " if ranks.count > 1 else ""
    typer.echo(f"{which}error: {message}", err=True)
    if hint:
        typer.echo(f"{which}hint: {hint}", err=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with the arguments given (those of the process if None) and return its exit code.

    An exception that is neither a ``RagmoeError`` nor of the file system (no right to a file, no room on the disk)
    passes through: it is a fault of ours, and shows its traceback.
    """
    _quieten()
    keep_freed_memory()
    words = sys.argv[1:] if argv is None else list(argv)
    WORDS.set(words)
    try:
        app(args=words, prog_name="ragmoe")
    except RagmoeError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_FULL:
            raise
        _complain(f"{error.filename or 'the disk'}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        if isinstance(end.code, str):
            typer.echo(end.code, err=True)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
