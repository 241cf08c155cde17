"""Experts in slots against the same experts all at hand: equal to the last bit, whatever has to take turns."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragmoe import BundleError, ModelError, Neighbours
from ragmoe.experts import Experts, FeedForward, experts_class
from ragmoe.experts.on_demand import ExpertStore, OnDemandExperts
from ragmoe.gates import GateSettings, Routing, gate_class

D, H, E, R = 32, 64, 6, 8


def build(kind: str, resident: int | None = None, implementation: str = "grouped_mm") -> Experts:
    config = SimpleNamespace(
        hidden_size=D,
        intermediate_size=H,
        experts=E,
        expert_rank=8,
        hidden_act="gelu",
        initializer_range=0.02,
        shared_expert=False,
        _experts_implementation=implementation,
    )
    if resident is not None:
        config.resident_experts = resident
    experts = experts_class(kind)(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.requires_grad_(False)


class Source:
    """Experts cut out of those that are all at hand; ``broken`` cannot be read, ``read_`` says who was."""

    def __init__(self, whole: Experts) -> None:
        self.whole = dict(whole.named_parameters())
        self.broken: set[int] = set()
        self.asked: list[int] = []

    def read(self, expert: int, names: Sequence[str]) -> dict[str, Tensor]:
        if expert in self.broken:
            raise BundleError(f"expert.{expert}.1.safetensors is missing, although the map lists it")
        self.asked.append(expert)
        return {name: self.whole[name.removeprefix("layer.")][expert] for name in names}


def on_demand(whole: Experts, kind: str, resident: int, implementation: str = "grouped_mm") -> OnDemandExperts:
    slots = build(kind, resident, implementation)
    return OnDemandExperts(slots, E, Source(whole), {name: f"layer.{name}" for name, _ in slots.named_parameters()})


def network() -> FeedForward:
    up, down = nn.Linear(D, H).requires_grad_(False), nn.Linear(H, D).requires_grad_(False)
    return FeedForward(up, F.gelu, down)


def route(S: int, K: int, among: Sequence[int] = range(E)) -> Routing:
    logits_SE = torch.full((S, E), -torch.inf)
    logits_SE[:, list(among)] = torch.randn(S, len(among))
    weights_SK, experts_SK = logits_SE.softmax(dim=1).topk(K)
    return Routing(weights_SK, experts_SK, logits_SE)


def send(*experts: int) -> Routing:
    """One token for each of these experts, at weight one."""
    experts_SK = torch.tensor(experts).unsqueeze(1)
    return Routing(torch.ones(len(experts), 1), experts_SK, torch.zeros(len(experts), E))


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("resident", [1, 2, 3, E])
@pytest.mark.parametrize(
    ("kind", "implementation"), [("ffn", "eager"), ("ffn", "grouped_mm"), ("ffn", "batched_mm"), ("lora", "eager")]
)
def test_equal_to_the_last_bit(kind: str, implementation: str, resident: int, K: int) -> None:
    whole = build(kind, implementation=implementation)
    layer = on_demand(whole, kind, resident, implementation)
    for S, dense in ((40, network()), (7, network() if kind == "lora" else None), (1, network())):
        x_SD, r = torch.randn(S, D), route(S, K)
        got, want = layer(x_SD, r, dense), whole(x_SD, r, dense)
        if implementation == "batched_mm":
            # torch multiplies a batch of one matrix in another way, and so a pass of one pair.
            assert torch.allclose(got, want, atol=1e-6)
        else:
            assert torch.equal(got, want)
    assert len(layer.resident) <= resident


@pytest.mark.parametrize("kind", ["ffn", "lora"])
def test_half_precision_and_a_stream_of_batches(kind: str) -> None:
    whole = build(kind).to(torch.bfloat16)
    layer, dense = on_demand(whole, kind, 2).to(torch.bfloat16), network()
    dense.up.bfloat16(), dense.down.bfloat16()
    for among in ([0, 1], [1, 2, 3], [4, 5], [0, 1, 2, 3, 4, 5], [5, 0]):
        x_SD, r = torch.randn(30, D, dtype=torch.bfloat16), route(30, 2, among)
        r = r._replace(weights_SK=r.weights_SK.bfloat16())
        assert torch.equal(layer(x_SD, r, dense), whole(x_SD, r, dense))


@pytest.mark.parametrize("kind", ["ffn", "lora"])
@pytest.mark.parametrize("resident", [1, 3, E])
def test_choices_that_nobody_serves_add_nothing(kind: str, resident: int) -> None:
    """As where capacity is limited: E in the place of an expert."""
    whole, dense = build(kind), network()
    layer, x_SD, r = on_demand(whole, kind, resident), torch.randn(20, D), route(20, 2)
    lost_SK = torch.rand(20, 2) < 0.4
    served = r._replace(served_SK=r.experts_SK.masked_fill(lost_SK, E))
    want = whole(x_SD, r._replace(weights_SK=r.weights_SK.masked_fill(lost_SK, 0.0)), dense)
    assert torch.allclose(layer(x_SD, served, dense), want, atol=1e-6)
    emptied = r._replace(experts_SK=served.served_SK)
    assert torch.equal(layer(x_SD, emptied, dense), layer(x_SD, served, dense))


def test_who_is_read_and_who_leaves() -> None:
    whole = build("ffn")
    layer = on_demand(whole, "ffn", 2)
    source: Any = layer._source
    for asked, read, there in (
        ([0, 1], [0, 1], [0, 1]),
        ([1], [], [0, 1]),
        ([0], [], [1, 0]),
        ([2], [2], [0, 2]),
        ([0, 3], [3], [0, 3]),
        # Three at once take turns: those that are there go first, 3 with 0 and then 5.
        ([0, 3, 5], [5], [3, 5]),
    ):
        source.asked.clear()
        layer(torch.randn(len(asked), D), send(*asked), None)
        assert (source.asked, layer.resident) == (read, there), asked
    count = layer.counters
    assert (count.hits, count.misses, count.evictions) == (5, 5, 3)
    assert count.bytes_read == 5 * sum(x[0].nbytes for x in whole.parameters())
    assert {len(x) for x in layer.slots.parameters()} == {2}


def test_an_expert_that_cannot_be_read_leaves_all_as_it_was() -> None:
    whole = build("ffn")
    layer, x_SD = on_demand(whole, "ffn", 2), torch.randn(2, D)
    layer(x_SD, send(0, 1), None)
    layer._source.broken = {4}
    with pytest.raises(BundleError, match=r"expert\.4\.1\.safetensors is missing"):
        layer(x_SD, send(4, 4), None)
    assert layer.resident == [0, 1]
    assert torch.equal(layer(x_SD, send(0, 1), None), whole(x_SD, send(0, 1), None))
    assert layer.counters.misses == 2


def test_an_expert_of_another_shape_is_refused() -> None:
    layer = on_demand(build("ffn"), "ffn", 2)
    layer._source.whole["fused.up_proj"] = torch.zeros(E, H, D + 1)
    with pytest.raises(BundleError, match=r"expert 3 does not fit: 'layer\.fused\.up_proj' is \(64, 33\), expected"):
        layer(torch.randn(1, D), send(3), None)


def test_no_gradient_is_promised() -> None:
    layer = on_demand(build("ffn"), "ffn", 2)
    with pytest.raises(ModelError, match="experts on demand have no gradient"):
        layer(torch.randn(1, D, requires_grad=True), send(3), None)


def test_threads_take_turns() -> None:
    """Two readers that always need other experts, in slots for only some of them."""
    whole = build("ffn")
    layer, wrong = on_demand(whole, "ffn", 2), []

    def read(among: list[int], seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(40):
            x_SD = torch.randn(9, D, generator=draw)
            r = send(*(among[i] for i in torch.randint(len(among), (9,), generator=draw).tolist()))
            if not torch.equal(layer(x_SD, r, None), whole(x_SD, r, None)):
                wrong.append(among)

    threads = [threading.Thread(target=read, args=(among, seed)) for seed, among in enumerate([[0, 1, 2], [3, 4]])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- ahead of the first token -----------------------------------------------------------------------------------------


def memory_gate(scale: float = 6.0) -> Any:
    gate = gate_class("memory")(GateSettings(width=D, experts=E, top_k=2, neighbour_width=R))
    with torch.no_grad():
        gate.token.weight.zero_()
        gate.vote_scale.fill_(scale / 10)
    return gate.requires_grad_(False).eval()


def voting(*experts: int) -> Neighbours:
    """A question for each of these experts, whose only neighbour votes for it."""
    B = len(experts)
    votes_BNLE = F.one_hot(torch.tensor(experts), E).float().view(B, 1, 1, E)
    mask_BN = torch.ones(B, 1, dtype=torch.bool)
    return Neighbours(torch.zeros(B, 1, R), torch.zeros(B, 1), mask_BN, [], votes_BNLE)


@pytest.mark.parametrize("background", [True, False])
def test_foresight_turns_misses_into_hits(monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    if not background:
        monkeypatch.setattr(ExpertStore, "_background", lambda self, layer: None)
    whole, stream = build("ffn"), [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    found = {}
    for ahead in (True, False):
        layer = on_demand(whole, "ffn", 2)
        store = ExpertStore([(memory_gate(), layer)], 2)
        store.prefetching = ahead
        for expert in stream:
            store.prefetch(voting(expert))
            x_SD = torch.randn(3, D)
            assert torch.equal(layer(x_SD, send(*[expert] * 3), None), whole(x_SD, send(*[expert] * 3), None))
        found[ahead] = store.summary()
    # Each expert is asked for when six others were: the least recently used is always the one that comes next.
    assert (found[False]["hits"], found[False]["misses"], found[False]["prefetched"]) == (0, 12, 0)
    assert (found[True]["hits"], found[True]["misses"]) == (12, 0)
    assert (found[True]["prefetched"], found[True]["prefetched_used"]) == (12, 12)
    assert found[True]["hit_rate"] == 1.0 and found[True]["evictions"] == 10
    assert found[True]["bytes_read"] == found[False]["bytes_read"]
    assert found[True]["slot_bytes"] * E == 2 * sum(x.nbytes for x in whole.parameters())


def test_what_is_foreseen() -> None:
    layer, gate = on_demand(build("ffn"), "ffn", 3), memory_gate()
    assert layer.foreseen(gate, voting(4)) == [4]
    # The likeliest first, and no more than there are slots.
    assert layer.foreseen(gate, voting(5, 1, 5, 2, 1, 5)) == [5, 1, 2]
    assert len(layer.foreseen(gate, voting(0, 1, 2, 3, 4))) == 3
    # One that is not available is never chosen; and what is hardly more than even is no news.
    gate.set_available(torch.tensor([1, 1, 1, 1, 0, 1]).bool())
    assert layer.foreseen(gate, voting(4, 2)) == [2]
    assert layer.foreseen(memory_gate(scale=0.1), voting(4)) == []
    silent = gate_class("token")(GateSettings(width=D, experts=E, top_k=2, neighbour_width=R))
    assert layer.foreseen(silent, voting(4)) == []


def test_the_states_seen_so_far_take_part_in_what_is_foreseen() -> None:
    layer, gate = on_demand(build("ffn"), "ffn", 3), memory_gate(scale=2.0)
    gate.token.weight[3] = 1.0
    assert 3 not in layer.foreseen(gate, voting(1))
    layer(torch.full((4, D), 0.3), send(0, 0, 0, 0), None)
    layer(torch.full((2, D), 0.0), send(0, 0), None)
    assert torch.allclose(layer._mean_D, torch.full((D,), 0.2))
    assert layer.foreseen(gate, voting(1))[0] == 3


def test_what_was_read_for_nothing_is_no_use() -> None:
    whole = build("ffn")
    layer = on_demand(whole, "ffn", 2)
    store = ExpertStore([(memory_gate(), layer)], 2)
    assert not store.prefetching
    store.prefetching = True
    for expert in (1, 2):
        store.prefetch(voting(expert))
    for expert in (3, 4, 1):
        layer(torch.randn(1, D), send(expert), None)
    assert (layer.counters.prefetched, layer.counters.prefetched_used) == (2, 0)
    assert (layer.counters.hits, layer.counters.misses) == (0, 3)
    store.reset_counters()
    assert store.summary()["hit_rate"] is None and layer.resident == [4, 1]


def test_foresight_that_fails_is_nobodys_fault() -> None:
    whole = build("ffn")
    layer = on_demand(whole, "ffn", 2)
    store, layer._source.broken = ExpertStore([(memory_gate(), layer)], 2), {4}
    store.prefetching = True
    store.prefetch(voting(4))
    x_SD = torch.randn(1, D)
    assert torch.equal(layer(x_SD, send(1), None), whole(x_SD, send(1), None))
    store.prefetch(voting(4))
    with pytest.raises(BundleError, match="is missing"):
        layer(x_SD, send(4), None)
