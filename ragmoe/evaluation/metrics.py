"""How one answer is scored, and the figures over many that are no plain mean.

Scores of one question are between 0 and 1. Span scoring follows the official SQuAD script (Rajpurkar et al. 2016 and
2018): lower case, no punctuation, no articles, single spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

YES_NO_MAYBE = ("yes", "no", "maybe")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """A text as SQuAD compares it: lower case, without punctuation, articles and superfluous space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 where both are the same once normalised, else 0.0."""
    return float(normalise(prediction) == normalise(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of word precision and recall of a prediction against one answer, 0.0 to 1.0.

    Where either is empty once normalised, 1.0 if both are and 0.0 otherwise, as in SQuAD 2.
    """
    have, want = normalise(prediction).split(), normalise(answer).split()
    if not have or not want:
        return float(have == want)
    common = sum((Counter(have) & Counter(want)).values())
    if not common:
        return 0.0
    precision, recall = common / len(have), common / len(want)
    return 2 * precision * recall / (precision + recall)


def best_over(metric: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """The best score over the acceptable alternatives; ``answers`` must not be empty."""
    return max(metric(prediction, answer) for answer in answers)


def citation_precision(cited: Sequence[str], gold: Sequence[str], invented: int = 0) -> float | None:
    """The share of the passages cited that are gold, 0.0 to 1.0; None where none is cited.

    Args:
        invented: how many numbers are cited that no passage has; none of them is gold.
    """
    said = len({*cited}) + invented
    return len({*cited} & {*gold}) / said if said else None


def citation_recall(cited: Sequence[str], gold: Sequence[str], read: Sequence[str]) -> float | None:
    """The share of the gold passages that were read which is cited, 0.0 to 1.0; None where none of them was read."""
    there = {*gold} & {*read}
    return len(there & {*cited}) / len(there) if there else None


def yes_no_maybe(text: str) -> str:
    """The class a text names: yes, no or maybe, or ``other``."""
    name = normalise(text)
    return name if name in YES_NO_MAYBE else "other"


def class_f1(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Macro F1 over those of yes, no and maybe that occur, 0.0 to 1.0.

    A prediction that is none of the three counts against the recall of the class it should have been.
    """
    from sklearn.metrics import f1_score  # type: ignore[import-untyped]

    have, want = [yes_no_maybe(text) for text in predictions], [yes_no_maybe(text) for text in answers]
    labels = [name for name in YES_NO_MAYBE if name in {*have, *want}]
    if not labels:
        return 0.0
    return float(f1_score(want, have, labels=labels, average="macro", zero_division=0))


def no_answer_auroc(scores: Sequence[float], unanswerable: Sequence[bool]) -> float | None:
    """Area under the ROC curve, 0.0 to 1.0, of telling the unanswerable by a score that is larger for them.

    None where there are not both kinds of question.
    """
    if len(set(unanswerable)) < 2:
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(list(unanswerable), list(scores)))
