"""From answers to scores: of one question, of a domain, of a whole set.

A question's score lies in 0..1. Figures over many are in 0..100 for F1, EM and accuracy, as SQuAD reports them, and in
0..1 for areas under a curve and for shares.

The headline is the best guess on answerable questions, whether or not it passed the no-answer threshold: whether to
answer at all is judged apart, by ``f1_thresholded`` and the no-answer block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ragmoe.evaluation.metrics import (
    YES_NO_MAYBE,
    best_over,
    citation_precision,
    citation_recall,
    class_f1,
    exact_match,
    f1,
    no_answer_auroc,
    yes_no_maybe,
)
from ragmoe.evaluation.protocols import AnswerLike
from ragmoe.evaluation.rouge import rouge_l
from ragmoe.evaluation.samples import Sample

SCORES = ("f1", "em", "f1_thresholded", "em_thresholded")


def score(answer: AnswerLike, answers: Sequence[str], answer_type: str) -> dict[str, float | None]:
    """The scores of one answer, 0 to 1; f1 and em are None where nothing answers the question."""
    if not answers:
        right = float(not answer.answered)
        return {"f1": None, "em": None, "f1_thresholded": right, "em_thresholded": right}
    if answer_type == "yesno":
        said = yes_no_maybe(answer.text)
        # What is none of the three equals nothing, least of all something else that is none.
        right = float(said in YES_NO_MAYBE and said in {yes_no_maybe(text) for text in answers})
        best = {"f1": right, "em": right}
    else:
        best = {"f1": best_over(f1, answer.text, answers), "em": best_over(exact_match, answer.text, answers)}
    passed = float(answer.answered)
    return {**best, "f1_thresholded": best["f1"] * passed, "em_thresholded": best["em"] * passed}


def score_citations(
    answer: AnswerLike, answers: Sequence[str], answer_type: str, gold: Sequence[str], *, known: bool = True
) -> dict[str, Any]:
    """What a generator's answer has beside: ROUGE-L and citations; nothing for a reader's, which cites no passage.

    Args:
        gold: the gold passages among those read.
        known: whether it is known which passages are; without, citations have no score.
    """
    cited: Sequence[str] | None = getattr(answer, "cited", None)
    if cited is None:
        return {}
    invented = getattr(answer, "invented", None) or 0
    in_words = bool(answers) and answer_type != "yesno"
    return {
        "cited": tuple(cited),
        "rouge_l": best_over(rouge_l, answer.text, answers) if in_words else None,
        "invented": invented,
        "citation_precision": citation_precision(cited, gold, invented) if known else None,
        "citation_recall": citation_recall(cited, gold, gold),
    }


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Figures over samples: ``macro``, ``per_domain``, ``yesno``, ``no_answer`` and ``generation`` (None where there is
    none such).

    Means are over answerable questions that were read without error; ``coverage`` is their share of the answerable.
    Those past the threshold (``f1_thresholded``, ``em_thresholded``) are over the unanswerable ones too, as SQuAD 2.0's
    are and as ``compare`` has them: of these it is right to answer none.
    ``macro`` has None instead of a mean where a domain that has answerable questions got not one of them scored.
    """
    by_domain: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_domain[sample.domain].append(sample)
    per_domain = {domain: _block(rows) for domain, rows in by_domain.items()}
    macro: dict[str, Any] = _counts(samples)
    for name in SCORES:
        # Past the threshold a domain without an answerable question counts too, where its questions have scores.
        means = [block[name] for block in per_domain.values() if block["answerable"] or block[name] is not None]
        macro[name] = None if not means or None in means else fmean(means)
    return {
        "macro": macro,
        "per_domain": per_domain,
        "yesno": _yesno(samples),
        "no_answer": no_answer(samples),
        "generation": _generation(samples),
    }


def _counts(samples: Sequence[Sample]) -> dict[str, Any]:
    answerable = [sample for sample in samples if sample.answerable]
    scored = [sample for sample in answerable if sample.status == "ok"]
    return {
        "n": len(scored),
        "answerable": len(answerable),
        "total": len(samples),
        "errors": sum(sample.status == "error" for sample in samples),
        "unscored": sum(sample.status == "unscored" for sample in samples),
        "coverage": len(scored) / len(answerable) if answerable else None,
        "documents": len({(sample.domain, sample.doc_id) for sample in scored}),
    }


def _block(samples: Sequence[Sample]) -> dict[str, Any]:
    block = _counts(samples)
    for name in SCORES:
        values = [value for sample in samples if sample.status == "ok" and (value := getattr(sample, name)) is not None]
        block[name] = 100 * fmean(values) if values else None
    return block


def _yesno(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Accuracy and macro F1 over the questions whose answer is yes, no or maybe."""
    rows = [s for s in samples if s.answer_type == "yesno" and s.answerable]
    scored = [s for s in rows if s.status == "ok"]
    if not rows:
        return None
    values = [s.em for s in scored if s.em is not None]
    macro = class_f1([s.prediction or "" for s in scored], [s.answers[0] for s in scored]) if scored else None
    return {
        "accuracy": 100 * fmean(values) if values else None,
        "macro_f1": None if macro is None else 100 * macro,
        "n": len(scored),
        "coverage": len(scored) / len(rows),
    }


def _generation(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """ROUGE-L and citations, 0 to 100: ``macro`` over domains and ``per_domain``, each with the answers counted."""
    rows = [sample for sample in samples if sample.status == "ok" and sample.cited is not None]
    if not rows:
        return None
    found: dict[str, Any] = {}
    for name in ("rouge_l", "citation_precision", "citation_recall"):
        by_domain: dict[str, list[float]] = defaultdict(list)
        for sample in rows:
            if (value := getattr(sample, name)) is not None:
                by_domain[sample.domain].append(100 * value)
        means = {domain: {"mean": fmean(values), "n": len(values)} for domain, values in by_domain.items()}
        macro = fmean(block["mean"] for block in means.values()) if means else None
        found[name] = {"macro": macro, "per_domain": means}
    return found


def no_answer(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """How well the unanswerable are told from the answerable, over both (SQuAD 2's question).

    ``rejected`` and ``answered`` are the shares, 0 to 100, of the unanswerable that got no answer and of the answerable
    that got one; None where there are none such.
    """
    if all(sample.answerable for sample in samples):
        return None
    scored = [s for s in samples if s.status == "ok" and s.no_answer_score is not None]
    unanswerable = [not s.answerable for s in scored]
    right = [float(bool(s.answered) == s.answerable) for s in scored]
    whole = [s.f1_thresholded for s in scored if s.f1_thresholded is not None]
    rejected = [float(not s.answered) for s in scored if not s.answerable]
    answered = [float(bool(s.answered)) for s in scored if s.answerable]
    return {
        "auroc": no_answer_auroc([s.no_answer_score or 0.0 for s in scored], unanswerable),
        "accuracy": 100 * fmean(right) if right else None,
        "rejected": 100 * fmean(rejected) if rejected else None,
        "answered": 100 * fmean(answered) if answered else None,
        "f1_all": 100 * fmean(whole) if whole else None,
        "n": len(scored),
        "unanswerable": sum(unanswerable),
        "coverage": len(scored) / len(samples),
    }
