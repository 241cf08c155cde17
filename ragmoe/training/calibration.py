"""The no-answer threshold: chosen on questions kept out of training, stored in the bundle.

A reader has one, and an expert that is added later one of its own: what is new to a reader looks unanswerable to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ragmoe.corpus.distractors import hard_distractors
from ragmoe.corpus.types import Passage, Question
from ragmoe.evaluation.metrics import best_over, f1
from ragmoe.index import Index
from ragmoe.models import Answer, RagmoeBertForQuestionAnswering
from ragmoe.neighbours import Neighbours
from ragmoe.training.config import RaftConfig
from ragmoe.training.data import gold_ids
from ragmoe.training.retrieved import Retrieved

# How many passages a question is read with when it is asked (``model.answer``, tasks in the open setting).
READ = 5
# So many questions with an answer say what a threshold should be; of a new expert's own, those that go to it.
ENOUGH = 20
# More than these are not read for it: a threshold is one number.
PLENTY = 100


def enough(questions: Sequence[Question]) -> bool:
    """Whether these questions say what a reader's threshold should be."""
    return sum(bool(gold_ids(question)) for question in questions) >= ENOUGH


def calibrate(
    model: RagmoeBertForQuestionAnswering,
    questions: Sequence[Question],
    texts: Sequence[str],
    retrieved: Retrieved,
    index: Index,
    config: RaftConfig,
    unanswerable: float,
) -> None:
    """Give a reader the threshold under which answering pays best; where there are not ``enough`` it keeps its own.

    What single experts had was theirs before this training, and goes.

    Each question is read twice: with its gold passage (where it has one) and with distractors alone. The threshold
    maximises the score to be expected where a share ``unanswerable`` of the questions asked has no answer: F1 for an
    answer given where there is one, 1 for none given where there is none.
    """
    if not enough(questions):
        return
    model.config.expert_thresholds = None
    present, gains, absent = _asked(model, questions, texts, retrieved, index, config)
    chosen = best_threshold(_scores(present), np.array(gains), _scores(absent), unanswerable)
    model.config.no_answer_threshold = chosen


def calibrate_expert(
    model: RagmoeBertForQuestionAnswering,
    questions: Sequence[Question],
    texts: Sequence[str],
    retrieved: Retrieved,
    index: Index,
    config: RaftConfig,
    unanswerable: float,
) -> float | None:
    """Give the last expert, which is new, a threshold of its own, chosen as ``calibrate`` does where it is what counts.

    The model's own threshold stays, and so do those of the other experts.

    Returns:
        The threshold; None, and nothing changes, where fewer than ``ENOUGH`` questions say what it should be.
    """
    questions = questions[:PLENTY]
    others = model.config.expert_thresholds or [None] * model.config.experts
    # What is held against this is what the new expert's threshold will be asked about.
    model.config.expert_thresholds = [*others[:-1], math.inf]
    present, gains, absent = _asked(model, questions, texts, retrieved, index, config)
    own = [at for at, answer in enumerate(present) if answer.threshold == math.inf]
    chosen = None
    if len(own) >= ENOUGH:
        chosen = best_threshold(
            _scores([present[at] for at in own]),
            np.array([gains[at] for at in own]),
            _scores([answer for answer in absent if answer.threshold == math.inf]),
            unanswerable,
        )
    thresholds = [*others[:-1], chosen]
    model.config.expert_thresholds = None if all(value is None for value in thresholds) else thresholds
    return chosen


def _asked(
    model: RagmoeBertForQuestionAnswering,
    questions: Sequence[Question],
    texts: Sequence[str],
    retrieved: Retrieved,
    index: Index,
    config: RaftConfig,
) -> tuple[list[Answer], list[float], list[Answer]]:
    """What is answered where the answer is there, what each of these answers earns, and what where it is not."""
    present, absent = [], []
    for place, question in enumerate(questions):
        gold = index.passages(question.gold_ids)
        # The passage an unanswerable question was asked over is its hardest distractor.
        near = list(dict.fromkeys([*(() if gold else question.context_ids), *retrieved.ids(place)]))
        distractors = hard_distractors(question, gold, index.passages(near))
        seen = model.recall(retrieved.neighbours(place, config.neighbours), index, [question.domain])
        if readable := gold_ids(question)[:1]:
            present.append((question, texts[place], index.passages(readable) + distractors[: READ - 1], seen))
        absent.append((question, texts[place], distractors[:READ], seen.without([question.gold_ids])))
    answers = _read(model, present)
    gains = [best_over(f1, answer.text, case[0].answers) for answer, case in zip(answers, present, strict=True)]
    return answers, gains, _read(model, absent)


def _read(
    model: RagmoeBertForQuestionAnswering, cases: Sequence[tuple[Question, str, list[Passage], Neighbours]]
) -> list[Answer]:
    if not cases:
        return []
    _, texts, passages, rows = zip(*cases, strict=True)
    return model.read(texts, passages, Neighbours.stack(rows))


def _scores(answers: Sequence[Answer]) -> np.ndarray:
    return np.array([answer.no_answer_score for answer in answers])


def best_threshold(present: np.ndarray, gains: np.ndarray, absent: np.ndarray, unanswerable: float) -> float:
    """The threshold with the best expected score.

    Args:
        present, absent: no-answer scores where the answer is there and where it is not.
        gains: what answering each present case earns, 0 to 1.
        unanswerable: how much the absent cases weigh, 0 to 1.
    """
    finite = np.concatenate([present, absent])
    finite = np.unique(finite[np.isfinite(finite)])
    if not len(finite):
        return 0.0
    # Between two scores, and beyond either end: the choice never sits on a score itself.
    cuts = np.concatenate([[finite[0] - 1.0], (finite[1:] + finite[:-1]) / 2, [finite[-1] + 1.0]])
    kept = [gains[present <= cut].sum() / max(1, len(present)) for cut in cuts]
    withheld = [(absent > cut).mean() if len(absent) else 0.0 for cut in cuts]
    return float(cuts[int(np.argmax((1 - unanswerable) * np.array(kept) + unanswerable * np.array(withheld)))])
