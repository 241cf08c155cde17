"""The result of an experiment with language models: what is finished is gathered and compared; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from ragmoe._errors import DataError
from ragmoe.evaluation.experiment import DENSE, Experiment, LanguageExperiment
from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.experiment_report import Outcome, command_of, default_folder, head, write
from ragmoe.evaluation.language_results import LanguageResults
from ragmoe.evaluation.machine import commit
from ragmoe.evaluation.perplexity import DocumentLoss, Perplexity, compare_perplexity, perplexity
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.report import comparison_table
from ragmoe.evaluation.result import ArmResult, ComparisonResult, DomainResult, Result
from ragmoe.evaluation.statistics import Comparison
from ragmoe.evaluation.tables import NONE, Table, bounds, number

METRIC = "perplexity_percent"
Runs = Mapping[str, Sequence[LanguageResults]]
Triples = Sequence[tuple[str, str, Comparison]]


def report_language_experiment(experiment: LanguageExperiment, *, out: str | Path | None = None) -> Outcome:
    """Write the result of an experiment from what was run already.

    Raises:
        DataError: nothing of it was run there.
    """
    root = Path(out) if out else default_folder(experiment)
    folder = ExperimentFolder(experiment, root)
    places = [folder.place(arm, seed) for arm in experiment.arm_names for seed in experiment.seeds]
    found = [results for place in places if (results := LanguageResults.load(place)) is not None]
    if not found:
        raise DataError(
            f"{root} holds nothing of the experiment {experiment.name}: no arm has predicted a document there",
            hint=command_of(experiment),
        )
    # What was measured last is what counts: an arm of other documents has to be measured again.
    outcome = gather_language(folder, found[-1].documents, command_of(experiment))
    outcome.written = write(outcome)
    return outcome


def gather_language(folder: ExperimentFolder, digest: str, command: str) -> Outcome:
    """Load what is finished, compare it, and make its tables.

    Args:
        digest: of the documents and the index that count (see ``documents_digest``).
        command: how it is made again.
    """
    experiment = folder.experiment
    runs: dict[str, list[LanguageResults]] = {}
    missing = []
    for arm in experiment.arm_names:
        found = [LanguageResults.load(folder.place(arm, seed)) for seed in experiment.seeds]
        whole = [results for results in found if results is not None and results.documents == digest]
        missing += [f"{arm} seed {s}" for s, r in zip(experiment.seeds, found, strict=True) if r not in whole]
        if len(whole) == len(experiment.seeds):
            runs[arm] = whole
    compared = _compare(experiment, runs)
    seconds = {arm: folder.seconds(arm) for arm in runs}
    figures = {arm: _mean_perplexity(of_arm) for arm, of_arm in runs.items()}
    result = Result(
        experiment=experiment.name,
        command=command,
        commit=commit(experiment.folder),
        machine=folder.machine(),
        seeds=experiment.seeds,
        arms={arm: _arm_result(of_arm, figures[arm], seconds[arm]) for arm, of_arm in runs.items()},
        comparisons=[
            ComparisonResult(
                a=a, b=b, metric=c.metric, setting=c.setting, difference=c.difference, low=c.low, high=c.high
            )
            for a, b, c in compared
        ],
    )
    tables = [
        _perplexity_table(figures) if runs else None,
        comparison_table(compared),
        _domain_table(compared),
        _arm_table(runs, experiment.notes, seconds) if runs else None,
    ]
    return Outcome(
        experiment=experiment,
        folder=folder.root,
        tasks=[],
        result=result,
        summary=[table for table in tables if table is not None],
        details=[],
        runs={},
        missing=missing,
        lines=head(folder, result, missing),
    )


def _compare(experiment: Experiment, runs: Runs) -> list[tuple[str, str, Comparison]]:
    """The experiment's comparisons of finished arms, then what each arm makes of other neighbours."""
    found = [
        (a, b, compare_perplexity(_losses(runs[a]), _losses(runs[b]), setting="valid"))
        for a, b in experiment.comparisons
        if {a, b} <= runs.keys()
    ]
    for arm, of_arm in runs.items():
        for name in of_arm[0].losses:
            if name != REAL:
                change = compare_perplexity(_losses(of_arm, name), _losses(of_arm), setting=f"valid+{name}")
                found.append((arm, arm, change))
    return found


def _losses(of_arm: Sequence[LanguageResults], condition: str = REAL) -> list[list[DocumentLoss]]:
    return [results.losses[condition] for results in of_arm]


def _mean_perplexity(of_arm: Sequence[LanguageResults]) -> Perplexity:
    """Of an arm, after the losses of each document are averaged over seeds."""
    by_document = zip(*_losses(of_arm), strict=True)
    return perplexity(
        [
            DocumentLoss(losses[0].document, losses[0].domain, fmean(x.nats for x in losses), losses[0].tokens)
            for losses in by_document
        ]
    )


def _arm_result(of_arm: Sequence[LanguageResults], found: Perplexity, seconds: float | None) -> ArmResult:
    routing = {key: _routing(of_arm, key) for key in ("normalised_mi", "gate_entropy", "max_load")}
    return ArmResult(
        macro_f1=None,
        macro_em=None,
        per_domain={domain: DomainResult(f1=None, em=None, n=tokens) for domain, tokens in found.tokens.items()},
        perplexity=found.mean,
        active_params=of_arm[0].parameters["active"],
        total_params=of_arm[0].parameters["total"],
        seconds=seconds,
        **routing,
    )


def _routing(of_arm: Sequence[LanguageResults], key: str) -> float | None:
    values = [results.routing[key] for results in of_arm if results.routing is not None]
    return fmean(values) if values else None


def _perplexity_table(figures: Mapping[str, Perplexity]) -> Table:
    domains = list(next(iter(figures.values())).per_domain)
    rows = [
        [
            arm,
            *(number(found.per_domain[d][0], 2) for d in domains),
            number(found.mean, 2),
            bounds(found.low, found.high),
        ]
        for arm, found in figures.items()
    ]
    first = next(iter(figures.values()))
    return Table(
        "Perplexity",
        ["arm", *domains, "mean", "95 % of the mean"],
        rows,
        note="exp of the mean loss a token; the mean over domains is geometric. Intervals resample documents: "
        + ", ".join(f"{d} {first.documents[d]} of {first.tokens[d]:,} tokens" for d in domains)
        + ".",
    )


def _domain_table(compared: Triples) -> Table | None:
    """The comparisons by domain."""
    if not compared:
        return None
    domains = list(compared[0][2].per_domain)
    rows = [[f"{a} − {b}", c.setting, *(_percent(*c.per_domain[d]) for d in domains)] for a, b, c in compared]
    return Table("Difference of perplexity by domain, %", ["arms", "setting", *domains], rows, labels=2)


def _percent(difference: float, low: float, high: float) -> str:
    return f"{number(difference, 2, sign=True)} {bounds(low, high, 2, sign=True)}"


def _arm_table(runs: Runs, notes: Mapping[str, str], seconds: Mapping[str, float | None]) -> Table:
    dense = runs[DENSE][0].parameters["active"] if DENSE in runs else None
    rows = []
    for arm, of_arm in runs.items():
        sizes = of_arm[0].parameters
        share = NONE if dense is None else f"{100 * (sizes['active'] / dense - 1):+.2f} %"
        routing = [number(_routing(of_arm, key), 3) for key in ("gate_entropy", "normalised_mi", "max_load")]
        rows.append([arm, f"{sizes['active']:,}", share, f"{sizes['total']:,}", number(seconds[arm], 0), *routing])
    matched = "".join(f"\n- {arm}: {notes[arm].strip()}" for arm in runs if arm in notes)
    return Table(
        "Parameters and routing",
        ["arm", "active", "against dense", "total", "seconds", "gate entropy", "norm. MI", "max load"],
        rows,
        note="Entropy in nats; mutual information of domain and expert; means over layers."
        + (f"\n{matched}" if matched else ""),
    )
