"""``ragmoe train``: from a configuration to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragmoe.cli._output import OVERRIDES, OVERRIDES_HELP
from ragmoe.cli._stopped import again, on_stop
from ragmoe.cli.progress import progress

TRAIN_EXAMPLES = """Examples:

  ragmoe train eval/experiments/halvern.yaml --dry-run
  ragmoe train eval/experiments/halvern.yaml train.steps=200 model.gate=token --out runs/token
  ragmoe train eval/experiments/halvern.yaml train.steps=200 model.gate=token --out runs/token --resume"""


def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.yaml",
            help="The configuration, such as eval/experiments/halvern.yaml; paths in it count from its folder.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=OVERRIDES,
            help=f"Keys to change, such as train.steps=200 model.gate=token; {OVERRIDES_HELP}",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the bundle.")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again where a run has left something.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show parameters, memory and the first batch, then stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fine-tune a reader or, of a causal language model, a generator on questions; or the latter on documents."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from ragmoe import training
    from ragmoe.training.config import refuse_idle
    from ragmoe.training.describe import describe

    resolved = training.load_config(config, overrides or [])
    if not resume:
        # A run that was begun with such settings goes on with them.
        refuse_idle(resolved)
    if dry_run:
        with progress() as show:
            report = describe(training.prepare(resolved, show=show))
        print(json.dumps(report, indent=2)) if as_json else Console().print(
            report["text"], highlight=False, markup=False
        )
        return
    with on_stop(lambda: _kept(out, resolved.checkpoint_every)), progress() as show:
        result = training.train(resolved, out=out, resume=resume, overwrite=overwrite, show=show)
    if as_json:
        print(json.dumps(asdict(result), default=str, indent=2))
        return
    counts = result.parameters
    console = Console()
    done = f"gone on to step {result.steps}; history.jsonl has its losses"
    if result.loss is not None and result.seconds is not None:
        done = f"loss {result.loss:.3f} over {result.steps} steps in {result.seconds:.0f} s"
    console.print(f"{result.bundle}: {done}")
    console.print(
        f"{counts['total'] / 1e6:.1f} M parameters, {counts['active'] / 1e6:.1f} M active for a token, "
        f"{counts['trained'] / 1e6:.2f} M trained"
    )
    if not resolved.data.documents:
        console.print(f'next: ragmoe ask {result.bundle} "a question" --index {resolved.data.index}')


def _kept(out: Path, every: int) -> str:
    """What a run that was stopped has left, and the command that goes on with it."""
    from ragmoe.training.folder import is_finished, is_started, last_checkpoint

    if is_finished(out):
        return f"{out} holds a finished run; what was given: {again()}"
    if not is_started(out):
        return f"nothing is written yet; begin again with: {again()}"
    resume = again("--resume", without=["--overwrite"])
    if checkpoint := last_checkpoint(out):
        return f"the checkpoint after step {checkpoint.rpartition('-')[2]} is kept; go on with: {resume}"
    why = f"no checkpoint is written yet (checkpoint_every is {every})"
    return f"{why}, so it starts again at the first step: {resume}"
