"""Low-rank deltas of E experts: applied to sorted rows, and averaged.

P rows sorted by expert, D width, r rank, H width of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ragmoe.experts.rows import grouped_product


def low_rank(x_PD: Tensor, a_EDr: Tensor, b_ErH: Tensor, offsets_E: Tensor) -> Tensor:
    """``x A_e B_e`` of each row by its expert, (P, H)."""
    inner_Pr = grouped_product(x_PD, a_EDr.to(x_PD.dtype), offsets_E)
    return grouped_product(inner_Pr, b_ErH.to(x_PD.dtype), offsets_E)


class Product(NamedTuple):
    """Factors of a product, the norm of the exact one, and how much of it they keep."""

    a: Tensor
    b: Tensor
    norm: float
    kept: float


def mean_product(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Product:
    """Factors of the mean of products, cut to the rank of the first, through QR: the products are never made."""
    dtype, rank = factors[0][0].dtype, factors[0][0].shape[-1]
    left = torch.cat([weight * a.double() for (a, _), weight in zip(factors, weights, strict=True)], dim=1)
    right = torch.cat([b.double() for _, b in factors], dim=0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    if not s.any():
        # Untrained: with A and B both zero it could never learn.
        return Product(factors[0][0].clone(), torch.zeros_like(factors[0][1]), 0.0, 0.0)
    root = s[:rank].sqrt()
    a, b = q_left @ u[:, :rank] * root, root.unsqueeze(1) * (v[:rank] @ q_right.T)
    norm, kept = (float(x.square().sum().sqrt()) for x in (s, s[:rank]))
    return Product(a.to(dtype).contiguous(), b.to(dtype).contiguous(), norm, kept)
