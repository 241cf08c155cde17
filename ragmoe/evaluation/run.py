"""Evaluate a model on a task: read every question, record each as it is done, and sum up.

Neighbours are what a question retrieves, never more and never less: in the ``gold`` setting the gold passage is given
to the reader, but neither put among the neighbours nor taken from them. Where a question is asked without the passages
that hold its answer (``rejection``), they leave the neighbours too, as they do while training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragmoe._errors import ConfigError, DataError, ModelError, RagmoeError
from ragmoe._folders import held
from ragmoe.corpus.distractors import hard_distractors
from ragmoe.evaluation.items import Item, prepare
from ragmoe.evaluation.perturbation import REAL, partners
from ragmoe.evaluation.protocols import AnswerLike, Reader, Searchable
from ragmoe.evaluation.results import RESULTS_NAME, Results, samples_name
from ragmoe.evaluation.retrieval import DEPTH, Retrieval, score_retrieval
from ragmoe.evaluation.routing import routing_shift, summarise_routing
from ragmoe.evaluation.samples import Sample, SampleFile, digest_of
from ragmoe.evaluation.scoring import score, score_citations, summarise
from ragmoe.evaluation.statistics import compare, interval, lost_domains
from ragmoe.evaluation.task import Task, load_task

if TYPE_CHECKING:
    from ragmoe.corpus.types import Passage
    from ragmoe.moe.statistics import SequenceRouting
    from ragmoe.neighbours import Neighbours

CHUNK = 64
_LOCK_NAME = ".evaluation.lock"
_BOUND = 1e9

Progress = Callable[[int, int, str], None]


def evaluate(
    model: Reader,
    task: Task | str | Path,
    index: Searchable,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    limit: int | None = None,
    progress: Progress | None = None,
    retrieval: Retrieval | None = None,
    name: str = "",
) -> Results:
    """Evaluate a model on a task, under the question's own neighbours and under the task's perturbations.

    Args:
        out: folder for samples and results; None keeps them in memory.
        resume: take over what an earlier run with the same question, task, index and weights has left in ``out``.
        limit: at most so many questions of a domain.
        progress: called with questions done, questions in all, and the condition.
        retrieval: of this index, where several evaluations share it.
        name: what the model is called in reports.

    Raises:
        ConfigError, DataError: the task or its questions are wrong, or not of this index; or another process evaluates
            into the same folder.
        ModelError: the model does not fit the index, or could read none of the first questions.
    """
    task = (task if isinstance(task, Task) else load_task(task)).limited(limit)
    model.check_index(index)
    run = _Run(model, task, index, retrieval or Retrieval(index), Path(out) if out is not None else None, progress)
    with _alone(run.out):
        return _evaluate(run, resume, name)


def _alone(out: Path | None) -> AbstractContextManager[None]:
    """Let no other process write to a folder meanwhile, whose samples would stand under the figures of this one."""
    if out is None:
        return nullcontext()
    told, hint = f"another evaluation is writing to {out}", "wait for it to end, or give another folder with --out"
    return held(out, _LOCK_NAME, ConfigError(told, hint=hint))


def _evaluate(run: _Run, resume: bool, name: str) -> Results:
    """What ``evaluate`` does, once the folder is its own."""
    from ragmoe.generation.batches import reads_neighbours

    model, task, index = run.model, run.task, run.index
    shown = [REAL, *(task.perturbations if run.seen and reads_neighbours(model) else ())]
    prepared = {condition: run.plan(condition) for condition in shown}
    samples = {condition: run.read_all(condition, plan, resume) for condition, plan in prepared.items()}
    results = Results(
        task=task.model_dump(mode="json"),
        setting=task.setting_name,
        model=name or type(model).__name__,
        model_digest=run.model_digest,
        index_digest=index.digest,
        parameters=dict(model.parameter_counts()),
        conditions={c: _figures(c, samples, model) if c in samples else None for c in [REAL, *task.perturbations]},
        retrieval=score_retrieval(samples[REAL], run.gold, run.out),
        samples=samples,
    )
    if run.out is not None:
        results.write(run.out)
    return results


@dataclass(frozen=True)
class _Plan:
    """What is to be done under one condition: digests by question id, and whose neighbours are shown."""

    digests: dict[str, str]
    partners: list[int] | None


class _Run:
    """One model on one task; see ``evaluate``."""

    def __init__(
        self,
        model: Reader,
        task: Task,
        index: Searchable,
        retrieval: Retrieval,
        out: Path | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.task, self.index, self.retrieval, self.out = model, task, index, retrieval, out
        self.progress = progress or (lambda done, total, label: None)
        self.seen = (task.neighbours or int(model.config.neighbours)) if model.gate_sees_neighbours else 0
        self.depth = max(DEPTH, self.seen, task.passages)
        self.items = prepare(task, index)
        self.gold = {item.question.id: item.question.gold_ids for item in self.items}
        self.model_digest = model_digest(model)
        memory = model.memory(index) if self.seen else None
        self.memory_digest = memory.digest if memory is not None else ""

    def plan(self, condition: str) -> _Plan:
        """Settle, before anything is read, what each question is shown under a condition."""
        chosen = partners([item.question for item in self.items], [item.asked for item in self.items], condition)
        task = self.task
        retriever = task.retriever or self.index.retriever
        setting = (task.setting, retriever, self.seen, None if task.setting == "gold" else task.passages)
        common: tuple[object, ...] = (condition, setting, self.index.digest, self.model_digest)
        if self.memory_digest:
            common += (self.memory_digest,)
        shown = [self.items[i].asked for i in chosen] if chosen else [None] * len(self.items)
        digests = {
            item.question.id: digest_of(
                item.example, item.question.domain, item.read, other, common, *([item.hidden] if item.hidden else [])
            )
            for item, other in zip(self.items, shown, strict=True)
        }
        return _Plan(digests, chosen)

    def read_all(self, condition: str, plan: _Plan, resume: bool) -> list[Sample]:
        """All samples under a condition; those on the disk are not made again."""
        file = SampleFile(self.out / samples_name(condition) if self.out else None, resume=resume)
        done = file.done(plan.digests)
        todo = [i for i, item in enumerate(self.items) if item.question.id not in done]
        if todo and self.out is not None:
            # What stood for another model, or another question, is none of this one's.
            (self.out / RESULTS_NAME).unlink(missing_ok=True)
        items = {item.question.id: item for item in self.items}
        file.renew(lambda sample: self._anew(sample, items[sample.id]), done)
        total, finished = len(self.items), len(self.items) - len(todo)
        self.progress(finished, total, condition)
        for at in range(0, len(todo), CHUNK):
            chunk = todo[at : at + CHUNK]
            made = self._read_chunk(chunk, condition, plan)
            if finished == 0:
                _require_some(made)
            file.add(made)
            finished += len(chunk)
            self.progress(finished, total, condition)
        return file.finish([item.question.id for item in self.items])

    def _anew(self, sample: Sample, item: Item) -> Sample:
        """A record that is taken over, with what may have changed since without anything being read otherwise: which
        passages are gold, the document, and how answers are scored."""
        found = replace(sample, doc_id=item.doc_id, **self._gold(item, sample.read, sample.retrieved))
        if sample.status != "ok" or sample.prediction is None:
            return found
        return replace(found, **self._outcome(found, _Recorded(sample)))

    def _gold(self, item: Item, read: Sequence[str], retrieved: Sequence[str]) -> dict[str, Any]:
        """What is gold among the passages read and retrieved."""
        gold = item.question.gold_ids
        ranks = [rank for rank, name in enumerate(retrieved, start=1) if name in gold]
        return {
            "gold_rank": ranks[0] if ranks else None,
            "gold_read": tuple(name for name in read if name in gold),
        }

    def _read_chunk(self, chunk: Sequence[int], condition: str, plan: _Plan) -> list[Sample]:
        items = [self.items[i] for i in chunk]
        found = self.retrieval.fetch([item.asked for item in items], retriever=self.task.retriever, depth=self.depth)
        blank = [self._blank(item, plan, ids, condition) for item, ids in zip(items, found.passage_ids, strict=True)]
        neighbours = self._shown(found, chunk, condition, plan)
        able = [row for row, sample in enumerate(blank) if sample.status == "ok" and sample.read]
        passages = {row: list(self.index.passages(blank[row].read)) for row in able}
        made = self._read_rows(able, blank, passages, neighbours)
        return [made.get(row, sample) for row, sample in enumerate(blank)]

    def _blank(self, item: Item, plan: _Plan, retrieved: Sequence[str], condition: str) -> Sample:
        """A sample with everything that is known before the model reads."""
        question, is_given = item.question, self.task.setting == "gold"
        retrieved = [name for name in retrieved if name not in item.hidden]
        read = item.read if is_given or item.problem else self._to_read(item, retrieved)
        blank = Sample(
            id=question.id,
            digest=plan.digests[question.id],
            example=item.example,
            domain=question.domain,
            doc_id=item.doc_id,
            status=item.status,
            question=item.asked,
            answer_type=question.answer_type,
            answers=question.answers,
            error=item.problem,
            read=read,
            retrieved=tuple(retrieved) if condition == REAL else (),
            **self._gold(item, read, retrieved if condition == REAL else ()),
        )
        if is_given or read or item.problem:
            return blank
        if item.distractors_of is not None:
            # To say nothing of nothing is no merit of the model.
            return replace(blank, status="unscored", error="no passage was found to read it over")
        # Where a search finds nothing, as bm25 may, there is no answer: that is the search's fault, and it counts.
        cites = () if getattr(self.model, "style", None) is not None else None
        return replace(blank, **self._outcome(blank, _Silence(cites)))

    def _to_read(self, item: Item, retrieved: Sequence[str]) -> tuple[str, ...]:
        """What is read of what was retrieved, with what is read anyway: as many passages as the task says."""
        if item.distractors_of is None:
            return tuple(retrieved[: self.task.passages])
        others = hard_distractors(item.distractors_of, [], self.index.passages(retrieved))
        near = [passage.id for passage in others if passage.id not in item.read]
        read = [*item.read, *near[: max(0, self.task.passages - len(item.read))]]
        # In an order that does not tell which of them hold the answer.
        return tuple(sorted(read, key=lambda name: digest_of(item.question.id, name)))

    def _shown(self, found: Neighbours, chunk: Sequence[int], condition: str, plan: _Plan) -> Neighbours | None:
        """What the gate is shown: N neighbours of each question, or what the condition puts in their place."""
        from ragmoe.neighbours import Neighbours

        if not self.seen:
            return None
        if condition == "null":
            return Neighbours.empty(len(chunk), self.index.width)
        items = [self.items[plan.partners[i] if plan.partners is not None else i] for i in chunk]
        if plan.partners is not None:
            found = self.retrieval.fetch([i.asked for i in items], retriever=self.task.retriever, depth=self.depth)
        seen = found.first(self.seen)
        if any(item.hidden for item in items):
            seen = seen.without([item.hidden for item in items])
        return self.model.recall(seen, self.index, [item.question.domain for item in items])

    def _read_rows(
        self,
        rows: Sequence[int],
        blank: Sequence[Sample],
        passages: dict[int, list[Passage]],
        neighbours: Neighbours | None,
    ) -> dict[int, Sample]:
        """Read some rows of a chunk together; where that fails, one by one, so that only the culprit is lost."""
        if not rows:
            return {}
        samples = [blank[row] for row in rows]
        shown = neighbours.rows(rows) if neighbours is not None else None
        try:
            return dict(zip(rows, self._read(samples, [passages[row] for row in rows], shown), strict=True))
        except Exception as error:
            # What is wrong with one question, such as its length, is no reason to read no other.
            if isinstance(error, RagmoeError) and not isinstance(error, DataError):
                raise
            if len(rows) == 1:
                told = error.message if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
                return {rows[0]: replace(samples[0], status="error", error=told)}
        made: dict[int, Sample] = {}
        for row in rows:
            made |= self._read_rows([row], blank, passages, neighbours)
        return made

    def _read(
        self, samples: Sequence[Sample], passages: Sequence[list[Passage]], neighbours: Neighbours | None
    ) -> list[Sample]:
        from ragmoe.moe.statistics import RoutingStatistics

        layers = list(self.model.sparse_layers)
        counts = RoutingStatistics(layers, len(self.model.expert_names)) if layers else None
        # Counted by question, not by domain: each sample carries its own routing, so a resumed run has all of it.
        labels = [sample.id for sample in samples]
        answers = self.model.read(
            [s.question for s in samples], passages, neighbours, statistics=counts, domains=labels
        )
        counted = counts.of_domain if counts is not None else {}
        made = [
            replace(sample, **self._outcome(sample, answer), **_routed(counted.get(sample.id)))
            for sample, answer in zip(samples, answers, strict=True)
        ]
        return [self._judged(sample) for sample in made]

    def _judged(self, sample: Sample) -> Sample:
        """A sample that has no score where a prompt had no room for what a rejection is judged by."""
        if self.task.setting != "rejection" or not sample.answerable or sample.gold_read:
            return sample
        told = (
            f"no room in the prompt for a passage that holds the answer ({sample.left_out} left out; fewer passages?)"
        )
        return replace(sample, status="unscored", error=told)

    def _outcome(self, sample: Sample, answer: AnswerLike) -> dict[str, Any]:
        # A generator's prompt may have no room for all: the last ones, which are the worst, were not read then.
        shortened, left_out = (getattr(answer, name, None) for name in ("shortened", "left_out"))
        read = sample.read[: len(sample.read) - (left_out or 0)]
        gold = tuple(name for name in sample.gold_read if name in read)
        # Of what nothing answers every citation is wrong.
        known = bool(self.gold[sample.id]) or not sample.answers
        return {
            "gold_read": gold,
            "shortened": shortened,
            "left_out": left_out,
            "prediction": answer.text,
            "passage_id": answer.passage_id,
            "answered": answer.answered,
            "score": answer.score,
            # An infinite score has no place in JSON, nor on a ROC curve; no finite one comes near the bound.
            "no_answer_score": max(-_BOUND, min(_BOUND, answer.no_answer_score)),
            **score(answer, sample.answers, sample.answer_type),
            **score_citations(answer, sample.answers, sample.answer_type, gold, known=known),
        }


@dataclass(frozen=True)
class _Silence:
    """The answer of nobody, who had nothing to read."""

    cited: tuple[str, ...] | None
    text: str = ""
    passage_id: str | None = None
    start: int | None = None
    score: float = -_BOUND
    no_answer_score: float = _BOUND
    answered: bool = False


class _Recorded:
    """The answer that a record holds."""

    start = None

    def __init__(self, sample: Sample) -> None:
        self.text = sample.prediction or ""
        self.passage_id = sample.passage_id
        self.score = sample.score or 0.0
        self.no_answer_score = sample.no_answer_score or 0.0
        self.answered = bool(sample.answered)
        self.cited, self.invented = sample.cited, sample.invented
        self.shortened, self.left_out = sample.shortened, sample.left_out


def _routed(counted: SequenceRouting | None) -> dict[str, Any]:
    """What a sample says of its routing; nothing where it was not routed."""
    if counted is None:
        return {}
    return {
        "routing": tuple(tuple(row) for row in counted.chosen_LE.astype(int).tolist()),
        "gate_entropy": tuple((counted.entropy_L / max(counted.tokens, 1)).tolist()),
        "tokens": int(counted.tokens),
        "lost": tuple(tuple(row) for row in counted.lost_L2.astype(int).tolist()) if counted.lost_L2.any() else (),
    }


def _figures(condition: str, samples: dict[str, list[Sample]], model: Reader) -> dict[str, Any]:
    """Everything reported of one condition."""
    own, real = samples[condition], samples[REAL]
    bounds = interval([own])
    figures: dict[str, Any] = {
        **summarise(own),
        # Lists as JSON has them, so that figures read back equal those that were written.
        "interval": {**asdict(bounds), "per_domain": {d: [*v] for d, v in bounds.per_domain.items()}}
        if bounds
        else None,
        "routing": summarise_routing(own, list(model.sparse_layers), list(model.expert_names)),
    }
    if condition != REAL:
        change = None if lost_domains([own, real]) else compare([own], [real])
        figures["change"] = {
            "f1": {key: getattr(change, key) for key in ("difference", "low", "high", "n")} if change else None,
            "routing_shift": routing_shift(real, own),
        }
    return figures


def _require_some(samples: Sequence[Sample]) -> None:
    """Stop at once where everything fails: that is no question's fault."""
    failed = [sample for sample in samples if sample.status == "error"]
    if len(failed) == len(samples) and len(samples) > 1:
        raise ModelError(
            f"all of the first {len(samples)} questions failed; {failed[0].id}: {failed[0].error}",
            hint="nothing was recorded",
        )


def model_digest(model: Reader) -> str:
    """16 hexadecimal digits over a model's weights, configuration and held-back experts, wherever it came from."""
    from ragmoe.models.digest import weights_digest

    config = model.config.to_dict()
    local = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    # Where no expert has its own it is as it was before any could.
    local |= set() if config.get("expert_thresholds") else {"expert_thresholds"}
    parts: list[object] = [{key: value for key, value in config.items() if key not in local}]
    if (style := getattr(model, "style", None)) is not None:
        # How a generator is asked; a reader has but one way.
        parts.append(asdict(style))
    if held := list(model.held_back):
        parts.append(held)
    return digest_of(weights_digest(model), *parts)
