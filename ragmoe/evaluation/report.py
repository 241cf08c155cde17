"""Reports: one run, or several arms beside each other, as tables for the terminal and for Markdown.

Everywhere an arm is the list of its runs, one a seed; figures are means over the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from ragmoe._words import many
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.results import Results
from ragmoe.evaluation.retrieval import METRICS
from ragmoe.evaluation.scoring import no_answer
from ragmoe.evaluation.statistics import FEW, Comparison, compare, interval, lost_domains
from ragmoe.evaluation.tables import NONE, Table, bounds, markdown, number

Arms = Mapping[str, Sequence[Results]]

_COLUMNS = 5


def report(arms: Arms, *, seconds: Mapping[str, float | None] | None = None) -> list[Table]:
    """All tables about one task. ``seconds``: training time by arm, where the arms were trained for this."""
    # Many arms are rows, and each metric has its own table, so that it stays narrow enough to be read.
    many = [quality(arms, [metric]).transposed("arm") for metric in ("f1", "em")] if len(arms) > _COLUMNS else None
    tables = [
        *(many or [quality(arms)]),
        properties(arms, seconds or {}),
        retrieval(arms),
        load(arms),
        lost(arms),
        perturbations(arms),
        kinds(arms),
    ]
    return [table for table in tables if table is not None]


def _single_questions(run: Results) -> str:
    """Of the documents resampled, how many are single questions since nobody knows of which document they are."""
    counted = [sample for sample in run.samples[REAL] if sample.answerable and sample.status == "ok"]
    unknown = sum(sample.doc_id == sample.id for sample in counted)
    return f", {unknown} of them single questions whose document is not known" if unknown else ""


# Said where it makes a difference.
_PAST = " Past the threshold, unanswerable questions count too: to answer none is right there."


def quality(arms: Arms, metrics: Sequence[str] = ("f1", "em")) -> Table:
    """Metrics by domain and macro with their spread over seeds, the interval of the first, and coverage."""
    first = next(iter(arms.values()))[0]
    real, every = first.real, list(arms.values())
    rows = [
        [domain, _n(block), *(_means(runs, metrics, _domain(domain)) for runs in every)]
        for domain, block in real["per_domain"].items()
        if block["answerable"]
    ]
    rows.append(["macro", _n(real["macro"]), *(_means(runs, metrics, lambda r: r.real["macro"]) for runs in every)])
    main = metrics[0]
    spans = [interval([run.samples[REAL] for run in runs], metric=main) for runs in every]
    rows.append(
        [f"95 % of macro {main.upper()}", "", *(bounds(span.low, span.high) if span else NONE for span in spans)]
    )
    several = any(len(runs) > 1 for runs in every)
    if several:
        rows.append(["seeds", "", *(str(len(runs)) for runs in every)])
    past = [number(_mean(runs, _macro(f"{main}_thresholded"))) for runs in every]
    rows.append([f"{main.upper()} past threshold", "", *past])
    rows.append(["coverage", "", *(_coverage(runs) for runs in every)])
    return Table(
        f"{first.name} ({first.setting}): {' / '.join(metrics).upper()}",
        ["domain", "n", *arms],
        rows,
        note="Best guess on answerable questions, 0 to 100; macro is the mean over domains; the interval resamples "
        f"{real['macro']['documents']} documents within domains{_single_questions(first)}."
        + (_PAST if real["macro"]["answerable"] < real["macro"]["total"] else "")
        + (" ± is the standard deviation over seeds." if several else "")
        + few_documents(*(span.per_domain_documents for span in spans if span)),
    )


def properties(arms: Arms, seconds: Mapping[str, float | None]) -> Table:
    """Size, time and routing of each arm."""
    rows = []
    for name, runs in arms.items():
        routing = [
            number(_mean(runs, _nested("routing", key)), 3) for key in ("gate_entropy", "normalised_mi", "max_load")
        ]
        sizes = [_millions(runs[0].parameters.get(key)) for key in ("active", "total")]
        rows.append([name, *sizes, *([number(seconds.get(name), 0)] if seconds else []), *routing])
    columns = ["arm", "active", "total", *(["seconds"] if seconds else []), "gate entropy", "norm. MI", "max load"]
    return Table(
        "Parameters and routing",
        columns,
        rows,
        note="Entropy in nats; mutual information of domain and expert; load as a share; means over layers.",
    )


def retrieval(arms: Arms) -> Table | None:
    """Retrieval metrics by domain; the same for all arms, since all see the same index."""
    found = next((run.retrieval for runs in arms.values() for run in runs if run.retrieval), None)
    if found is None:
        return None
    rows = [
        [domain, str(block["n"]), *(number(block[m], 3) for m in METRICS)]
        for domain, block in found["per_domain"].items()
    ]
    rows.append(["mean", str(found["n"]), *(number(found["mean"][m], 3) for m in METRICS)])
    return Table("Retrieval", ["domain", "n", *METRICS], rows)


def load(arms: Arms) -> Table | None:
    """Share of the tokens' choices that fell on each expert, in per cent, by layer (of the first seed)."""
    rows: list[list[str]] = []
    names: list[str] = []
    every: list[list[str]] = []
    for name, runs in arms.items():
        routing = runs[0].real["routing"]
        every += [list(routing["experts"])] if routing else []
        for row in routing["layers"] if routing else []:
            rows.append([name, str(row["layer"]), *(f"{100 * share:.0f}" for share in row["load"])])
        names = max(names, routing["experts"] if routing else [], key=len)
    if not rows:
        return None
    # By name only where a column has the same expert in every arm.
    same = all(own == names[: len(own)] for own in every)
    heads = [_short(name) if same else str(place) for place, name in enumerate(names)]
    return Table(
        "Load per expert, %",
        ["arm", "layer", *heads],
        [row + [NONE] * (len(heads) + 2 - len(row)) for row in rows],
    )


def lost(arms: Arms) -> Table | None:
    """What limits and missing experts cost, by layer (of the first seed); None where nothing was lost."""
    rows = [
        [name, str(row["layer"]), *(f"{100 * row[key]:.1f}" for key in ("overflow", "unserved"))]
        for name, runs in arms.items()
        for row in (runs[0].real["routing"] or {}).get("layers", [])
        if "overflow" in row
    ]
    if not rows:
        return None
    return Table(
        "Choices and tokens lost, %",
        ["arm", "layer", "overflow", "unserved"],
        rows,
        note="Overflow: choices whose expert had no room; unserved: tokens that no expert served.",
    )


def perturbations(arms: Arms) -> Table | None:
    """What becomes of quality and of routing where the gate is shown other neighbours."""
    rows = []
    for name, runs in arms.items():
        conditions = [condition for condition in runs[0].conditions if condition != REAL]
        if conditions and not any(runs[0].conditions[condition] for condition in conditions):
            rows.append([name, "sees none", *[NONE] * 6])
            continue
        rows += [[name, condition, *_change(runs, condition)] for condition in conditions]
    if not rows:
        return None
    return Table(
        "Other neighbours shown to the gate",
        ["arm", "neighbours", "F1", "change", "95 %", "routing shift", "entropy", "MI"],
        rows,
        note="Change of macro F1, with interval; routing shift: share of a question's load that goes to other experts.",
        labels=2,
    )


def kinds(arms: Arms) -> Table | None:
    """Yes/no/maybe questions, and how well the unanswerable are told."""
    rows = []
    for name, runs in arms.items():
        yesno = [_mean(runs, _nested("yesno", key)) for key in ("accuracy", "macro_f1")]
        # From the samples: evaluations that were made before these shares were told have them too.
        told = [no_answer(run.samples[REAL]) or {} for run in runs]
        none = [_mean_of([one.get(key) for one in told]) for key in ("auroc", "rejected", "answered", "f1_all")]
        if any(value is not None for value in [*yesno, *none]):
            rows.append([name, *map(number, yesno), number(none[0], 3), *map(number, none[1:])])
    if not rows:
        return None
    return Table(
        "Yes/no/maybe, and no answer",
        ["arm", "y/n accuracy", "y/n macro F1", "no-answer AUROC", "rejected", "answered", "F1 over all"],
        rows,
        note="Rejected: of the questions that nothing answers, those that got no answer, in per cent; answered: of the "
        "others, those that got one.",
    )


def comparison_table(comparisons: Sequence[tuple[str, str, Comparison]]) -> Table | None:
    """Differences with their intervals, and the spread over seeds beside them."""
    if not comparisons:
        return None
    rows = [
        [
            f"{a} − {b}",
            c.setting,
            c.metric,
            number(c.difference, 2, sign=True),
            # A tenth of a point says little of F1, and much of a perplexity.
            bounds(c.low, c.high, 2 if c.metric.endswith("percent") else 1, sign=True),
            f"{number(c.seed_spread.get('a'), 2)} / {number(c.seed_spread.get('b'), 2)}",
            str(c.n) + (f" of {c.n + c.left_out}" if c.left_out else ""),
        ]
        for a, b, c in comparisons
    ]
    few = any(min(c.seeds) < 3 for _, _, c in comparisons)
    return Table(
        "Comparisons",
        ["arms", "setting", "metric", "difference", "95 % interval", "s.d. over seeds", "n"],
        rows,
        note="Paired bootstrap over documents within domains, after averaging the seeds of each question."
        + (" Fewer than three seeds: what another seed would change is not known." if few else "")
        + few_documents(*(c.per_domain_documents for _, _, c in comparisons)),
        labels=3,
    )


def few_documents(*counts: Mapping[str, int]) -> str:
    """A warning about domains with so few documents that intervals are too narrow; empty where there are none.

    Args:
        counts: documents by domain, of each interval that is shown.
    """
    fewest: dict[str, int] = {}
    for domain, n in (pair for by_domain in counts for pair in by_domain.items()):
        fewest[domain] = min(n, fewest.get(domain, n))
    few = [f"{domain} {n}" for domain, n in fewest.items() if n < FEW]
    return f" Intervals are too narrow where a domain has fewer than {FEW} documents: {', '.join(few)}." if few else ""


def to_markdown(tables: Sequence[Table], title: str, lines: Sequence[str] = ()) -> str:
    """A whole Markdown file."""
    head = f"# {title}\n\n" + "".join(f"{line}\n" for line in lines)
    return head + ("\n" if lines else "") + markdown(tables)


def _mean(runs: Sequence[Results], get: Callable[[Results], float | None]) -> float | None:
    return _mean_of([get(run) for run in runs])


def _mean_of(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if len(present) == len(values) else None


def _macro(key: str) -> Callable[[Results], float | None]:
    return lambda run: run.real["macro"][key]


def _means(runs: Sequence[Results], metrics: Sequence[str], get: Callable[[Results], Mapping[str, Any]]) -> str:
    """Each metric's mean over seeds with its standard deviation."""
    cells = []
    for metric in metrics:
        values = [value for run in runs if (value := get(run).get(metric)) is not None]
        whole = bool(values) and len(values) == len(runs)
        spread = f" ± {number(stdev(values))}" if whole and len(values) > 1 else ""
        cells.append(number(fmean(values) if whole else None) + spread)
    return " / ".join(cells)


def _nested(block: str, key: str) -> Callable[[Results], float | None]:
    return lambda run: (run.real[block] or {}).get(key)


def _domain(name: str) -> Callable[[Results], Mapping[str, Any]]:
    return lambda run: run.real["per_domain"].get(name, {})


def _n(block: Mapping[str, Any]) -> str:
    return str(block["n"]) if block["n"] == block["answerable"] else f"{block['n']} of {block['answerable']}"


def _coverage(runs: Sequence[Results]) -> str:
    share = _mean(runs, _macro("coverage"))
    errors = sum(run.real["macro"]["errors"] for run in runs)
    return NONE if share is None else f"{100 * share:.1f} %" + (f", {many(errors, 'error')}" if errors else "")


def _change(runs: Sequence[Results], condition: str) -> list[str]:
    def mean(get: Callable[[Any], float | None]) -> float | None:
        return _mean(runs, lambda run: get(run.conditions[condition]))

    real, other = ([run.samples[name] for run in runs] for name in (REAL, condition))
    change = None if lost_domains([*other, *real]) else compare(other, real)
    return [
        number(mean(lambda b: b["macro"]["f1"])),
        number(change.difference if change else None, 2, sign=True),
        bounds(change.low, change.high, sign=True) if change else NONE,
        number(mean(lambda b: b["change"]["routing_shift"]), 3),
        number(mean(lambda b: (b["routing"] or {}).get("gate_entropy")), 3),
        number(mean(lambda b: (b["routing"] or {}).get("normalised_mi")), 3),
    ]


def _millions(count: int | None) -> str:
    return NONE if count is None else f"{count / 1e6:.2f} M"


def _short(name: str) -> str:
    """A column head: the number of an expert without a name of its own, else at most eight letters."""
    return name.removeprefix("expert ")[:8]
