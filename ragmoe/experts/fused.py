"""What experts have in common that transformers' kernels run: one module of fused parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import initialization as init

from ragmoe.experts.base import Experts, FeedForward
from ragmoe.experts.kernel import runs_here
from ragmoe.experts.rows import weighted_sum
from ragmoe.gates.routing import Routing


class FusedKind(Experts):
    """Experts as whole networks, E of them in one module; beside a dense network, where the layer kept one.

    Args:
        fused: the module where there is one already; None makes it.

    Attributes:
        fused_class: module of ``(x_SD, experts_SK, weights_SK) -> y_SD``, made of the model's configuration.
        fused: the module.
        std: of the normal distribution that untrained matrices are drawn from.
    """

    needs_dense = False
    has_rank = False
    fused_class: ClassVar[type[nn.Module]]

    def __init__(self, config: Any, fused: nn.Module | None = None) -> None:
        super().__init__(config)
        self.std = float(config.initializer_range)
        self.fused: Any = self.fused_class(config) if fused is None else fused

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, parameter in self.fused.named_parameters():
            if name.endswith("bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=self.std)

    def allow_empty(self, *, drops: bool) -> None:
        super().allow_empty(drops=drops)
        # Transformers' kernels then expect E for nobody, which expert parallelism writes for other ranks' experts.
        self.fused._is_expert_parallel = True

    def weighed(self, y_SKD: Tensor, weights_SK: Tensor) -> Tensor:
        if runs_here(self.fused, y_SKD):
            return weighted_sum(y_SKD, weights_SK)
        return super().weighed(y_SKD, weights_SK)

    def forward(self, x_SD: Tensor, routing: Routing, dense: FeedForward | None) -> Tensor:
        y_SD = self.fused(x_SD, routing.experts_SK, self.kept_weights(routing))
        return y_SD + dense(x_SD) if dense is not None else y_SD
