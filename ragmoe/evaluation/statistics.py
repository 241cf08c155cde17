"""Intervals and comparisons: a bootstrap over documents.

Questions about one document are no independent draws, so what is resampled is the document, within its domain
(a stratified cluster bootstrap); a comparison resamples the differences of the same questions (paired). Several seeds
of an arm are averaged per question first: an interval bounds what other questions would have changed, and
``seed_spread`` says what other seeds would have.

C documents of a domain, B resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import numpy as np

from ragmoe._errors import DataError
from ragmoe.evaluation.samples import Sample

RESAMPLES = 10_000
SEED = 0
# Resampling a handful of documents says little about others: with fewer than this the interval is called too narrow.
FEW = 10
# B times C documents are drawn; so many at a time.
_NUMBERS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A macro figure in 0..100 with its 95 % interval.

    Attributes:
        mean: the mean over domains.
        per_domain: each domain's mean, low and high.
        stderr: standard deviation over resamples; ``per_domain_stderr`` by domain.
        n: questions; ``documents``: what was resampled, and ``per_domain_documents`` by domain: of fewer than ``FEW``
            an interval is too narrow.
    """

    mean: float
    low: float
    high: float
    stderr: float
    per_domain: dict[str, tuple[float, float, float]]
    per_domain_stderr: dict[str, float]
    n: int
    documents: int
    per_domain_documents: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """What arm a is better by than arm b, in points of 0..100.

    Attributes:
        difference: a minus b, of the mean over domains; ``low`` and ``high`` bound its 95 % interval.
        per_domain: each domain's difference, low and high.
        n: questions compared; ``left_out``: those that one of the runs has no score for.
        documents: as in ``Interval``, and so ``per_domain_documents``.
        seed_spread: standard deviation of each arm's macro figure over its seeds; None for a single seed.
    """

    metric: str
    setting: str
    difference: float
    low: float
    high: float
    per_domain: dict[str, tuple[float, float, float]]
    n: int
    documents: int
    per_domain_documents: dict[str, int]
    left_out: int = 0
    seeds: tuple[int, int] = (1, 1)
    seed_spread: dict[str, float | None] = field(default_factory=dict)


def compare(
    a_samples: Sequence[Sequence[Sample]],
    b_samples: Sequence[Sequence[Sample]],
    *,
    metric: str = "f1",
    setting: str = "",
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare two arms, each one list of samples a seed.

    Raises:
        DataError: they did not ask the same questions, or a domain has none that has a score in every run: without it
            the mean over domains would be another one.
    """
    runs = [*a_samples, *b_samples]
    _require_same_questions(runs)
    tables = [scores_of(run, metric) for run in runs]
    ids = [sample.id for sample in runs[0] if all(sample.id in table for table in tables)]
    if not ids:
        raise DataError(f"no question has a {metric} in every run: there is nothing to compare")
    place = {sample.id: sample for sample in runs[0]}
    if lost := lost_domains(runs, metric):
        raise DataError(
            f"of {', '.join(lost)} no question has a {metric} in every run: the mean over domains would be another one",
            hint="what failed is read again by the command that evaluated it",
        )
    of_a, of_b = tables[: len(a_samples)], tables[len(a_samples) :]
    differences = [fmean(t[i] for t in of_a) - fmean(t[i] for t in of_b) for i in ids]
    result = _interval(differences, [place[i] for i in ids], resamples, seed)
    return Comparison(
        metric=metric,
        setting=setting,
        difference=result.mean,
        low=result.low,
        high=result.high,
        per_domain=result.per_domain,
        n=len(ids),
        documents=result.documents,
        per_domain_documents=result.per_domain_documents,
        left_out=len(_counting(runs, metric)) - len(ids),
        seeds=(len(of_a), len(of_b)),
        seed_spread={"a": seed_spread(a_samples, metric), "b": seed_spread(b_samples, metric)},
    )


def interval(
    runs: Sequence[Sequence[Sample]], *, metric: str = "f1", resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """The macro figure of one arm, given as one list of samples a seed; None where a whole domain has no score."""
    _require_same_questions(runs)
    if lost_domains(runs, metric):
        return None
    tables = [scores_of(run, metric) for run in runs]
    place = {sample.id: sample for sample in runs[0]}
    ids = [name for name in place if all(name in table for table in tables)]
    if not ids:
        return None
    return _interval([fmean(t[i] for t in tables) for i in ids], [place[i] for i in ids], resamples, seed)


def lost_domains(runs: Sequence[Sequence[Sample]], metric: str = "f1") -> list[str]:
    """The domains that have questions which count, and none that has a score in every run."""
    tables = [scores_of(run, metric) for run in runs]
    counting = _counting(runs, metric)
    kept = {domain for name, domain in counting.items() if all(name in table for table in tables)}
    return sorted(set(counting.values()) - kept)


def _counting(runs: Sequence[Sequence[Sample]], metric: str) -> dict[str, str]:
    """The domain of each question that a metric counts, by its id: past the threshold also those nothing answers."""
    every = metric.endswith("thresholded")
    return {sample.id: sample.domain for run in runs for sample in run if sample.answerable or every}


def macro(run: Sequence[Sample], metric: str = "f1") -> float | None:
    """The mean over domains of a run's mean score, in 0..100."""
    by_domain: dict[str, list[float]] = defaultdict(list)
    scores = scores_of(run, metric)
    for sample in run:
        if sample.id in scores:
            by_domain[sample.domain].append(scores[sample.id])
    return 100 * fmean(fmean(values) for values in by_domain.values()) if by_domain else None


def seed_spread(runs: Sequence[Sequence[Sample]], metric: str = "f1") -> float | None:
    """Standard deviation of the macro figure over seeds, in points; None for fewer than two."""
    values = [value for run in runs if (value := macro(run, metric)) is not None]
    return stdev(values) if len(values) > 1 else None


def scores_of(run: Sequence[Sample], metric: str) -> dict[str, float]:
    """The scores of a run by question id; without those that have none."""
    scores = {sample.id: getattr(sample, metric) for sample in run if sample.status == "ok"}
    return {name: value for name, value in scores.items() if value is not None}


def question_mismatch(a: Sequence[Sample], b: Sequence[Sample]) -> str | None:
    """How the questions of two runs differ, in words with counts; None where they are the same."""
    of_a, of_b = {s.id: s.example for s in a}, {s.id: s.example for s in b}
    only_a, only_b = of_a.keys() - of_b.keys(), of_b.keys() - of_a.keys()
    changed = {name for name in of_a.keys() & of_b.keys() if of_a[name] != of_b[name]}
    differing = len(only_a) + len(only_b) + len(changed)
    if not differing:
        return None
    example = min(only_a or only_b or changed)
    return (
        f"{differing} questions differ: {len(only_a)} only in the first, {len(only_b)} only in the second, "
        f"{len(changed)} with other words or answers (for example {example})"
    )


def _require_same_questions(runs: Sequence[Sequence[Sample]]) -> None:
    for other in runs[1:]:
        if mismatch := question_mismatch(runs[0], other):
            raise DataError(
                f"these runs cannot be compared: {mismatch}", hint="evaluate both with the same task and limit"
            )


def _interval(values: Sequence[float], samples: Sequence[Sample], resamples: int, seed: int) -> Interval:
    """Resample documents within domains; ``values`` in -1..1, one a sample."""
    rng = np.random.default_rng(seed)
    clusters: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for value, sample in zip(values, samples, strict=True):
        clusters[sample.domain][sample.doc_id].append(100 * value)
    means: dict[str, float] = {}
    draws_DB: list[np.ndarray] = []
    for domain, documents in clusters.items():
        sums_C = np.array([sum(rows) for rows in documents.values()])
        sizes_C = np.array([len(rows) for rows in documents.values()])
        draws_DB.append(resample(sums_C, sizes_C, resamples, rng))
        means[domain] = float(sums_C.sum() / sizes_C.sum())
    drawn_B = np.mean(draws_DB, axis=0)
    low, high = np.percentile(drawn_B, [2.5, 97.5])
    bounds = {d: np.percentile(row, [2.5, 97.5]) for d, row in zip(means, draws_DB, strict=True)}
    return Interval(
        mean=fmean(means.values()),
        low=float(low),
        high=float(high),
        stderr=float(drawn_B.std()),
        per_domain={d: (means[d], float(bounds[d][0]), float(bounds[d][1])) for d in means},
        per_domain_stderr={d: float(row.std()) for d, row in zip(means, draws_DB, strict=True)},
        n=len(values),
        documents=sum(len(documents) for documents in clusters.values()),
        per_domain_documents={domain: len(documents) for domain, documents in clusters.items()},
    )


def resample(sums_C: np.ndarray, sizes_C: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """The mean of a domain in each resample, (B,): C documents drawn with replacement, all that each has.

    Args:
        sums_C: of each document the sum of its values; sizes_C: how many they are.
    """
    C = len(sums_C)
    block = max(1, _NUMBERS // C)
    draws = []
    for begin in range(0, resamples, block):
        # Several times faster than drawing how often each document occurs.
        drawn_BC = rng.integers(C, size=(min(block, resamples - begin), C))
        draws.append(sums_C[drawn_BC].sum(axis=1) / sizes_C[drawn_BC].sum(axis=1))
    return np.concatenate(draws)
