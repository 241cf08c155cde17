"""What a change of its experts does to a reader: measured before and after, over the same examples.

Where an expert was added, the domains that the reader knew are read three times: before; after with the new expert left
out, which must answer bit for bit as before; and after as it is. L sparse layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragmoe._errors import DataError, ModelError
from ragmoe._words import many
from ragmoe.bundle import read_map
from ragmoe.evaluation import Results, Retrieval, Sample, Task, compare, evaluate
from ragmoe.evaluation.items import check_gold, prepare
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.statistics import macro
from ragmoe.generation.generator import Generator, is_generator
from ragmoe.index import Index
from ragmoe.models import RagmoeBertForQuestionAnswering, load
from ragmoe.moe import MOST

Progress = Callable[[str, int, int], None]
_ANSWER = ("status", "prediction", "passage_id", "score", "no_answer_score", "answered", "f1", "em", "f1_thresholded")


@dataclass(frozen=True)
class Models:
    """A reader or a decoder before it got an expert, after with that expert left out, and after."""

    before: Any
    masked: Any
    live: Any


def certify_old(models: Models, task: Task, retrieval: Retrieval, progress: Progress) -> dict[str, Any]:
    """Score an old domain's task before and after.

    Returns:
        ``task``, ``setting``, ``n``; macro F1 ``before``, ``masked`` and ``live`` (0 to 100); ``difference`` of live
        and before with its 95 % interval ``low`` and ``high``; ``identical``, which is True; and ``routed``.

    Raises:
        ModelError: with the new expert left out some answer is another than before.
    """
    before = _read(models.before, "before", task, retrieval, progress)
    masked = _read(models.masked, "without the expert", task, retrieval, progress)
    differing = [a.id for a, b in zip(before, masked, strict=True) if not _same(a, b)]
    if differing:
        raise ModelError(
            f"without the new expert {len(differing)} of {len(before)} questions of {task.name} are answered otherwise "
            f"than before, for example {differing[0]}: what was there has changed"
        )
    live = _read(models.live, "with the expert", task, retrieval, progress)
    figures = _change(task, before, live, "live")
    return {**figures, "masked": figures["before"], "identical": True, "routed": routed(live, models.live)}


def certify_new(models: Models, task: Task, retrieval: Retrieval, progress: Progress) -> dict[str, Any]:
    """Score the new domain's task without the expert and with it; the same keys as for an old one, less ``masked``."""
    before = _read(models.before, "before", task, retrieval, progress)
    live = _read(models.live, "with the expert", task, retrieval, progress)
    return {**_change(task, before, live, "live"), "routed": routed(live, models.live)}


def check_judging(task: Task, index: Index, option: str) -> None:
    """Make sure, before anything is trained, that a task can be read over an index and some of it be scored.

    Args:
        option: of the command, which names that index.

    Raises:
        DataError: it cannot.
    """
    check_gold(task, task.load_questions())
    try:
        items = prepare(task, index)
    except DataError as error:
        raise DataError(error.message, hint=f"give the index of these questions' corpus with {option} DIR") from None
    if not any(item.question.answers for item in items if item.problem is None):
        lacking = next((item.problem for item in items if item.problem), "they are all unanswerable")
        raise DataError(f"task {task.name}: none of its {many(len(items), 'question')} can be scored: {lacking}")


def measure_prune(
    bundle: Path, kept: Sequence[int], task: Task, retrieval: Retrieval, progress: Progress
) -> dict[str, Any]:
    """Score a task with all experts of a bundle and with those alone that a pruning would leave.

    Args:
        kept: ids of the experts that stay.

    Returns:
        ``task``, ``setting``, ``n``; macro F1 ``before`` and ``after`` (0 to 100); their ``difference`` with its 95 %
        interval ``low`` and ``high``; and ``load``, the share of the task's choices that the others carried.
    """
    whole, pruned = _opened(Path(bundle)), _opened(Path(bundle), kept)
    before = _read(whole, "before", task, retrieval, progress)
    after = _read(pruned, "pruned", task, retrieval, progress)
    gone = [at for at, id in enumerate(whole.config.expert_ids or range(whole.config.experts)) if id not in kept]
    counts_LE = np.sum([np.asarray(sample.routing, dtype=float) for sample in before if sample.routing], axis=0)
    share = float((counts_LE[:, gone].sum(axis=1) / counts_LE.sum(axis=1)).mean())
    return {**_change(task, before, after, "after"), "load": share}


def _opened(bundle: Path, kept: Sequence[int] | None = None) -> Any:
    """The reader or generator in a bundle, with all of its experts or as it would be with some alone."""
    if not is_generator(bundle):
        return load(bundle, experts=kept)
    gone = [id for id in read_map(bundle).expert_ids if kept is not None and id not in kept]
    return Generator.load(bundle, without=gone)


def routed(samples: Sequence[Sample], model: RagmoeBertForQuestionAnswering) -> dict[str, Any]:
    """How far questions go to the last expert, as shares from 0 to 1.

    Returns:
        ``tokens`` that call it, as a mean over layers; ``questions`` of which at least half of the tokens do; questions
        of which any does (``touched``); and ``per_domain``, of each domain's questions the mean share of tokens.
    """
    shares: list[float] = []
    of_domain: dict[str, list[float]] = {}
    tokens = calls = 0.0
    for sample in samples:
        if sample.routing:
            counts_LE = np.asarray(sample.routing, dtype=float)
            tokens_L = counts_LE.sum(axis=1) / model.config.top_k
            shares.append(float((counts_LE[:, -1] / tokens_L).mean()))
            of_domain.setdefault(sample.domain, []).append(shares[-1])
            tokens, calls = tokens + tokens_L.sum(), calls + counts_LE[:, -1].sum()
    share_Q = np.array(shares)
    return {
        "tokens": float(calls / max(tokens, 1.0)),
        "questions": float((share_Q >= MOST).mean()) if shares else 0.0,
        "touched": float((share_Q > 0).mean()) if shares else 0.0,
        "per_domain": {name: float(np.mean(own)) for name, own in of_domain.items()},
    }


def _read(
    model: RagmoeBertForQuestionAnswering, when: str, task: Task, retrieval: Retrieval, progress: Progress
) -> list[Sample]:
    plain = task.model_copy(update={"perturbations": []})
    results: Results = evaluate(
        model,
        plain,
        retrieval.index,
        retrieval=retrieval,
        progress=lambda done, total, _: progress(f"{task.name}, {when}", done, total),
    )
    return results.samples[REAL]


def _same(a: Sample, b: Sample) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in _ANSWER)


def _change(task: Task, before: Sequence[Sample], after: Sequence[Sample], name: str) -> dict[str, Any]:
    failed = [sample for sample in (*before, *after) if sample.status == "error"]
    if failed:
        raise DataError(f"task {task.name}: {many(len(failed), 'question')} failed; {failed[0].id}: {failed[0].error}")
    change = compare([after], [before], setting=task.setting_name)
    return {
        "task": task.name,
        "setting": task.setting_name,
        "n": change.n,
        "before": macro(before),
        name: macro(after),
        "past_threshold": {"before": macro(before, "f1_thresholded"), name: macro(after, "f1_thresholded")},
        "difference": change.difference,
        "low": change.low,
        "high": change.high,
    }
