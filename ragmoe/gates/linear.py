"""The product that makes an expert's logit, which must be the same whatever other experts there are.

S tokens, D width of what they are, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Experts of one product.
_BLOCK = 8


def expert_logits(x_SD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x_SD @ weight_ED.T``, each column to the last bit as it is beside any number of others.

    An expert that is added and held back must leave all answers as they were, and to a processor's libraries the order
    in which a product is summed depends on the number of its columns. So on a CPU there are always eight of them, the
    last ones zeros. Of more experts than that the product takes three times as long, which is little beside what the
    experts themselves take. A GPU chooses its kernels by more than columns, and nothing is promised there.
    """
    if weight_ED.device.type != "cpu":
        return F.linear(x_SD, weight_ED)
    E = len(weight_ED)
    parts = F.pad(weight_ED, (0, 0, 0, -E % _BLOCK)).split(_BLOCK)
    return torch.cat([F.linear(x_SD, part_ED) for part_ED in parts], dim=-1)[..., :E].contiguous()


class ExpertLinear(nn.Linear):
    """A linear map without a bias whose outputs are experts; see ``expert_logits``."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, bias=False)

    def forward(self, x_SD: Tensor) -> Tensor:
        return expert_logits(x_SD, self.weight)
