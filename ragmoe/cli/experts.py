"""``ragmoe experts``: single experts of a bundle, listed, renamed, pruned, merged, added and taken from a copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe._errors import UsageError
from ragmoe._words import many
from ragmoe.cli._bundles import BundleArgument, OwnBundleArgument, called, to_read
from ragmoe.cli._output import DataOption, JsonOption, print_json, print_tables, set_data
from ragmoe.cli.add_expert import add
from ragmoe.cli.progress import progress

if TYPE_CHECKING:
    from ragmoe.bundle import ExpertInfo
    from ragmoe.evaluation.tables import Table
    from ragmoe.evaluation.task import Task

app = typer.Typer(help="Show, add, take, prune and merge single experts.", no_args_is_help=True)

VersionOption = Annotated[
    int | None, typer.Option(metavar="N", help="An earlier version of the bundle.", show_default=False)
]
ExpertArgument = Annotated[str, typer.Argument(metavar="EXPERT", help="Its id or name.", show_default=False)]
ExpertsArgument = Annotated[list[str], typer.Argument(metavar="EXPERT", help="Ids or names.", show_default=False)]
TaskOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="TASK", help="A task to measure on; may be repeated.", show_default=False),
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="At most N questions of each domain.", show_default=False)
]


_TAKE_EXAMPLES = """Example:

  ragmoe experts add runs/mine --name clinic --index indexes/all --questions clinic.jsonl --out runs/mine-clinic
  ragmoe experts add runs/mine --name court --index indexes/all --questions court.jsonl --out runs/mine-court
  ragmoe experts take runs/mine-clinic court --from runs/mine-court"""

app.command("add", short_help="Train one expert for a new domain, without forgetting.")(add)


@app.callback()
def _experts() -> None:
    """Show, add, take, prune and merge experts. What changes a bundle makes a new version; the old ones still load."""


@app.command()
def ls(bundle: BundleArgument, version: VersionOption = None, as_json: JsonOption = False) -> None:
    """List the experts of a bundle."""
    from ragmoe.bundle import list_experts
    from ragmoe.evaluation.tables import Table, number

    experts = list_experts(bundle, version=version)
    if as_json:
        print_json([expert.as_dict() for expert in experts])
        return
    rows = [
        [
            str(e.id),
            e.name,
            str(e.version),
            "locked" if e.locked else "",
            f"{e.parameters:,}",
            number(None if e.mean_load is None else 100 * e.mean_load),
        ]
        for e in experts
    ]
    note = f"Load: share of the choices as training ended. One expert: ragmoe experts show {called(bundle)} EXPERT"
    columns = ["id", "name", "version", "", "parameters", "load (%)"]
    print_tables([Table(f"Experts of {called(bundle)}", columns, rows, note=note, labels=2)])


@app.command()
def show(
    bundle: BundleArgument, expert: ExpertArgument, version: VersionOption = None, as_json: JsonOption = False
) -> None:
    """Show one expert: its file, its load, how it came about, and its certificate where it was added later."""
    from ragmoe.bundle import show_expert

    found = show_expert(bundle, expert, version=version)
    if as_json:
        print_json(found.as_dict())
    else:
        _print_expert(found)


@app.command()
def rename(
    bundle: OwnBundleArgument,
    expert: ExpertArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its new name.", show_default=False)],
) -> None:
    """Give an expert another name."""
    from ragmoe.bundle import read_map, rename_expert

    before = read_map(bundle).find(expert).name
    map_ = rename_expert(bundle, expert, name)
    typer.echo(f"{bundle}: version {map_.version}, {map_.lineage[-1].message}")
    if name != before and "memory" in str(map_.extra.get("config", {}).get("gate")):
        typer.echo(
            f"passages of the domain {before} speak for this expert no longer, and those of {name} do, but for what an "
            f"index has recorded: ragmoe index annotate DIR --model {bundle} --questions FILE"
        )


@app.command()
def prune(
    bundle: OwnBundleArgument,
    experts: Annotated[
        list[str], typer.Argument(metavar="EXPERT", help="Ids or names of the experts to go.", show_default=False)
    ],
    task: TaskOption = None,
    index: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The index, in place of the tasks'.", show_default=False)
    ] = None,
    data: DataOption = None,
    limit: LimitOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict and measure; change nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Let experts go, and say what that costs: predicted by their load, and measured on tasks."""
    from ragmoe.bundle import prune_experts, read_map, show_expert
    from ragmoe.bundle.experts import check_prune

    if not task and (given := [o for o, x in (("--index", index), ("--data", data), ("--limit", limit)) if x]):
        raise UsageError(f"{given[0]} says how a task is read, but no --task was given")
    map_ = read_map(bundle)
    gone = list(dict.fromkeys(map_.find(expert) for expert in experts))
    kept = check_prune(bundle, map_, gone)
    loads = [show_expert(bundle, expert.id).mean_load for expert in gone]
    predicted = sum(load for load in loads if load is not None) if None not in loads else None
    measured = _measure(bundle, [expert.id for expert in kept], find_tasks(task, data, limit), index)
    names = ", ".join(expert.name for expert in gone)
    said = [_prediction(predicted), *map(_sentence, measured)]
    version = map_.version
    if not dry_run:
        message = f"prune {names}; {'; '.join(said)}"
        version = prune_experts(bundle, [e.id for e in gone], message=message, parent=map_).version
    if predicted is None and not measured:
        said[0] += "; --task measures it"
    if as_json:
        shown = [{"id": expert.id, "name": expert.name} for expert in gone]
        content = {"pruned": shown, "predicted": predicted, "measured": measured, "version": version}
        print_json({**content, "dry_run": dry_run})
        return
    typer.echo("\n".join(said))
    done = f"{names} would go" if dry_run else f"version {version} without {names}"
    typer.echo(f"{bundle}: {done}; {many(len(kept), 'expert')}")


@app.command()
def merge(
    bundle: OwnBundleArgument,
    a: Annotated[str, typer.Argument(metavar="A", help="One expert, by id or name.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other.", show_default=False)],
    name: Annotated[str, typer.Option(metavar="NAME", help="The name of the one in their place.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Put one expert in the place of two: their mean, weighed by load."""
    from ragmoe.bundle import merge_experts

    merged = merge_experts(bundle, a, b, name)
    version = merged.map.version
    if as_json:
        expert = {"id": merged.expert.id, "name": merged.expert.name}
        print_json({"expert": expert, "weights": merged.weights, "kept": merged.kept, "version": version})
        return
    weights = " and ".join(f"{weight:.2f}" for weight in merged.weights)
    typer.echo(f"{bundle}: version {version}, expert {merged.expert.id} ({name}) in the place of {a} and {b}")
    typer.echo(f"weights {weights}; {100 * merged.kept:.1f} % of the norm of their mean is kept")
    if "memory" in str(merged.map.extra.get("config", {}).get("gate")):
        # It has an id of its own, under which nothing was recorded.
        typer.echo(
            "what indexes recorded of the two is not carried over: record it anew with ragmoe index annotate DIR "
            f"--model {bundle} --questions FILE"
        )


@app.command(epilog=_TAKE_EXAMPLES)
def take(
    bundle: OwnBundleArgument,
    experts: ExpertsArgument,
    source: Annotated[
        Path,
        typer.Option("--from", metavar="COPY", help="The copy that has them.", callback=to_read, show_default=False),
    ],
    version: Annotated[
        int | None, typer.Option(metavar="N", help="An earlier version of COPY.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let experts join that were added to another copy of this bundle, with the gate rows that call them.

    Nothing is trained. An earlier version of BUNDLE itself may be the copy: so one that was pruned comes back.
    """
    from ragmoe.bundle import take_experts

    map_ = take_experts(bundle, source, experts, version=version)
    joined = map_.experts[-len(experts) :]
    if as_json:
        print_json({"taken": [{"id": e.id, "name": e.name} for e in joined], "version": map_.version})
        return
    named = ", ".join(f"{e.id} ({e.name})" for e in joined)
    typer.echo(f"{bundle}: version {map_.version}, with {named}; {many(len(map_.experts), 'expert')}")
    if "memory" in str(map_.extra.get("config", {}).get("gate")):
        # They have ids of their own, under which nothing was recorded.
        typer.echo(
            "what indexes recorded of them for the copy is not carried over: record it anew with ragmoe index annotate "
            f"DIR --model {bundle} --questions FILE"
        )
    typer.echo(f"how they answer together is not measured yet; back to what was: ragmoe bundle rollback {bundle}")


@app.command()
def lock(bundle: OwnBundleArgument, experts: ExpertsArgument) -> None:
    """Let no command change, rename, merge or prune these experts; going back past them is refused too."""
    _set_lock(bundle, experts, locked=True)


@app.command()
def unlock(bundle: OwnBundleArgument, experts: ExpertsArgument) -> None:
    """Let these experts be changed again."""
    _set_lock(bundle, experts, locked=False)


def find_tasks(names: list[str] | None, data: Path | None, limit: int | None) -> list[Task]:
    """Tasks by file or name, as ``ragmoe eval run`` finds them."""
    from ragmoe.cli.eval import find_task

    set_data(data)
    return [find_task(name).limited(limit) for name in names or ()]


def _set_lock(bundle: Path, experts: list[str], *, locked: bool) -> None:
    from ragmoe.bundle import lock_experts, read_map

    before = read_map(bundle).version
    map_ = lock_experts(bundle, experts, locked=locked)
    done = map_.lineage[-1].message if map_.version > before else "nothing to do"
    typer.echo(f"{bundle}: version {map_.version}, {done}")


def _measure(bundle: Path, kept: list[int], tasks: list[Task], index: Path | None) -> list[dict[str, Any]]:
    if not tasks:
        return []
    from ragmoe.evaluation import Retrieval
    from ragmoe.evaluation.opening import index_of_task
    from ragmoe.training.certificate import measure_prune

    measured = []
    with progress() as bars:
        for task in tasks:
            retrieval = Retrieval(index_of_task(task, given=index, progress=bars.stage))
            measured.append(measure_prune(bundle, kept, task, retrieval, bars.stage))
    return measured


def _prediction(predicted: float | None) -> str:
    if predicted is None:
        return "predicted: unknown, its load was not recorded"
    return f"predicted: {100 * predicted:.1f} % of the choices fell on it as training ended and go to others"


def _sentence(change: dict[str, Any]) -> str:
    return (
        f"measured: {change['task']} ({change['setting']}, {change['n']} questions): F1 {change['before']:.2f} before, "
        f"{change['after']:.2f} after, {_difference(change)}; {100 * change['load']:.1f} % of its choices fell on it"
    )


def _difference(change: dict[str, Any]) -> str:
    from ragmoe.evaluation.tables import bounds, number

    return f"{number(change['difference'], 2, sign=True)} {bounds(change['low'], change['high'], 2, sign=True)}"


def _print_expert(expert: ExpertInfo) -> None:
    own = expert.no_answer_threshold
    lines = {
        "expert": f"{expert.id} ({expert.name}){', locked' if expert.locked else ''}",
        "version": str(expert.version),
        "file": f"{expert.file}, {expert.bytes:,} bytes, {expert.parameters:,} parameters",
        "sha256": expert.digest,
        **({"threshold": f"{own:.3f}, for what most tokens take to it"} if own is not None else {}),
        "load": ", ".join(f"{100 * share:.1f} %" for share in expert.load) + " by layer" if expert.load else "unknown",
    }
    for name, text in lines.items():
        typer.echo(f"{name:<10}{text}")
    for step in expert.history:
        typer.echo(f"{'history':<10}{step['time'][:10]}, version {step['version']} of the bundle: {step['message']}")
    if expert.certificate:
        print_tables([certificate_table(expert.certificate)])


# What is masked, what the shares are of, and what judges the cost.
_ABOUT_QUESTIONS = (
    "answers and scores",
    "Past threshold: F1 with none for what is withheld, before and live. Routed to it, in per cent: tokens, questions "
    "of which most tokens are, questions of which any is",
    "--task TASK",
)
_ABOUT_LANGUAGE = ("the losses of documents", "Routed to it: the share of tokens", "--known FILE")


def _judge(change: dict[str, Any]) -> list[str]:
    return [f"{change['task']} ({change['setting']})", str(change["n"])]


def certificate_table(certificate: dict[str, Any]) -> Table:
    """What adding an expert has cost and brought; of a language model in perplexity."""
    from ragmoe.evaluation.tables import NONE, Table, number

    language = "documents" in certificate
    keys = ("tokens",) if language else ("tokens", "questions", "touched")
    rows = []
    for what, change in [*(("old", c) for c in certificate["old"]), ("new", certificate["new"])]:
        if change is None:
            continue
        shares = [number(100 * change["routed"][key]) for key in keys]
        masked = "identical" if change.get("identical") else NONE
        scores = [number(change["before"], 2), masked, number(change["live"], 2), _difference(change)]
        if not language:
            past = change.get("past_threshold")
            scores.append(f"{number(past['before'])} to {number(past['live'])}" if past else NONE)
        judge = [change["domain"] or NONE, f"{change['tokens']:,}"] if language else _judge(change)
        rows.append([what, *judge, *scores, *shares])
    minutes = certificate["minutes"]
    took = f"{minutes:.1f} minutes" if minutes is not None else "several sittings"
    counts = certificate["parameters"]
    learned = many(certificate["documents"], "document") if language else many(certificate["questions"], "question")
    said, shares_of, cost = _ABOUT_LANGUAGE if language else _ABOUT_QUESTIONS
    trained = f"{counts['trained']:,} of {counts['total']:,} parameters"
    note = (
        f"{certificate['steps']} steps on {learned} in {took}; {trained}. Masked: without the expert, {said} against "
        f"before, bit for bit. {shares_of}."
    )
    for change in certificate["old"]:
        # Where it is called though it is not for that; certificates of before do not say it.
        leaks = change["routed"].get("per_domain", {})
        if len(leaks) > 1:
            most = sorted(leaks.items(), key=lambda leak: -leak[1])
            by_domain = ", ".join(f"{name or NONE} {number(100 * share)}" for name, share in most)
            note += f" Tokens by domain, {change['task']}: {by_domain}."
    if not language and ((certificate["new"] or {}).get("past_threshold") or {}).get("chosen_on_these"):
        note += " The expert's threshold was chosen on the new questions it is judged by; --dev FILE names others."
    if certificate.get("taken"):
        beside = f", beside {', '.join(certificate['beside'])}" if certificate.get("beside") else ""
        note += f" Measured in the copy that it was taken from{beside}."
    if not rows:
        note = f"Judged by nothing: --dev FILE judges what it brings, {cost} what it costs. {note}"
    judged_by = ["domain", "tokens", "perplexity before"] if language else ["task", "n", "F1 before"]
    measured = ["change, %", "routed, %"] if language else ["change", "past threshold", *keys]
    columns = ["", *judged_by, "masked", "live", *measured]
    return Table(f"Certificate of {certificate['name']}", columns, rows, note=note, labels=2)
