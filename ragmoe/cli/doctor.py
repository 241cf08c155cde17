"""``ragmoe doctor``: check this machine and this installation, line by line."""

from __future__ import annotations

import json
from typing import Annotated

import typer

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check versions, processor, threads, GPU, torch beside faiss, the offline model, memory and disk.

    Takes about fifteen seconds. Exit code 1 if a check fails; warnings do not fail.
    """
    from ragmoe.cli._checks import FAIL, run_checks

    checks = []
    for check in run_checks():
        checks.append(check)
        if not as_json:
            status = typer.style(f"{check.status:<4}", fg=_COLOURS[check.status])
            typer.echo(f"{status}  {check.name:<21}  {check.found}")
            if check.advice:
                typer.echo(f"{'':<29}{check.advice}")
    failed = [check.name for check in checks if check.status == FAIL]
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [check.as_dict() for check in checks]}, indent=2))
    elif failed:
        typer.echo(f"failed: {', '.join(failed)}")
    if failed:
        raise typer.Exit(1)
