"""What tells the copies of one dense gated network apart, known by name. E experts, H hidden width, D model width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ragmoe._errors import ConfigError
from ragmoe._registry import Registry


class Start(ABC):
    """One way to start copied experts.

    Args:
        amount: how much they differ, 0 to ``most``; None takes ``usual``.

    Raises:
        ConfigError: ``amount`` is out of bounds.
    """

    summary: ClassVar[str]
    usual: ClassVar[float] = 0.0
    most: ClassVar[float] = 0.0

    def __init__(self, amount: float | None, generator: torch.Generator) -> None:
        self.amount, self.generator = self.usual if amount is None else amount, generator
        if not 0 <= self.amount <= self.most:
            bounds = f"0 to {self.most:g}" if self.most else "none, for copies are exact"
            raise ConfigError(f"the amount by which experts differ is {self.amount:g}: expected {bounds}")

    @abstractmethod
    def change(self, gate_up_E2HD: Tensor, down_EDH: Tensor) -> None:
        """Change copies in place."""

    @torch.no_grad()
    def apply(self, gate_up_E2HD: Tensor, down_EDH: Tensor) -> float:
        """Change copies in place; the largest absolute deviation of a weight, 0.0 where copies are exact."""
        before = [x.clone() for x in (gate_up_E2HD, down_EDH)]
        self.change(gate_up_E2HD, down_EDH)
        after = (gate_up_E2HD, down_EDH)
        return max(float((x - y).abs().max()) for x, y in zip(after, before, strict=True))

    def normal(self, shape: torch.Size, mean: Tensor, std: Tensor) -> Tensor:
        """Numbers drawn in float32, wherever the weights are."""
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        return (drawn * std.float().cpu() + mean.float().cpu()).to(mean)


_STARTS: Registry[type[Start]] = Registry("way to start experts")
register_start, start_names, start_class = _STARTS.register, _STARTS.names, _STARTS.find


@register_start("copy")
class Copy(Start):
    """Exact copies: at first the sparse model answers what the dense one did. Source: Komatsuzaki et al. 2022."""

    summary = "exact copies"

    def change(self, gate_up_E2HD: Tensor, down_EDH: Tensor) -> None:
        return


@register_start("noise")
class Noise(Start):
    """Gaussian noise on every weight; ``amount`` is its standard deviation relative to that of the matrix."""

    summary = "copies with noise"
    usual, most = 0.01, 1.0

    def change(self, gate_up_E2HD: Tensor, down_EDH: Tensor) -> None:
        for fused in (*gate_up_E2HD.chunk(2, dim=1), down_EDH):
            fused += self.normal(fused.shape, fused.new_zeros(()), self.amount * fused[0].std())


@register_start("drop")
class Drop(Start):
    """A share of each expert's hidden units is drawn anew, with the mean and spread of the weights that go.

    ``amount`` is the share. Each expert drops units of its own, in all three matrices the same.
    Source: Nakamura et al. 2025 (Drop-Upcycling), section 3.
    """

    summary = "copies of which a share of the hidden units starts anew"
    usual, most = 0.5, 1.0

    def change(self, gate_up_E2HD: Tensor, down_EDH: Tensor) -> None:
        E, _, H = down_EDH.shape
        for expert in range(E):
            units = torch.randperm(H, generator=self.generator)[: round(self.amount * H)].to(down_EDH.device)
            rows = [half[expert] for half in gate_up_E2HD.chunk(2, dim=1)]
            for matrix_HD in (*rows, down_EDH[expert].T) if len(units) else ():
                gone = matrix_HD[units]
                matrix_HD[units] = self.normal(gone.shape, gone.mean(), gone.std())
