"""How logits become weights: scores, known by name to configurations. S tokens, E experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ragmoe._registry import Registry


class Scores(ABC):
    """A positive score of each expert: it is chosen by the score, and weighed by it.

    Scores are kept as logarithms, in which -inf (an expert that is not available) stays what it is.
    """

    summary: ClassVar[str] = ""

    @staticmethod
    @abstractmethod
    def log(logits_SE: Tensor) -> Tensor:
        """The logarithm of the scores, up to one constant a token."""

    @staticmethod
    @abstractmethod
    def log_total(logits_SE: Tensor) -> Tensor:
        """The logarithm of what scores are divided by where those chosen are not made to sum to one, (S, 1)."""

    @staticmethod
    @abstractmethod
    def ranked(logits_SE: Tensor) -> Tensor:
        """What experts are ranked by, to which the balance bias is added."""


_SCORES: Registry[type[Scores]] = Registry("kind of scores")
register_scores, scores_names, scores_class = _SCORES.register, _SCORES.names, _SCORES.find


@register_scores("softmax")
class SoftmaxScores(Scores):
    """Experts compete for a share of one. Source: Shazeer et al. 2017; Fedus et al. 2021 (Switch)."""

    summary = "shares of one: experts compete; the default"

    @staticmethod
    def log(logits_SE: Tensor) -> Tensor:
        return logits_SE

    @staticmethod
    def log_total(logits_SE: Tensor) -> Tensor:
        return logits_SE.logsumexp(dim=-1, keepdim=True)

    @staticmethod
    def ranked(logits_SE: Tensor) -> Tensor:
        return logits_SE


@register_scores("sigmoid")
class SigmoidScores(Scores):
    """Each expert for itself. Source: DeepSeek-AI 2024 (DeepSeek-V3, section 2.1.2)."""

    summary = "each expert for itself; goes with the balance bias (train.balance_bias_rate) in many-expert models"

    @staticmethod
    def log(logits_SE: Tensor) -> Tensor:
        return F.logsigmoid(logits_SE)

    @staticmethod
    def log_total(logits_SE: Tensor) -> Tensor:
        return logits_SE.new_zeros(logits_SE.shape[0], 1)

    @staticmethod
    def ranked(logits_SE: Tensor) -> Tensor:
        # An expert that is not available would have the score zero, and a bias could lift it over the others.
        return logits_SE.sigmoid().masked_fill(logits_SE.isneginf(), -torch.inf)
