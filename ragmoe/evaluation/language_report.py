"""The result of an experiment with language models: what is finished is gathered and compared; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from ragmoe._errors import DataError
from ragmoe.evaluation.experiment import VALID, Experiment, LanguageExperiment
from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.experiment_report import Outcome, command_of, default_folder, head, of_finished, write
from ragmoe.evaluation.language_results import FILE, LanguageResults, results_place
from ragmoe.evaluation.loss_figure import Curve
from ragmoe.evaluation.machine import commit
from ragmoe.evaluation.perplexity import DocumentLoss, Perplexity, compare_perplexity, perplexity
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.report import comparison_table
from ragmoe.evaluation.result import ArmResult, ComparisonResult, DomainResult, Result
from ragmoe.evaluation.statistics import Comparison
from ragmoe.evaluation.tables import NONE, Table, bounds, number
from ragmoe.evaluation.training_gap import training_gap

# Results of one arm, one a seed; by arm; by setting.
Arm = Sequence[LanguageResults]
Arms = Mapping[str, Arm]
Runs = Mapping[str, Arms]
Triples = Sequence[tuple[str, str, Comparison]]
Losses = Sequence[Sequence[DocumentLoss]]


def report_language_experiment(experiment: LanguageExperiment, *, out: str | Path | None = None) -> Outcome:
    """Write the result of an experiment from what was run already.

    Raises:
        DataError: nothing of it was run there.
        ConfigError: an arm there was trained with another configuration, or over another index than the others.
    """
    root = Path(out) if out else default_folder(experiment)
    folder = ExperimentFolder(experiment, root)
    digests = {setting: _measured_last(folder, setting) for setting in experiment.settings}
    digests = {setting: digest for setting, digest in digests.items() if digest}
    if not digests:
        raise DataError(
            f"{root} holds nothing of the experiment {experiment.name}: no arm has predicted a document there",
            hint=command_of(experiment, out=out),
        )
    folder.index = folder.used_index([])
    folder.check_arms(root, moved=True)
    outcome = gather_language(folder, digests, command_of(experiment))
    outcome.written = write(outcome)
    return outcome


def _measured_last(folder: ExperimentFolder, setting: str) -> str:
    """The digest of the documents of the newest results, empty without any; an arm of others is not measured yet."""
    experiment = folder.experiment
    places = [results_place(folder, arm, seed, setting) for arm in experiment.arm_names for seed in experiment.seeds]
    found = [(file.stat().st_mtime_ns, place) for place in places if (file := place / FILE).is_file()]
    newest = [results for _, place in sorted(found, reverse=True) if (results := LanguageResults.load(place))]
    return newest[0].documents if newest else ""


def gather_language(folder: ExperimentFolder, digests: Mapping[str, str], command: str) -> Outcome:
    """Load what is finished, compare it, and make its tables.

    Args:
        digests: by setting, of the documents and the index that count (see ``documents_digest``).
        command: how it is made again.
    """
    experiment = folder.experiment
    assert isinstance(experiment, LanguageExperiment)
    runs, missing = _finished(folder, experiment, digests)
    command = of_finished(command, next(iter(runs.values())), missing)
    compared = _compare(experiment, runs)
    figures = {setting: _perplexities(of_setting) for setting, of_setting in runs.items()}
    first = next(iter(runs))
    seconds = {arm: folder.seconds(arm) for arm in runs[first]}
    result = Result(
        experiment=experiment.name,
        command=command,
        commit=commit(experiment.folder),
        machine=folder.machine(),
        seeds=experiment.seeds,
        arms={arm: _arm_result(of_arm, figures[first][arm], seconds[arm]) for arm, of_arm in runs[first].items()},
        comparisons=[
            ComparisonResult(
                a=a, b=b, metric=c.metric, setting=c.setting, difference=c.difference, low=c.low, high=c.high
            )
            for a, b, both in compared
            for c in both
        ],
    )
    percent = [(a, b, both[0]) for a, b, both in compared]
    reference = experiment.reference
    tables = [
        *(_perplexity_table(setting, found) for setting, found in figures.items() if found),
        comparison_table(percent),
        *(_domain_table([t for t in percent if t[2].setting.partition("+")[0] == setting]) for setting in runs),
        _last_expert_table(runs) if len(runs) > 1 and runs[first] else None,
        training_gap(_comparable_losses(folder, reference), reference),
        _arm_table(runs[first], experiment.notes, seconds, reference) if runs[first] else None,
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
        lines=head(folder, result, missing, list(experiment.settings)),
    )


def _comparable_losses(folder: ExperimentFolder, reference: str) -> dict[str, list[Curve]]:
    """The losses of arms that learned from the same text as the reference, one curve a seed."""
    experiment, otherwise = folder.experiment, folder.learning_otherwise(reference)
    arms = [arm for arm in experiment.arms if arm not in otherwise]
    return {arm: [folder.losses(arm, seed) for seed in experiment.seeds] for arm in arms}


def _finished(
    folder: ExperimentFolder, experiment: LanguageExperiment, digests: Mapping[str, str]
) -> tuple[Runs, list[str]]:
    """What is finished in every setting, and the arms and seeds that are not."""
    runs: dict[str, dict[str, list[LanguageResults]]] = {setting: {} for setting in experiment.settings}
    missing = []
    for arm in experiment.arm_names:
        whole: dict[int, dict[str, LanguageResults]] = {}
        for seed in experiment.seeds:
            found = {name: LanguageResults.load(results_place(folder, arm, seed, name)) for name in runs}
            counted = {name: r for name, r in found.items() if r is not None and r.documents == digests.get(name)}
            # A gate that sees no neighbours is shown no others either.
            wanted = {REAL, *experiment.perturbations}
            whole_ones = [name for name, r in counted.items() if r.losses.keys() in ({REAL}, wanted)]
            if len(whole_ones) == len(runs) and folder.trained(arm, seed):
                whole[seed] = counted
            else:
                missing.append(f"{arm} seed {seed}")
        if len(whole) == len(experiment.seeds):
            for name, of_setting in runs.items():
                of_setting[arm] = [counted[name] for counted in whole.values()]
    return runs, missing


def _compare(experiment: Experiment, runs: Runs) -> list[tuple[str, str, tuple[Comparison, Comparison]]]:
    """By setting the experiment's comparisons of finished arms, then what each arm makes of other neighbours; each in
    per cent and in points."""

    def both(a: Losses, b: Losses, setting: str) -> tuple[Comparison, Comparison]:
        return compare_perplexity(a, b, setting=setting), compare_perplexity(a, b, setting=setting, relative=False)

    found = []
    for setting, arms in runs.items():
        for a, b in experiment.comparisons:
            if {a, b} <= arms.keys():
                found.append((a, b, both(_losses(arms[a]), _losses(arms[b]), setting)))
        for arm, of_arm in arms.items():
            # Of seeds that were measured at different times, what all of them have.
            shown = [name for name in of_arm[0].losses if all(name in results.losses for results in of_arm)]
            for name in shown:
                if name != REAL:
                    found.append((arm, arm, both(_losses(of_arm, name), _losses(of_arm), f"{setting}+{name}")))
    return found


def _perplexities(arms: Arms) -> dict[str, Perplexity]:
    return {arm: _mean_perplexity(of_arm) for arm, of_arm in arms.items()}


def _losses(of_arm: Arm, condition: str = REAL) -> list[list[DocumentLoss]]:
    return [results.losses[condition] for results in of_arm]


def _mean_perplexity(of_arm: Arm) -> Perplexity:
    """Of an arm, after the losses of each document are averaged over seeds."""
    by_document = zip(*_losses(of_arm), strict=True)
    return perplexity(
        [
            DocumentLoss(losses[0].document, losses[0].domain, fmean(x.nats for x in losses), losses[0].tokens)
            for losses in by_document
        ]
    )


def _arm_result(of_arm: Arm, found: Perplexity, seconds: float | None) -> ArmResult:
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


def _routing(of_arm: Arm, key: str) -> float | None:
    values = [results.routing[key] for results in of_arm if results.routing is not None]
    return fmean(values) if values else None


def _perplexity_table(setting: str, figures: Mapping[str, Perplexity]) -> Table:
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
        "Perplexity" if setting == VALID else f"Perplexity, {setting}",
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
    named = compared[0][2].setting.partition("+")[0]
    title = "Difference of perplexity by domain, %" + (f", {named}" if named != VALID else "")
    rows = [[f"{a} − {b}", c.setting, *(_percent(*c.per_domain[d]) for d in domains)] for a, b, c in compared]
    return Table(title, ["arms", "setting", *domains], rows, labels=2)


def _percent(difference: float, low: float, high: float) -> str:
    return f"{number(difference, 2, sign=True)} {bounds(low, high, 2, sign=True)}"


def _last_expert_table(runs: Runs) -> Table:
    """How far each setting goes to the last expert, which is the new one where one was added."""
    rows = [[arm, *(number(_last_load(arms[arm])) for arms in runs.values())] for arm in next(iter(runs.values()))]
    return Table("Choices that fall on the last expert, %", ["arm", *runs], rows, note="Means over layers and seeds.")


def _last_load(of_arm: Arm) -> float | None:
    loads = [layer["load"][-1] for results in of_arm if results.routing for layer in results.routing["layers"]]
    return 100 * fmean(loads) if loads else None


def _arm_table(runs: Arms, notes: Mapping[str, str], seconds: Mapping[str, float | None], reference: str) -> Table:
    dense = runs[reference][0].parameters["active"] if reference in runs else None
    rows = []
    for arm, of_arm in runs.items():
        sizes = of_arm[0].parameters
        share = NONE if dense is None else f"{100 * (sizes['active'] / dense - 1):+.2f} %"
        routing = [number(_routing(of_arm, key), 3) for key in ("gate_entropy", "normalised_mi", "max_load")]
        rows.append([arm, f"{sizes['active']:,}", share, f"{sizes['total']:,}", number(seconds[arm], 0), *routing])
    matched = "".join(f"\n- {arm}: {notes[arm].strip()}" for arm in runs if arm in notes)
    return Table(
        "Parameters and routing",
        ["arm", "active", f"against {reference}", "total", "seconds", "gate entropy", "norm. MI", "max load"],
        rows,
        note="Entropy in nats; mutual information of domain and expert; means over layers."
        + (f"\n{matched}" if matched else ""),
    )
