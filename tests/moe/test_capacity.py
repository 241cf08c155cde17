"""Capacity: exact counts, who is served first, what becomes of the rest, and what must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_config import layer_config
from torch import Tensor, nn
from torch.nn import functional as F

from ragmoe import ConfigError, RoutingStatistics
from ragmoe.experts import FeedForward
from ragmoe.gates import Routing, Tokens
from ragmoe.moe import MoELayer
from ragmoe.moe.capacity import Capacity, expert_capacity, overflow_names, priority_names

D, H, E, K = 16, 32, 4, 2


def routing(logits_SE: Tensor, top_k: int = K) -> Routing:
    weights_SK, experts_SK = logits_SE.softmax(dim=1).topk(top_k)
    return Routing(weights_SK, experts_SK, logits_SE)


def by_loop(r: Routing, mask_S: Tensor, capacity: int, overflow: str, order: list[int]) -> list[list[int]]:
    """Token by token, slot by slot; with `next` in rounds."""
    (S, slots), experts = r.experts_SK.shape, r.logits_SE.shape[1]
    used, served = [0] * experts, [[experts] * slots for _ in range(S)]
    asked = [set(r.experts_SK[s].tolist()) for s in range(S)]
    for k in range(slots):
        for s in order:
            e = int(r.experts_SK[s, k])
            if mask_S[s] and used[e] < capacity:
                served[s][k], used[e] = e, used[e] + 1
    for _ in range(experts if overflow == "next" else 0):
        room = [n < capacity for n in used]
        wishes = {}
        for s in range(S):
            ranked = sorted(range(experts), key=lambda e: -r.logits_SE[s, e].item())
            free = [e for e in ranked if e not in asked[s] and room[e] and not r.logits_SE[s, e].isneginf()]
            wanting = [k for k in range(slots) if served[s][k] == experts and mask_S[s]]
            wishes |= {(s, k): e for k, e in zip(wanting, free, strict=False)}
        for k in range(slots):
            for s in order:
                if (s, k) in wishes:
                    e = wishes[s, k]
                    asked[s].add(e)
                    if used[e] < capacity:
                        served[s][k], used[e] = e, used[e] + 1
    return served


@given(
    st.integers(0, 14), st.integers(1, 5), st.integers(1, 3), st.sampled_from([0.3, 0.5, 1.0, 1.25, 4.0]),
    st.sampled_from(overflow_names()), st.sampled_from(priority_names()), st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_against_a_loop(
    S: int, experts: int, top_k: int, factor: float, overflow: str, priority: str, seed: int
) -> None:
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    # Distinct logits, so that the order of experts is no matter of rounding.
    r = routing(torch.rand(S, experts).argsort(dim=1).float(), top_k)
    mask_S = torch.rand(S) < 0.8
    limit = Capacity(factor, overflow, priority)
    served_SK = limit.serve(r, mask_S, top_k, training=False)
    order = limit.priority.order(r, mask_S, False).tolist()
    capacity = math.ceil(int(mask_S.sum()) * top_k * factor / experts - 1e-9)
    assert served_SK.tolist() == by_loop(r, mask_S, capacity, overflow, order)
    assert torch.bincount(served_SK.flatten(), minlength=experts + 1)[:experts].le(capacity).all()


def test_capacity_by_hand() -> None:
    assert expert_capacity(tokens=100, experts=8, top_k=2, factor=1.25) == 32
    assert expert_capacity(tokens=10, experts=1, top_k=1, factor=1.1) == 11
    assert expert_capacity(tokens=0, experts=8, top_k=2, factor=1.0) == 0


def wants_one(S: int) -> Routing:
    """Every token wants expert 0 most, then 1, 2, 3; token s is surer than token s + 1."""
    return routing(torch.tensor([4.0, 3.0, 2.0, 1.0]) * torch.linspace(2, 1, S).unsqueeze(1), top_k=1)


@pytest.mark.parametrize(
    ("overflow", "want"), [("drop", [2, 0, 0, 0, 6]), ("shared", [2, 0, 0, 0, 6]), ("next", [2, 2, 2, 2, 0])]
)
def test_a_skewed_batch(overflow: str, want: list[int]) -> None:
    served_SK = Capacity(1.0, overflow, "position").serve(
        wants_one(8), torch.ones(8, dtype=torch.bool), 1, training=True
    )
    assert torch.bincount(served_SK.flatten(), minlength=E + 1).tolist() == want
    assert served_SK[:2].flatten().tolist() == [0, 0]
    if overflow == "next":
        assert served_SK.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_who_is_served_first() -> None:
    r, everything = wants_one(8), torch.ones(8, dtype=torch.bool)
    backwards = Routing(*(x.flip(0) for x in r[:3]))
    for priority, want in (("position", [0, 1]), ("probability", [6, 7])):
        served_SK = Capacity(1.0, "drop", priority).serve(backwards, everything, 1, training=True)
        assert (served_SK[:, 0] == 0).nonzero().flatten().tolist() == want
    lot = Capacity(1.0, "drop", "random")
    drawn = {tuple(lot.serve(r, everything, 1, training=True).flatten().tolist()) for _ in range(40)}
    fixed = {tuple(lot.serve(r, everything, 1, training=False).flatten().tolist()) for _ in range(5)}
    assert len(drawn) > 5 and len(fixed) == 1


@pytest.mark.parametrize("overflow", overflow_names())
def test_padding_takes_no_capacity(overflow: str) -> None:
    r, limit = wants_one(8), Capacity(1.0, overflow, "position")
    mask_S = torch.tensor([False, False, True, True, True, True, False, False])
    inside = Routing(*(x[2:6] for x in r[:3]))
    want_SK = limit.serve(inside, torch.ones(4, dtype=torch.bool), 1, training=True)
    served_SK = limit.serve(r, mask_S, 1, training=True)
    assert torch.equal(served_SK[2:6], want_SK) and (served_SK[~mask_S] == E).all()


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.network = FeedForward(self.up, F.gelu, self.down)


def layer(**changes: object) -> MoELayer:
    made = MoELayer(layer_config(**{"expert_kind": "lora", **changes}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def one_by_one(module: MoELayer, x_SD: Tensor, r: Routing, dense: FeedForward | None, drops: bool) -> Tensor:
    """Each pair through its expert alone; what is lost answers as the dense network, or not at all."""
    experts = r.logits_SE.shape[1]
    served_SK = r.experts_SK if r.served_SK is None else r.served_SK
    rows = []
    for s in range(x_SD.shape[0]):
        pairs = [(int(e), r.weights_SK[s, k]) for k, e in enumerate(served_SK[s]) if e < experts]
        y_D = torch.zeros(D)
        for e, weight in pairs:
            y_D = y_D + weight * alone(module, x_SD[s : s + 1], e, dense)[0]
        if dense is not None:
            rest = 1 - (r.weights_SK[s].sum() if drops else sum(weight for _, weight in pairs))
            y_D = y_D + rest * dense(x_SD[s : s + 1])[0]
        rows.append(y_D)
    return torch.stack(rows) if rows else torch.zeros(0, D)


def alone(module: MoELayer, x_1D: Tensor, e: int, dense: FeedForward | None) -> Tensor:
    if dense is None:
        fused = module.experts.fused
        h_1H = F.gelu(F.linear(x_1D, fused.up_proj[e], fused.up_proj_bias[e]))
        return F.linear(h_1H, fused.down_proj[e], fused.down_proj_bias[e])
    lora = module.experts
    h_1H = F.gelu(dense.up(x_1D) + x_1D @ lora.up_a[e] @ lora.up_b[e])
    return dense.down(h_1H) + h_1H @ lora.down_a[e] @ lora.down_b[e]


CASES = [
    ("lora", {"capacity_factor": 0.5, "overflow": "drop"}),
    ("lora", {"capacity_factor": 0.5, "overflow": "shared"}),
    ("lora", {"capacity_factor": 0.75, "overflow": "next"}),
    ("lora", {"capacity_factor": 0.01, "overflow": "drop"}),
    ("lora", {"selection": "expert_choice"}),
    ("lora", {"selection": "expert_choice", "capacity_factor": 0.75, "overflow": "next"}),
    ("ffn", {"capacity_factor": 0.5, "overflow": "drop"}),
    ("ffn", {"capacity_factor": 0.75, "overflow": "next"}),
    ("ffn", {"capacity_factor": 0.5, "overflow": "drop", "_experts_implementation": "grouped_mm"}),
    ("ffn", {"capacity_factor": 0.5, "overflow": "drop", "_experts_implementation": "batched_mm"}),
    ("ffn", {"selection": "expert_choice", "_experts_implementation": "grouped_mm"}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_the_layer_against_one_pair_at_a_time(kind: str, changes: dict[str, object]) -> None:
    tokens = Tokens(torch.tensor([[True] * 6, [True] * 4 + [False] * 2]))
    real_S = tokens.mask_BT.reshape(-1)
    # Of random routings one that loses something, or nothing would be tested.
    while True:
        module, dense = layer(expert_kind=kind, **changes), Dense() if kind == "lora" else None
        network = dense.network if dense else None
        x_BTD = torch.randn(2, 6, D)
        one, two = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
        y_BTD, found = module(one, network, None, tokens)
        if ((found.experts_SK if found.served_SK is None else found.served_SK)[real_S] == E).any():
            break
    parameters = [*module.parameters(), *(dense.parameters() if dense else [])]

    def gradients(y_SD: Tensor, x: Tensor) -> list[Tensor]:
        value = (y_SD[real_S] * torch.linspace(-1, 1, 10 * D).view(10, D)).sum()
        found = torch.autograd.grad(value, [x, *parameters], allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, [x, *parameters], strict=True)]

    again = module.route(two, None, tokens)
    want_SD = one_by_one(module, two.view(12, D), again, network, module.experts.drops)
    assert torch.allclose(y_BTD.view(12, D)[real_S], want_SD[real_S], atol=1e-5)
    for got, want in zip(gradients(y_BTD.view(12, D), one), gradients(want_SD, two), strict=True):
        assert torch.allclose(got, want, atol=1e-4)


@given(
    st.integers(0, 9), st.integers(1, 6), st.integers(1, 6), st.sampled_from(["lora", "ffn"]),
    st.sampled_from(["eager", "grouped_mm", "batched_mm"]), st.sampled_from([None, 0.6]), st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_size_of_layer(
    S: int, experts: int, top_k: int, kind: str, kernel: str, factor: float | None, seed: int
) -> None:
    """No token, one token, experts without tokens, more choices than tokens."""
    torch.manual_seed(seed)
    changes = {"experts": experts, "top_k": min(top_k, experts), "expert_kind": kind, "capacity_factor": factor}
    module, dense = layer(**changes, _experts_implementation=kernel), Dense() if kind == "lora" else None
    network = dense.network if dense else None
    tokens = Tokens(torch.rand(1, S) < 0.8)
    real_S, x_1SD = tokens.mask_BT[0], torch.randn(1, S, D)
    y_1SD, found = module(x_1SD, network, None, tokens)
    assert y_1SD.shape == (1, S, D)
    want_SD = one_by_one(module, x_1SD[0], found, network, module.experts.drops)
    assert torch.allclose(y_1SD[0, real_S], want_SD[real_S], atol=1e-5)


@pytest.mark.parametrize("priority", priority_names())
@pytest.mark.parametrize("overflow", overflow_names())
def test_what_it_answers_does_not_depend_on_the_batch(overflow: str, priority: str) -> None:
    module = layer(capacity_factor=0.5, overflow=overflow, overflow_priority=priority).eval()
    x_BTD, dense, mask_BT = torch.randn(3, 8, D), Dense().network, torch.ones(3, 8, dtype=torch.bool)
    mask_BT[1, 5:] = False
    y_BTD, routing = module(x_BTD, dense, None, Tokens(mask_BT))
    for b in range(3):
        alone_1TD, found = module(x_BTD[b : b + 1], dense, None, Tokens(mask_BT[b : b + 1]))
        assert torch.equal(routing.served_SK.view(3, 8, K)[b], found.served_SK)
        assert torch.allclose(y_BTD[b], alone_1TD[0], atol=1e-6)
    # While training it is a share of the whole batch.
    limit = Capacity(0.5, overflow, "position")
    crowded = layer(capacity_factor=0.5, overflow=overflow).train()
    _, trained = crowded(x_BTD, dense, None, Tokens(mask_BT))
    assert torch.equal(trained.served_SK, limit.serve(trained, mask_BT.flatten(), K, training=True))


def test_a_token_that_loses_everything_keeps_its_residual_alone() -> None:
    module, dense = layer(capacity_factor=1e-6), Dense()
    y_BTD, routing = module(torch.randn(1, 6, D), dense.network)
    served = routing.served_SK < E
    assert int(served.sum()) <= E
    assert torch.allclose(y_BTD[0][~served.any(dim=1)], torch.zeros(()), atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_room_for_all_is_no_limit_at_all(kind: str) -> None:
    unlimited, dense = layer(expert_kind=kind), Dense().network if kind == "lora" else None
    limited = layer(expert_kind=kind, capacity_factor=float(E))
    limited.load_state_dict(unlimited.state_dict())
    x_BTD = torch.randn(2, 6, D)
    assert torch.allclose(limited(x_BTD, dense)[0], unlimited(x_BTD, dense)[0], atol=1e-6)


def test_overflow_and_unserved_tokens_are_counted() -> None:
    statistics = RoutingStatistics([1, 3], E)
    mask_S = torch.tensor([True] * 7 + [False])
    crowded = wants_one(8)
    served_SK = Capacity(1.0, "drop", "position").serve(crowded, mask_S, 1, training=True)
    free = routing(torch.randn(8, E), 1)
    held_back = free._replace(logits_SE=free.logits_SE.masked_fill(torch.arange(8).unsqueeze(1) < 2, -torch.inf))
    statistics.update([crowded._replace(served_SK=served_SK), held_back], mask_S, ["a", "b"])
    first, second = statistics.summary()["layers"]
    assert first["overflow"] == pytest.approx(5 / 7) and first["unserved"] == pytest.approx(5 / 7)
    assert second["overflow"] == 0 and second["unserved"] == pytest.approx(2 / 7)


@pytest.mark.parametrize("changes", [{"overflow": "dropp"}, {"overflow_priority": "size"}, {"capacity_factor": 0.0}])
def test_settings_that_do_not_exist(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"there is no overflow|expected a number above 0"):
        layer(**{"capacity_factor": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "bias", "want"),
    [
        ({}, [0.0, 0.0, 0.0, 0.0], [0, 0, 1, 1]),
        # Without the bias expert 1 is the next best; with it expert 3, which the choice was made by too.
        ({}, [9.0, 0.0, 0.0, 5.0], [0, 0, 3, 3]),
        ({"scores": "sigmoid"}, [9.0, 0.0, 0.0, 5.0], [0, 0, 3, 3]),
        # Of two groups of two the token's own has room for two, and the other is not asked.
        ({"gate": "hierarchical", "expert_groups": 2, "capacity_factor": 1.0}, [9.0, 0.0, 0.0, 0.0], [0, 1, E, E]),
    ],
)
def test_what_moves_on_goes_where_the_gate_would_choose_next(
    changes: dict[str, object], bias: list[float], want: list[int]
) -> None:
    module, dense = layer(**{"top_k": 1, "capacity_factor": 2.0, "overflow": "next", **changes}), Dense()
    with torch.no_grad():
        for parameter in module.gate.parameters():
            parameter.zero_()
    scores_E = torch.tensor([3.0, 2.0, 1.0, 0.0])
    module.gate.logits = lambda x_SD, neighbours: scores_E.expand(len(x_SD), E)
    module.gate.balance_bias.copy_(torch.tensor(bias))
    _, routing = module(torch.randn(1, 4, D), dense.network)
    assert routing.experts_SK.flatten().tolist() == [0] * 4
    assert routing.served_SK.flatten().tolist() == want
