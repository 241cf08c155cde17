"""What the commands about indexes print: plans, progress, and pairs of names and values."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragmoe._room import size
from ragmoe._words import many
from ragmoe.cli._stopped import again

if TYPE_CHECKING:
    from ragmoe.index.manifest import EncoderRecord, Manifest
    from ragmoe.index.plan import BuildPlan

LONG = {"windows": "each is encoded as the token-weighted mean of overlapping windows", "truncate": "each is cut"}


def run_plan(plan: BuildPlan) -> Manifest:
    """Run a plan, with its progress on stderr."""
    from ragmoe._ranks import Ranks
    from ragmoe.cli.progress import progress

    with progress() as bars:
        return plan.run(bars.stage, ranks=Ranks.launched())


@contextmanager
def only_the_first_rank_prints() -> Iterator[None]:
    """Keep what is printed inside to the first of the processes that torchrun started; errors come after it."""
    from ragmoe._ranks import Ranks

    if not Ranks.launched().rank:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def chunking(chunks: int, words: int, overlap: int, rechunk: bool) -> str:
    """What was cut, and what was not."""
    if chunks:
        return f"chunks of at most {words} words, overlap {overlap}: {many(chunks, 'passage')}"
    return (
        f"none was cut: none has more than {words} words"
        if rechunk
        else (f"none was cut: what has an id stays whole (--rechunk cuts it too), the rest has at most {words} words")
    )


def print_plan(plan: BuildPlan) -> None:
    """What a plan will do and what it will take, on stderr."""
    from ragmoe._ranks import Ranks
    from ragmoe.index.calibrate import described

    processes = Ranks.launched().count
    time = duration(plan.seconds_of(processes)) + (f" in {processes} processes" if processes > 1 else "")
    how, skipped, left = plan.how, list(plan.rows.skipped), {}
    if plan.contents.new < plan.passages:
        left["of these known"] = f"{plan.passages - plan.contents.new:,}: their vectors are taken over"
    if (missing := plan.missing) is not None:
        blocks = len(plan.contents.to_encode)
        redo = "" if plan.target.resume else "; --resume encodes only these, without it all are encoded again"
        left["stopped before"] = f"{blocks - len(missing)} of {blocks} blocks are encoded, {_numbers(missing)}{redo}"
    if plan.rows.duplicates:
        left["duplicates"] = f"{plan.rows.duplicates:,} are there already and are passed over"
    print_pairs(
        {
            "passages": f"{plan.passages:,}: {domains(plan.domains)}",
            **left,
            "skipped lines": f"{len(skipped)}" + (f", the first: {skipped[0]}" if skipped else ""),
            "chunking": chunking(plan.contents.cut, how.chunk_words, how.chunk_overlap, how.rechunk),
            "encoder": f"{how.encoder.id}, {reads(how.encoder)}",
            **({"encoding": described(how.made)} if plan.contents.new and how.made else {}),
            "long passages": f"about {plan.longer_share:.1%} are longer than that: {LONG[how.long_passages]}",
            "faiss": f"{plan.choice.factory}: {plan.choice.reason}",
            "needs about": f"{time} to encode, {size(plan.working_bytes)} of disk "
            f"({size(plan.disk_bytes)} when done), {size(plan.memory_bytes)} of memory beside the encoder",
        },
        sys.stderr,
    )


def _numbers(missing: list[int]) -> str:
    """Which blocks are missing, runs of them as first to last."""
    if not missing:
        return "none is missing"
    there = set(missing)
    starts, ends = ([n for n in missing if n + step not in there] for step in (-1, 1))
    runs = [f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    return "missing: " + ", ".join(runs[:8]) + (f" and {len(runs) - 8} more" if len(runs) > 8 else "")


def reads(encoder: EncoderRecord) -> str:
    """An encoder's width and maximum length."""
    return f"width {encoder.width}, reads {encoder.max_length} tokens"


def done_summary(plan: BuildPlan, manifest: Manifest) -> dict[str, Any]:
    """What ``--json`` prints when a plan was run."""
    return {**_read(plan), "dry_run": False, **manifest.model_dump()}


def _read(plan: BuildPlan) -> dict[str, Any]:
    """What a plan has read, whether or not it is run."""
    return {
        "out": str(plan.target.folder),
        "duplicates": plan.rows.duplicates,
        "skipped_lines": list(plan.rows.skipped),
    }


def plan_summary(plan: BuildPlan) -> dict[str, Any]:
    """A plan as ``--dry-run --json`` prints it."""
    from ragmoe._ranks import Ranks

    return {
        **_read(plan),
        "dry_run": True,
        "passages": plan.passages,
        "to_encode": plan.contents.new,
        "domains": plan.domains,
        "skipped": len(plan.rows.skipped),
        "chunks": plan.contents.cut,
        "missing_blocks": plan.missing,
        "encoder": plan.how.encoder.id,
        "encoding": plan.how.made and plan.how.made.model_dump(),
        "longer_share": plan.longer_share,
        "faiss": {"factory": plan.choice.factory, "reason": plan.choice.reason},
        "seconds": plan.seconds_of(Ranks.launched().count),
        "disk_bytes": plan.disk_bytes,
        "working_bytes": plan.working_bytes,
        "memory_bytes": plan.memory_bytes,
    }


def print_pairs(pairs: dict[str, str], stream: Any) -> None:
    """Names and values in two columns."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        table.add_row(*plain(name, value))
    console(stream).print(table)


def print_lengths(lengths: list[tuple[int, int, int]]) -> None:
    """A histogram of the lengths of passages, on stdout."""
    most = max(count for _, _, count in lengths)
    bars = {f"{first:,} to {last:,} B": f"{'█' * -(-40 * count // most)} {count:,}" for first, last, count in lengths}
    console(sys.stdout).print("\nlengths of passages", highlight=False)
    print_pairs(bars, sys.stdout)


def plain(*cells: str) -> list[Any]:
    """Cells whose square brackets are text, not markup."""
    from rich.text import Text

    return [Text(cell) for cell in cells]


def console(stream: Any) -> Any:
    """A rich console over a stream."""
    from rich.console import Console

    # Into a pipe rich would fold at 80 columns, in the middle of ids.
    return Console(file=stream, width=None if stream.isatty() else 160)


def domains(counts: dict[str, int]) -> str:
    """Counts by domain, on a line."""
    return ", ".join(f"{name or '(no domain)'} {count:,}" for name, count in counts.items())


def duration(seconds: float) -> str:
    """A time as people read it."""
    for unit, each in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * each:
            return f"{seconds / each:.1f} {unit}"
    return f"{seconds:.1f} s"


def built(out: Path, manifest: Manifest) -> str:
    """What a command says when it is done."""
    return f"{out}: {many(manifest.passages, 'passage')}, generation {manifest.generation}, {manifest.digest[:12]}"


def kept(out: Path) -> str:
    """What a run that was stopped has left, and the command that goes on with it."""
    encoded = "what is encoded so far is kept" if (out / "partial").is_dir() else "nothing is encoded yet"
    return f"{encoded}; go on with: {again('--resume')}"
