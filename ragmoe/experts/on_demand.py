"""Experts that stay in their files until a token is routed to them: N slots a layer in the place of E experts.

Slots are an ordinary fused parameter of N experts, run by the same kernels; what is routed to an expert is sent to its
slot. A batch that needs more than N experts of a layer is computed in several passes, all pairs of one expert in one of
them, and each token's choices are then summed in the order they have without slots. So the answer is that of a model
with all experts in memory, to the last bit, but for two habits of torch that can cost one unit in the last place:
``batched_mm`` multiplies a pass of a single pair in another way, and where the hidden width is no multiple of 64, the
vectorised activation of full experts treats the last elements of a tensor apart.

S tokens, D model width, E experts, K experts a token, P = S*K pairs of token and expert, N slots, B questions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ragmoe._errors import BundleError, ModelError
from ragmoe.experts.base import Experts, FeedForward
from ragmoe.experts.lru import Counters, SlotTable
from ragmoe.gates.base import Gate
from ragmoe.gates.routing import Routing
from ragmoe.neighbours import Neighbours

# An expert is brought in ahead where the gate foresees so many times its even share for it. Below that the foresight is
# hardly more than a guess, and reading an expert that nobody asks for costs as much as a miss.
_CLEARLY = 1.5


class ExpertSource(Protocol):
    """Where single experts come from."""

    def read(self, expert: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of one expert by the names of the fused ones, without the dimension E; BundleError where it fails."""


class OnDemandExperts(nn.Module):
    """The experts of one layer, N of them in memory. For inference alone; calls from several threads take turns.

    Attributes:
        slots: N experts of the layer's kind; which expert lies where changes as they are asked for.
        counters: hits and misses of this layer.
    """

    def __init__(self, slots: Experts, experts: int, source: ExpertSource, names: Mapping[str, str]) -> None:
        """Take over the slots of a layer.

        Args:
            experts: E, how many the source has.
            names: by the name of each parameter of ``slots`` the one that the source has for it.
        """
        super().__init__()
        self.slots = slots
        self.experts = experts
        self.counters = Counters()
        self._source = source
        self._names = dict(names)
        self._resident = len(next(iter(slots.parameters())))
        self._table = SlotTable(self._resident)
        # Brought in ahead, and not asked for since.
        self._ahead: set[int] = set()
        self._mean_D: Tensor | None = None
        self._tokens = 0
        self._lock = threading.Lock()
        self._pending: Future[None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    # Refused by whoever loads the model: what is added to keys and values has no slots.
    key_value = None

    @property
    def resident(self) -> list[int]:
        """The experts in memory, the least recently used first."""
        return self._table.experts()

    def forward(self, x_SD: Tensor, routing: Routing, dense: FeedForward | None) -> Tensor:
        """What the chosen experts answer, weighted: y_SD, as ``Experts.forward`` says it.

        Raises:
            ModelError: a gradient is wanted.
            BundleError: an expert's file is missing or damaged.
        """
        if torch.is_grad_enabled() and x_SD.requires_grad:
            raise ModelError(
                "experts on demand have no gradient: their slots hold other experts by the time it would be taken",
                hint="load the model without resident_experts to train it",
            )
        self.settle()
        served_SK = routing.experts_SK if routing.served_SK is None else routing.served_SK
        with self._lock:
            self._remember(x_SD)
            asked = served_SK.unique().tolist()
            needed = [expert for expert in asked if expert < self.experts]
            # Slots that are left empty (expert E) are known by their number, which is another one here: in passes they
            # are simply in none.
            if len(needed) == len(asked) <= self._resident:
                slot_E = self._bring(needed).to(served_SK.device)
                here = routing._replace(experts_SK=slot_E[served_SK], served_SK=None)
                return self.slots(x_SD, here, dense)
            return self.slots.in_passes(x_SD, routing, dense, _Passes(self, served_SK.reshape(-1), needed))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One parameter of the slots for each of all E experts, from the files."""
        dtype = self.slots.get_parameter(name).dtype
        for expert in range(self.experts):
            yield self._source.read(expert, [self._names[name]])[self._names[name]].to(dtype)

    # -- ahead of the first token -----------------------------------------------------------------------------------

    def foreseen(self, gate: Gate, neighbours: Neighbours) -> list[int]:
        """The experts, at most N and the likeliest first, that the gate clearly expects to choose for its neighbours.

        What it foresees is said of the mean of all token states seen so far.
        """
        # The model may have been moved since.
        mean_D = None if self._mean_D is None else self._mean_D.to(neighbours.embeddings_BNR.device)
        logits_BE = gate.foresee(neighbours, mean_D)
        if logits_BE is None:
            return []
        share_BE = logits_BE.softmax(dim=-1)
        open_E = ~logits_BE.isneginf().all(dim=0)
        clear_E = (share_BE * open_E.sum() > _CLEARLY).any(dim=0)
        order_E = share_BE.sum(dim=0).argsort(descending=True, stable=True)
        return order_E[clear_E[order_E]][: self._resident].tolist()

    def bring_ahead(self, experts: Sequence[int], pool: ThreadPoolExecutor | None) -> None:
        """Read experts before they are asked for, in the background where there is a pool."""
        if pool is None:
            self._read_ahead(experts)
        else:
            self._pending = pool.submit(self._read_ahead, experts)

    def settle(self) -> None:
        """Wait for what is being read ahead."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _read_ahead(self, experts: Sequence[int]) -> None:
        with self._lock:
            try:
                self._bring(experts, ahead=True)
            except BundleError:
                # Nobody may need it: whoever does is told then.
                return

    def _remember(self, x_SD: Tensor) -> None:
        """Take the tokens into the mean of all that were seen."""
        if len(x_SD):
            self._tokens += len(x_SD)
            mean_D = x_SD.detach().float().mean(dim=0)
            before_D = torch.zeros_like(mean_D) if self._mean_D is None else self._mean_D.to(mean_D.device)
            self._mean_D = before_D + (mean_D - before_D) * (len(x_SD) / self._tokens)

    # -- slots ------------------------------------------------------------------------------------------------------

    def _bring(self, experts: Sequence[int], *, ahead: bool = False) -> Tensor:
        """Let these experts, at most N, have a slot each; slot_E is int64 (E + 1), N for all the others."""
        slot_E = torch.full((self.experts + 1,), self._resident)
        count = self.counters
        for expert in experts:
            if expert in self._table:
                slot_E[expert] = self._table.use(expert)
                count.hits += not ahead
            else:
                slot_E[expert] = self._load(expert, experts)
                count.prefetched += ahead
                count.misses += not ahead
                if ahead:
                    self._ahead.add(expert)
            if not ahead and expert in self._ahead:
                self._ahead.remove(expert)
                count.prefetched_used += 1
        return slot_E

    @torch.no_grad()
    def _load(self, expert: int, keep: Sequence[int]) -> int:
        """Copy an expert from its file into a slot; nobody in ``keep`` has to leave."""
        # Before anybody leaves: where this fails, all is as it was.
        tensors = self._source.read(expert, list(self._names.values()))
        for own, name in self._names.items():
            want, got = self.slots.get_parameter(own).shape[1:], tensors[name].shape
            if got != want:
                raise BundleError(f"expert {expert} does not fit: '{name}' is {tuple(got)}, expected {tuple(want)}")
        slot, leaving = self._table.free(keep)
        if leaving is not None:
            self.counters.evictions += 1
            self._ahead.discard(leaving)
        for own, name in self._names.items():
            self.slots.get_parameter(own)[slot].copy_(tensors[name])
            self.counters.bytes_read += tensors[name].nbytes
        self._table.fill(expert, slot)
        return slot


class OnDemandFused(OnDemandExperts):
    """The same for the own experts of a family of transformers, called as the family calls them."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # type: ignore[override]
        """y_SD for hidden_states (S, D), top_k_index (S, K) int64 and top_k_weights (S, K)."""
        # Of the logits only their number counts.
        logits_SE = hidden_states.new_zeros(len(hidden_states), self.experts)
        return super().forward(hidden_states, Routing(top_k_weights, top_k_index, logits_SE), None)


class _Passes:
    """The pairs of a batch, in as many passes as the experts they need must take turns in the slots.

    Each iteration goes through all of them, beginning with the experts that are there.
    """

    def __init__(self, layer: OnDemandExperts, experts_P: Tensor, needed: Sequence[int]) -> None:
        self._layer, self._experts_P, self._needed = layer, experts_P, needed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        layer, left = self._layer, list(self._needed)
        while left:
            there = layer.resident
            group = sorted(left, key=lambda expert: (expert not in there, expert))[: layer._resident]
            slots_P = layer._bring(group).to(self._experts_P.device)[self._experts_P]
            pairs_p = (slots_P < layer._resident).nonzero().flatten()
            yield pairs_p, slots_P[pairs_p]
            left = [expert for expert in left if expert not in group]


class ExpertStore:
    """The experts of all layers of a model, N of E in memory in each.

    Attributes:
        resident, experts: N and E.
        prefetching: whether experts are brought in ahead of the first layer, by what the gates foresee of neighbours.
            Off at first: more of them are then there when they are asked for, but more is read, and where the system
            has the files in its cache that costs more than it saves (``eval/bench/experts_on_demand.py``).
    """

    def __init__(self, layers: Sequence[tuple[Gate, OnDemandExperts]], resident: int) -> None:
        self.resident = resident
        self.experts = layers[0][1].experts
        self.prefetching = False
        self.layers = [layer for _, layer in layers]
        self._gates = [gate for gate, _ in layers]
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes threads of its own once it needs them.
        return {**self.__dict__, "_pool": None}

    def prefetch(self, neighbours: Neighbours) -> None:
        """Bring in what the gates foresee for these neighbours; on a processor in the background, layer after layer."""
        if not self.prefetching:
            return
        for gate, layer in zip(self._gates, self.layers, strict=True):
            layer.settle()
            if experts := layer.foreseen(gate, neighbours):
                layer.bring_ahead(experts, self._background(layer))

    def counters(self) -> Counters:
        """Hits and misses of all layers together."""
        return sum((layer.counters for layer in self.layers), Counters())

    def reset_counters(self) -> None:
        """Count from zero again; the slots keep what they hold."""
        for layer in self.layers:
            layer.settle()
            layer.counters = Counters()

    def summary(self) -> dict[str, Any]:
        """Counters, their hit rate, and the bytes of all slots, as JSON holds it."""
        counters = self.counters()
        slot_bytes = sum(x.nbytes for layer in self.layers for x in layer.slots.parameters())
        sizes = {"experts": self.experts, "resident": self.resident, "slot_bytes": slot_bytes}
        return {**sizes, **asdict(counters), "hit_rate": counters.hit_rate}

    def _background(self, layer: OnDemandExperts) -> ThreadPoolExecutor | None:
        # On a GPU the copies would have to follow the stream of whoever runs the layers.
        if next(layer.slots.parameters()).device.type != "cpu":
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ragmoe-experts")
        return self._pool
