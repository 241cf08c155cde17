"""The no-answer threshold: chosen on questions kept out of training, stored in the bundle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ragmoe.corpus.types import Passage, Question
from ragmoe.evaluation.metrics import best_over, f1
from ragmoe.index import Index
from ragmoe.models import Answer, RagmoeBertForQuestionAnswering
from ragmoe.neighbours import Neighbours
from ragmoe.training.config import RaftConfig
from ragmoe.training.data import Retrieved, gold_ids
from ragmoe.training.raft import hard_distractors

# How many passages a question is read with when it is asked (``model.answer``, tasks in the open setting).
READ = 5


def calibrate(
    model: RagmoeBertForQuestionAnswering,
    questions: Sequence[Question],
    texts: Sequence[str],
    retrieved: Retrieved,
    index: Index,
    config: RaftConfig,
    unanswerable: float,
) -> float:
    """The threshold under which answering pays best.

    Each question is read twice: with its gold passage (where it has one) and with distractors alone. The threshold
    maximises the score to be expected where a share ``unanswerable`` of the questions asked has no answer: F1 for an
    answer given where there is one, 1 for none given where there is none.

    Returns:
        The threshold on ``Answer.no_answer_score`` with the best mean; 0.0 without any question.
    """
    if not questions:
        return 0.0
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
    return best_threshold(_scores(answers), np.array(gains), _scores(_read(model, absent)), unanswerable)


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
