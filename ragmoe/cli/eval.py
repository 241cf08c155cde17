"""``ragmoe eval``: run tasks, list them, compare two runs; experiments are in experiment.py."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ragmoe._errors import ConfigError, DataError, UsageError
from ragmoe._folders import expect_folder
from ragmoe.cli._bundles import STARTER_NAME, WithoutOption, called, to_read
from ragmoe.cli._output import DataOption, JsonOption, complain, print_json, print_tables, set_data
from ragmoe.cli._stopped import again, on_stop
from ragmoe.cli._thrift import CacheOption, ResidentOption, Thrift
from ragmoe.cli.experiment import EXPERIMENT_EXAMPLES, REPORT_EXAMPLES, experiment, report
from ragmoe.cli.progress import Show, progress

if TYPE_CHECKING:
    from ragmoe.evaluation.results import Results
    from ragmoe.evaluation.tables import Table
    from ragmoe.evaluation.task import Task
    from ragmoe.index import Index

app = typer.Typer(help="Run and compare evaluations.", no_args_is_help=True)

_TASKS = Path("eval") / "tasks"
# By these a task makes another evaluation of the same questions.
_ASKED_BY = ("setting", "question_field", "passages", "neighbours", "retriever")
_RUN_EXAMPLES = """Examples:

  ragmoe eval run demo_gold demo_open --model runs/halvern --out runs/halvern-eval
  ragmoe eval run mine.yaml --model runs/halvern --index indexes/mine --limit 50 --json"""
_COMPARE_EXAMPLES = """Examples:

  ragmoe eval compare runs/halvern-eval runs/token-eval
  ragmoe eval compare runs/demo/retrieval/seed-0 runs/demo/dense/seed-0 --metric em --json"""

_HARNESS_EXAMPLES = """Examples:

  ragmoe eval harness run --model ragmoe --model_args pretrained=runs/mine,index=indexes/mine --tasks arc_easy"""


@app.command(epilog=_RUN_EXAMPLES)
def run(
    tasks: Annotated[
        list[str],
        typer.Argument(metavar="TASK", help="Task files, or names that `ragmoe eval ls` lists.", show_default=False),
    ],
    model: Annotated[
        Path, typer.Option(metavar="BUNDLE", help="The model to evaluate.", callback=to_read, show_default=False)
    ],
    index: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The index, in place of the task's.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most N questions of each domain.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where samples and results go.", show_default="runs/eval/BUNDLE")
    ] = None,
    without: WithoutOption = None,
    data: DataOption = None,
    resume: Annotated[
        bool, typer.Option(help="Take over questions that were read already; --no-resume replaces what is there.")
    ] = True,
    resident_experts: ResidentOption = None,
    output_cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model on tasks; a run that was stopped goes on where it was."""
    set_data(data)
    base = out or Path("runs") / "eval" / name_of(model)
    expect_folder(base)
    loaded = _load_tasks(tasks, limit)
    # What is another evaluation of the same model must not replace the whole one.
    other = [] if limit is None else [f"limit{limit}"]
    other += ["without", *sorted(without)] if without else []
    folders = [base / (task.name if out else "-".join([task.name, *other])) for task in loaded]
    kept = f"the answers recorded so far are kept in {base}"
    thrift = Thrift(resident_experts, output_cache, without or ())
    with on_stop(lambda: f"{kept}; go on with: {again(without=['--no-resume'])}"), progress() as show:
        results = _evaluate(model, index, list(zip(loaded, folders, strict=True)), resume, show, thrift)
    from ragmoe.evaluation.results import to_lm_eval

    if as_json:
        shape = to_lm_eval(results)
        shape["ragmoe"] |= thrift.found()
        print_json(shape)
    else:
        for result in results:
            print_tables(_tables(result))
        thrift.tell()
        typer.echo(f"samples and results: {base}", err=True)
    complain(results, base)


def name_of(model: Path) -> str:
    """A name for a model by the whole of where it lies: what an experiment leaves is all called bundle."""
    if called(model) == STARTER_NAME:
        return STARTER_NAME
    path = model.resolve()
    if path.is_relative_to(Path.cwd()) and path != Path.cwd():
        return "-".join(path.relative_to(Path.cwd()).parts)
    return "-".join([*path.parts[-2:], sha256(str(path).encode()).hexdigest()[:8]]).strip("/")


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of task files.")] = _TASKS,
    as_json: JsonOption = False,
) -> None:
    """List tasks: how to name them, what they give the reader, and what they are."""
    from ragmoe.evaluation.tables import Table
    from ragmoe.evaluation.task import load_task

    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise ConfigError(
            f"there is no task (*.yaml) in {folder}", hint="ragmoe eval ls DIR, or ragmoe eval run FILE.yaml"
        )
    rows = []
    for file in files:
        try:
            task = load_task(file)
            rows.append(
                {"task": file.stem, "file": str(file), "setting": task.setting_name, "description": task.description}
            )
        except ConfigError as error:
            rows.append({"task": file.stem, "file": str(file), "setting": "wrong", "description": error.message})
    if as_json:
        print_json(rows)
        return
    cells = [[row["task"], row["setting"], " ".join(row["description"].split())] for row in rows]
    note = (
        f"Evaluate one: ragmoe eval run {rows[0]['task'] if folder == _TASKS else files[0]} --model BUNDLE --index DIR"
    )
    print_tables([Table(f"Tasks in {folder}", ["task", "setting", "what it is"], cells, note=note, labels=3)])


@app.command(epilog=_COMPARE_EXAMPLES)
def compare(
    run_a: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_A", help="Folder of an evaluation (--out), of one task or of several.", show_default=False
        ),
    ],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of another.", show_default=False)],
    metric: Annotated[str, typer.Option(metavar="METRIC", help="f1, em, f1_thresholded or em_thresholded.")] = "f1",
    as_json: JsonOption = False,
) -> None:
    """Show by how much run A is better than run B, with the 95 % interval; both must have asked the same questions."""
    from ragmoe.evaluation import compare as compare_samples
    from ragmoe.evaluation import find_runs
    from ragmoe.evaluation.perturbation import REAL
    from ragmoe.evaluation.report import few_documents
    from ragmoe.evaluation.scoring import SCORES
    from ragmoe.evaluation.tables import Table, bounds, number

    if metric not in SCORES:
        raise UsageError(f"there is no metric {metric!r}; there are: {', '.join(SCORES)}")
    found = []
    of_a, of_b = find_runs(run_a), find_runs(run_b)
    pairs = _pairs(of_a, of_b, run_a, run_b)
    alone = [] if len(of_a) == len(of_b) == 1 else sorted({*of_a} ^ {*of_b})
    for a, b in pairs:
        setting = a.setting if a.setting == b.setting else f"{a.setting} − {b.setting}"
        result = compare_samples([a.samples[REAL]], [b.samples[REAL]], metric=metric, setting=setting)
        found.append((a.name, result))
    if as_json:
        from dataclasses import asdict

        compared = [{"task": task, **asdict(c)} for task, c in found]
        print_json({"a": str(run_a), "b": str(run_b), "comparisons": compared, "left_out": alone})
        return
    for task, c in found:
        rows = [[d, number(v[0], 2, sign=True), bounds(v[1], v[2], sign=True)] for d, v in c.per_domain.items()]
        rows.append(["macro", number(c.difference, 2, sign=True), bounds(c.low, c.high, sign=True)])
        note = f"{c.n} questions, resampled by {c.documents} documents; {c.left_out} left out for want of a score."
        note += few_documents(c.per_domain_documents)
        title = f"{task} ({c.setting}): {metric} of {run_a} minus {run_b}"
        print_tables([Table(title, ["domain", "difference", "95 % interval"], rows, note=note)])
    if alone:
        typer.echo(f"not compared, since one of the two lacks them: {', '.join(alone)}", err=True)


@app.command(epilog=_HARNESS_EXAMPLES, context_settings={"ignore_unknown_options": True})
def harness(
    words: Annotated[list[str], typer.Argument(metavar="WORDS", help="What lm-eval is told.", show_default=False)],
) -> None:
    """Run lm-evaluation-harness, which then knows the model ragmoe (extra lm-eval)."""
    from ragmoe.evaluation.lm_eval import main

    main(words)


app.command(epilog=EXPERIMENT_EXAMPLES)(experiment)
app.command(epilog=REPORT_EXAMPLES)(report)


def find_task(name: str) -> Task:
    """A task by its file, or by its name in ``eval/tasks``."""
    from ragmoe.evaluation.task import load_task

    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        return load_task(path)
    known = sorted(file.stem for file in _TASKS.glob("*.yaml"))
    if name not in known:
        there = ", ".join(known) or "none"
        raise UsageError(f"there is no task file {name!r}; tasks in {_TASKS}: {there}", hint="ragmoe eval ls")
    return load_task(_TASKS / f"{name}.yaml")


def _load_tasks(names: list[str], limit: int | None) -> list[Task]:
    """The tasks by file or name, their questions looked at; what cannot be asked is told on stderr."""
    from ragmoe.evaluation.items import check_gold

    tasks = [find_task(name).limited(limit) for name in names]
    if twice := {task.name for task in tasks if [t.name for t in tasks].count(task.name) > 1}:
        raise UsageError(f"two tasks are called {min(twice)!r}; their results would overwrite each other")
    for task in tasks:
        if told := check_gold(task, task.load_questions()):
            typer.echo(told, err=True)
    return tasks


def _evaluate(
    model: Path, index: Path | None, tasks: list[tuple[Task, Path]], resume: bool, show: Show, thrift: Thrift
) -> list[Results]:
    """Evaluate the model on tasks, each with its folder; whatever may be missing is looked for before it is loaded."""
    from ragmoe.evaluation import Retrieval, evaluate
    from ragmoe.evaluation.opening import index_of_task
    from ragmoe.generation.generator import is_generator
    from ragmoe.models import check_bundle

    if not is_generator(model):
        check_bundle(model)
    shared: dict[Path, Retrieval] = {}
    opened = [index_of_task(task, given=index, progress=show.stage) for task, _ in tasks]
    name = thrift.name(model)
    if resume:
        _require_same(tasks, name, opened[0] if index else None)
    reader = thrift.load(model)
    results = []
    for (task, folder), its_index in zip(tasks, opened, strict=True):
        retrieval = shared.setdefault(its_index.folder, Retrieval(its_index))
        result = evaluate(
            reader,
            task,
            retrieval.index,
            out=folder,
            resume=resume,
            progress=show.questions,
            retrieval=retrieval,
            name=name,
        )
        _write_report(result, folder)
        results.append(result)
    return results


def _require_same(tasks: list[tuple[Task, Path]], model: str, given: Index | None) -> None:
    """UsageError where the command asks for another evaluation than the finished one that it would replace.

    Weights, questions or documents that have changed since make no other one: there its figures are out of date.
    """
    from ragmoe.evaluation.results import RESULTS_NAME, Results

    for task, folder in tasks:
        if not (folder / RESULTS_NAME).is_file():
            continue
        there = Results.load(folder)
        limit, now = there.task["limit_per_domain"], task.limit_per_domain
        said = {
            f"--limit {limit}" if limit else "all questions of each domain": limit != now,
            f"the model {there.model}": there.model != model,
            "another index": given is not None and there.index_digest != given.digest,
            **{f"{key}: {there.task[key]}": there.task[key] != getattr(task, key) for key in _ASKED_BY},
        }
        if differing := [what for what, differs in said.items() if differs]:
            raise UsageError(
                f"{folder} holds a finished evaluation of {' and '.join(differing)}, which would be replaced",
                hint="give another folder with --out, or --no-resume to replace it",
            )


def _pairs(
    a: dict[str, Results], b: dict[str, Results], folder_a: Path, folder_b: Path
) -> list[tuple[Results, Results]]:
    """The tasks that both have; two single runs are compared whatever their tasks are called."""
    if len(a) == len(b) == 1:
        return [(next(iter(a.values())), next(iter(b.values())))]
    common = [name for name in a if name in b]
    if not common:
        raise DataError(f"no task in common: {folder_a} has {', '.join(a)}; {folder_b} has {', '.join(b)}")
    return [(a[name], b[name]) for name in common]


def _tables(result: Results) -> list[Table]:
    from ragmoe.evaluation.report import report

    return report({result.model: [result]})


def _write_report(result: Results, folder: Path) -> None:
    from ragmoe.evaluation.report import to_markdown
    from ragmoe.evaluation.samples import write_text

    write_text(folder / "report.md", to_markdown(_tables(result), result.name))
