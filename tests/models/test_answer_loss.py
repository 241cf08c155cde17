"""The reader's loss: worked by hand, against Hugging Face's, and cut into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import ForQuestionAnsweringLoss

from ragmoe.models.loss import answer_loss


def test_by_hand() -> None:
    """Two questions of two sequences of three candidates ("no answer here" first); only the first has an answer."""
    start_QC = torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 4.0]]).log()
    end_QC = torch.zeros(4, 3)
    loss = answer_loss(start_QC, end_QC, torch.tensor([[1, 0], [0, 0]]), torch.tensor([[2, 0], [0, 0]]))
    # Local: the right ones have 2/4, 2/4, 1/3, 1/6 at the start and 1/3 each at the end.
    local = ((2 * math.log(2) + math.log(3) + math.log(6)) / 4 + math.log(3)) / 2
    # Shared: of the first question's four answers (2, 1, 1, 1) and (1, 1, 1, 1); the second question adds nothing.
    shared = ((math.log(5 / 2) + 0) / 2 + (math.log(4) + 0) / 2) / 2
    assert loss.item() == pytest.approx((local + shared) / 2)


def random_case(B: int, M: int, C: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    start_BM, end_BM = torch.zeros(B, M, dtype=torch.long), torch.zeros(B, M, dtype=torch.long)
    for b in range(0, B, 2):
        start_BM[b, b % M], end_BM[b, b % M] = 4 + b % 3, 6
    return torch.randn(B * M, C), torch.randn(B * M, C), start_BM, end_BM


def test_local_part_is_the_question_answering_loss_of_hugging_face() -> None:
    start_QC, end_QC, start_BM, end_BM = random_case(B=4, M=1)
    local = ForQuestionAnsweringLoss(start_QC, end_QC, start_BM, end_BM)
    answered = start_BM[:, 0] > 0
    shared = [
        F.cross_entropy(x[answered, 1:], y[answered, 0] - 1, reduction="sum") / 4
        for x, y in ((start_QC, start_BM), (end_QC, end_BM))
    ]
    assert torch.allclose(answer_loss(start_QC, end_QC, start_BM, end_BM), (local + sum(shared) / 2) / 2)


def test_without_any_answer_only_the_local_part_is_left() -> None:
    start_QC, end_QC, *_ = random_case(B=2, M=3)
    nothing = torch.zeros(2, 3, dtype=torch.long)
    want = ForQuestionAnsweringLoss(start_QC, end_QC, nothing.flatten(), nothing.flatten()) / 2
    assert torch.allclose(answer_loss(start_QC, end_QC, nothing, nothing), want)


def test_shared_part_compares_sequences() -> None:
    """A wrong answer with a high score in the other passage of the same question costs, that of another does not."""
    start_QC, end_QC, start_BM, end_BM = random_case(B=2, M=2)
    before = answer_loss(start_QC, end_QC, start_BM, end_BM)
    shift = torch.zeros_like(start_QC)
    # In these sequences "no answer here" is right: raising all candidates leaves the local part as it is.
    shift[1] = 5.0
    assert answer_loss(start_QC + shift, end_QC, start_BM, end_BM) > before + 0.1
    elsewhere = torch.zeros_like(start_QC)
    elsewhere[2:] = 5.0
    assert torch.allclose(answer_loss(start_QC + elsewhere, end_QC, start_BM, end_BM), before)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_equal_micro_batches_give_the_same_loss_and_gradient(parts: int) -> None:
    start_QC, end_QC, start_BM, end_BM = random_case(B=4, M=2)
    start_QC.requires_grad_()
    whole = answer_loss(start_QC, end_QC, start_BM, end_BM)
    cut = [x.chunk(parts) for x in (start_QC, end_QC, start_BM, end_BM)]
    mean = torch.stack([answer_loss(*part) for part in zip(*cut, strict=True)]).mean()
    assert torch.allclose(mean, whole)
    gradients = [torch.autograd.grad(loss, start_QC)[0] for loss in (whole, mean)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_candidates_that_are_masked_change_nothing() -> None:
    start_QC, end_QC, start_BM, end_BM = random_case(B=4, M=2)
    want = answer_loss(start_QC, end_QC, start_BM, end_BM)
    start_QC, end_QC = (F.pad(x, (0, 5), value=torch.finfo(torch.float32).min) for x in (start_QC, end_QC))
    assert torch.allclose(answer_loss(start_QC, end_QC, start_BM, end_BM), want)


def test_gradient_numerically() -> None:
    start_QC, end_QC, start_BM, end_BM = random_case(B=2, M=1, C=7)
    inputs = (start_QC.double().requires_grad_(), end_QC.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda s, e: answer_loss(s, e, start_BM, end_BM), inputs)
