"""Ridge regression in closed form. Q examples, R inputs, D outputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def ridge(blocks: Iterable[tuple[Tensor, Tensor]], penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight (D, R) and offset (D,), float32, of ``y = W x + b`` with the least squared error and ``penalty |W|^2``.

    It is solved in double precision and around the means, so the offset is not penalised.

    Args:
        blocks: the examples in pieces, at least one: x (Q, R) and y (Q, D). Only sums over them are held.
    """
    count, sums = 0, [torch.zeros((), dtype=torch.float64)] * 4
    for x_QR, y_QD in blocks:
        x_QR, y_QD = x_QR.double(), y_QD.double()
        own = (x_QR.sum(dim=0), y_QD.sum(dim=0), x_QR.T @ x_QR, x_QR.T @ y_QD)
        sums = [total + x for total, x in zip(sums, own, strict=True)]
        count += len(x_QR)
    x_R, y_D, square_RR, cross_RD = sums
    middle_R, share_D = x_R / count, y_D / count
    square_RR = square_RR - count * torch.outer(middle_R, middle_R) + penalty * torch.eye(len(x_R), dtype=x_R.dtype)
    cross_RD = cross_RD - count * torch.outer(middle_R, share_D)
    weight_DR = torch.linalg.solve(square_RR, cross_RD).T
    return weight_DR.float(), (share_D - weight_DR @ middle_R).float()
