"""Rows of pairs: to the experts and back, by hand and against plain indexing, with first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ragmoe.experts.rows import Pairs, dispatch

E, D = 5, 3
CHOSEN = torch.tensor([[2, 0], [2, 3], [0, 2]])
PARTLY = torch.tensor([[2, 5], [5, 5], [0, 2], [5, 4]])


def test_dispatch_by_hand() -> None:
    found = dispatch(CHOSEN, experts=E)
    assert found.order_P.tolist() == [1, 4, 0, 2, 5, 3]
    assert found.back_P.tolist() == [2, 0, 3, 5, 1, 4]
    assert found.offsets_E.tolist() == [2, 2, 5, 6, 6]
    assert found.offsets_E.dtype == torch.int32


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def check(got: Callable[..., Tensor], want: Callable[..., Tensor], *inputs: Tensor) -> None:
    assert torch.allclose(got(*inputs), want(*inputs))
    # Weighed, so that a gradient that is right only where all incoming ones are the same does not pass.
    turned = torch.linspace(-1, 1, got(*inputs).numel(), dtype=torch.float64).view_as(got(*inputs))
    both = [torch.autograd.grad((f(*inputs) * turned).sum(), inputs) for f in (got, want)]
    assert all(torch.allclose(a, b) for a, b in zip(*both, strict=True))
    assert torch.autograd.gradgradcheck(lambda *x: got(*x).square(), inputs)


@pytest.mark.parametrize(("experts_SK", "partial"), [(CHOSEN, False), (CHOSEN, True), (PARTLY, True)])
def test_gathered_and_combined(experts_SK: Tensor, partial: bool) -> None:
    pairs = Pairs(experts_SK, E, partial=partial)
    # Sorted by expert, then by token: written out as (token, choice).
    order = sorted((int(e), s, k) for s, row in enumerate(experts_SK) for k, e in enumerate(row) if e < E)
    token, choice = [s for _, s, _ in order], [k for _, _, k in order]
    S, K, P = *experts_SK.shape, len(order)

    def combined(y_PD: Tensor, weights_SK: Tensor) -> Tensor:
        rows = [torch.zeros(D, dtype=torch.float64) for _ in range(S)]
        for p in range(P):
            rows[token[p]] = rows[token[p]] + weights_SK[token[p], choice[p]] * y_PD[p]
        return torch.stack(rows)

    check(pairs.gather, lambda x_SD: x_SD[token], doubles(S, D))
    check(pairs.combine, combined, doubles(P, D), doubles(S, K))
    check(
        pairs.combine_changes,
        lambda y_PD, x_SD, weights_SK: combined(y_PD - x_SD[token], weights_SK),
        doubles(P, D), doubles(S, D), doubles(S, K),
    )  # fmt: skip


@pytest.mark.parametrize("K", [1, 2, 3])
def test_blended(K: int) -> None:
    S = 4
    experts_SK = torch.stack([torch.randperm(E)[:K] for _ in range(S)])
    pairs = Pairs(experts_SK, E, partial=False)
    row_SK = pairs.rows_of(torch.arange(S * K)).view(S, K)

    def weighed(y_PD: Tensor, logits_SK: Tensor) -> Tensor:
        return torch.einsum("skd,sk->sd", y_PD[row_SK], logits_SK.softmax(dim=1))

    # By way of logits: what the first weight is follows from the others.
    check(
        lambda y_PD, logits_SK: pairs.blend(y_PD, logits_SK.softmax(dim=1)), weighed, doubles(S * K, D), doubles(S, K)
    )
    x_SD = torch.randn(S, D)
    assert torch.equal(pairs.blend(pairs.gather(x_SD), torch.rand(S, K).softmax(dim=1)), x_SD)


def test_without_a_change_exactly_nothing_is_combined() -> None:
    pairs, x_SD = Pairs(CHOSEN, E, partial=False), torch.randn(3, D)
    assert not pairs.combine_changes(pairs.gather(x_SD), x_SD, torch.rand(3, 2)).any()


@pytest.mark.parametrize("experts_SK", [torch.zeros(0, 2, dtype=torch.long), torch.full((3, 2), E)])
def test_nobody_is_served(experts_SK: Tensor) -> None:
    pairs, S = Pairs(experts_SK, E, partial=True), experts_SK.shape[0]
    x_SD = torch.randn(S, D, requires_grad=True)
    y_PD = pairs.gather(x_SD)
    assert y_PD.shape == (0, D) and pairs.offsets_E.tolist() == [0] * E
    y_SD = pairs.combine(y_PD, torch.ones(S, 2)) + pairs.combine_changes(y_PD, x_SD, torch.ones(S, 2))
    assert torch.equal(y_SD, torch.zeros(S, D))
    y_SD.sum().backward()
    assert torch.equal(x_SD.grad, torch.zeros(S, D))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    # One, added to a number from which on only every fourth is written, is lost again if it comes alone.
    large = 512.0 if dtype == torch.bfloat16 else 4096.0
    pairs = Pairs(torch.arange(8).unsqueeze(0), 8, partial=False)
    y_PD = torch.ones(8, D, dtype=dtype)
    y_PD[0] = large
    assert pairs.combine(y_PD, torch.ones(1, 8)).tolist() == [[large + 8.0] * D]
    x_SD = torch.zeros(1, D, dtype=dtype, requires_grad=True)
    pairs.gather(x_SD).backward(y_PD)
    assert x_SD.grad.tolist() == [[large + 8.0] * D]
