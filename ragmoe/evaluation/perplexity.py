"""Perplexity by domain, with intervals over documents, and by how much one model's differs from another's.

Perplexity is exp of the mean loss in nats over all tokens of a domain, long documents counting for more; the figure
over domains is exp of the mean of theirs, so that no domain counts for more than another. Intervals resample documents
within domains, as everywhere (see ``statistics``).

D domains, C documents of one, B resamples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from ragmoe._errors import DataError
from ragmoe.evaluation.statistics import RESAMPLES, SEED, Comparison, resample

if TYPE_CHECKING:
    from ragmoe.gates import Routing
    from ragmoe.moe import RoutingStatistics
    from ragmoe.neighbours import Neighbours
    from ragmoe.training.language import LanguageDataset


@dataclass(frozen=True, slots=True)
class DocumentLoss:
    """What a model's loss on one document is: ``nats`` over ``tokens`` tokens."""

    document: str
    domain: str
    nats: float
    tokens: int


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model with its 95 % interval.

    Attributes:
        mean: over domains; ``low`` and ``high`` bound it.
        per_domain: each domain's, low and high.
        tokens: by domain; ``documents`` likewise: of fewer than ``statistics.FEW`` an interval is too narrow.
    """

    mean: float
    low: float
    high: float
    per_domain: dict[str, tuple[float, float, float]]
    tokens: dict[str, int]
    documents: dict[str, int]


def document_losses(
    model: Any,
    data: LanguageDataset,
    *,
    shown: Callable[[int], Neighbours | None] | None = None,
    statistics: RoutingStatistics | None = None,
    batch_chunks: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[DocumentLoss]:
    """The loss of a model on each document, chunk by chunk with the neighbours of what precedes (none are dropped).

    Args:
        shown: other neighbours for a chunk, by its place; None means its own.
        statistics: counts the routing by domain.
        progress: called with chunks read and chunks in all.
    """
    from ragmoe.generation.likelihood import log_likelihoods
    from ragmoe.neighbours import Neighbours

    shown = shown or data.neighbours
    nats, tokens = [0.0] * len(data.documents), [0] * len(data.documents)
    for begin in range(0, len(data.chunks), batch_chunks):
        places = range(begin, min(begin + batch_chunks, len(data.chunks)))
        chunks = [data.chunks[place] for place in places]
        rows = [row for place in places if (row := shown(place)) is not None]
        seen = Neighbours.stack(rows) if rows else None
        domains = [data.documents[chunk.document].domain for chunk in chunks]
        count = None if statistics is None else partial(_count, statistics, domains)
        found = log_likelihoods(model, [(chunk.before, chunk.ids) for chunk in chunks], seen, count=count)
        for chunk, likelihood in zip(chunks, found, strict=True):
            nats[chunk.document] -= likelihood.nats
            tokens[chunk.document] += likelihood.tokens
        if progress:
            progress(places[-1] + 1, len(data.chunks))
    rows_of = zip(data.documents, nats, tokens, strict=True)
    return [DocumentLoss(document.id, document.domain, nat, count) for document, nat, count in rows_of if count]


def _count(
    statistics: RoutingStatistics, domains: list[str], routings: Sequence[Routing], mask_S: Any, at: list[int]
) -> None:
    statistics.update(routings, mask_S, [domains[i] for i in at])


def perplexity(losses: Sequence[DocumentLoss], *, resamples: int = RESAMPLES, seed: int = SEED) -> Perplexity:
    """Sum up. DataError where there is nothing."""
    if not losses:
        raise DataError("no document has a loss: there is no perplexity")
    means, draws_DB = _by_domain(losses, [loss.nats for loss in losses], resamples, seed)
    low, high = np.exp(np.percentile(draws_DB.mean(axis=0), [2.5, 97.5]))
    bounds = np.exp(np.percentile(draws_DB, [2.5, 97.5], axis=1)).T
    tokens: dict[str, int] = defaultdict(int)
    documents: dict[str, int] = defaultdict(int)
    for loss in losses:
        tokens[loss.domain] += loss.tokens
        documents[loss.domain] += 1
    per_domain = {
        d: (math.exp(mean), float(bound[0]), float(bound[1])) for (d, mean), bound in zip(means.items(), bounds)
    }
    return Perplexity(
        math.exp(fmean(means.values())), float(low), float(high), per_domain, dict(tokens), dict(documents)
    )


def compare_perplexity(
    a: Sequence[Sequence[DocumentLoss]],
    b: Sequence[Sequence[DocumentLoss]],
    *,
    setting: str = "",
    relative: bool = True,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """By how many per cent the perplexity of a is above that of b (negative: a is better), each one list a seed.

    The losses of a document are averaged over seeds; both arms are resampled by the same documents.

    Args:
        relative: False gives the difference itself, a minus b, which is the metric ``perplexity``.

    Raises:
        DataError: the runs are not of the same documents, tokens included.
    """
    runs = [*a, *b]
    for other in runs[1:]:
        _require_same(runs[0], other)
    change = _per_cent if relative else _points
    # With the same seed, and so of the same documents in each resample.
    (means_a, a_DB), (means_b, b_DB) = (
        _by_domain(runs[0], [fmean(of_one) for of_one in _nats(side)], resamples, seed) for side in (a, b)
    )
    low, high = np.percentile(change(a_DB.mean(axis=0), b_DB.mean(axis=0)), [2.5, 97.5])
    bounds = np.percentile(change(a_DB, b_DB), [2.5, 97.5], axis=1).T
    documents: dict[str, int] = defaultdict(int)
    for loss in runs[0]:
        documents[loss.domain] += 1
    return Comparison(
        metric="perplexity_percent" if relative else "perplexity",
        setting=setting,
        difference=float(change(fmean(means_a.values()), fmean(means_b.values()))),
        low=float(low),
        high=float(high),
        per_domain={
            d: (float(change(mean, means_b[d])), float(bound[0]), float(bound[1]))
            for (d, mean), bound in zip(means_a.items(), bounds)
        },
        n=sum(loss.tokens for loss in runs[0]),
        documents=len(runs[0]),
        per_domain_documents=dict(documents),
        seeds=(len(a), len(b)),
        seed_spread={"a": _spread(a, relative), "b": _spread(b, relative)},
    )


def _by_domain(
    losses: Sequence[DocumentLoss], nats: Sequence[float], resamples: int, seed: int
) -> tuple[dict[str, float], np.ndarray]:
    """The mean of some nats per token by domain, and in each resample, (D, B)."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for loss, value in zip(losses, nats, strict=True):
        rows[loss.domain].append((value, loss.tokens))
    sums = {d: (np.array([v for v, _ in pairs]), np.array([n for _, n in pairs])) for d, pairs in rows.items()}
    draws_DB = np.stack([resample(sums_C, sizes_C, resamples, rng) for sums_C, sizes_C in sums.values()])
    return {d: float(sums_C.sum() / sizes_C.sum()) for d, (sums_C, sizes_C) in sums.items()}, draws_DB


def _nats(runs: Sequence[Sequence[DocumentLoss]]) -> list[list[float]]:
    """For each document its loss in each run."""
    return [[loss.nats for loss in of_document] for of_document in zip(*runs, strict=True)]


def _per_cent(a: Any, b: Any) -> Any:
    """Of mean losses in nats, by how much one perplexity is above the other."""
    return 100 * np.expm1(a - b)


def _points(a: Any, b: Any) -> Any:
    return np.exp(a) - np.exp(b)


def _spread(runs: Sequence[Sequence[DocumentLoss]], relative: bool) -> float | None:
    """Standard deviation of the perplexity over seeds, in per cent of it where ``relative``; None for a single one."""
    nats = [fmean(_by_domain(run, [loss.nats for loss in run], 1, 0)[0].values()) for run in runs]
    means = [100 * x for x in nats] if relative else [math.exp(x) for x in nats]
    return stdev(means) if len(means) > 1 else None


def _require_same(a: Sequence[DocumentLoss], b: Sequence[DocumentLoss]) -> None:
    of_a, of_b = ({(loss.domain, loss.document): loss.tokens for loss in run} for run in (a, b))
    if [*of_a.items()] == [*of_b.items()]:
        return
    changed = sorted(name for name in {*of_a, *of_b} if of_a.get(name) != of_b.get(name))
    raise DataError(
        f"these losses cannot be compared: {len(changed)} of {len({*of_a, *of_b})} documents are not in both with the "
        f"same tokens, or not in the same order; they are of {sum(of_a.values())} and {sum(of_b.values())} tokens",
        hint="evaluate both on the same documents, with the same tokenizer",
    )
