"""Routing statistics: load, entropy and mutual information by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from ragmoe import RoutingStatistics
from ragmoe.gates import Routing
from ragmoe.moe.statistics import normalised_mutual_information


def routing(choices: list[list[int]], logits_SE: Tensor) -> Routing:
    experts_SK = torch.tensor(choices)
    return Routing(torch.ones(experts_SK.shape), experts_SK, logits_SE)


def by_hand() -> RoutingStatistics:
    """Two sequences of three tokens; the last token of the second is padding and chooses expert 2."""
    statistics = RoutingStatistics(layers=[1, 3], experts=3)
    even = torch.zeros(6, 3)
    sharp = torch.zeros(6, 3)
    sharp[:, 0] = 100.0
    first = routing([[0], [0], [1], [1], [1], [2]], even)
    second = routing([[0]] * 5 + [[2]], sharp)
    statistics.update([first, second], torch.tensor([True] * 5 + [False]), ["law", "bank"])
    return statistics


def test_by_hand() -> None:
    statistics = by_hand()
    assert statistics.domains == ["law", "bank"]
    assert statistics.counts_DLE.tolist() == [[[2, 1, 0], [3, 0, 0]], [[0, 2, 0], [2, 0, 0]]]
    assert np.allclose(statistics.load_LE, [[0.4, 0.6, 0], [1, 0, 0]])
    assert np.allclose(statistics.load_DLE[0], [[2 / 3, 1 / 3, 0], [1, 0, 0]])
    summary = statistics.summary()
    one, two = summary["layers"]
    assert (one["layer"], two["layer"]) == (1, 3)
    assert one["load"] == pytest.approx([0.4, 0.6, 0.0])
    assert one["entropy"] == pytest.approx(math.log(3)) and two["entropy"] == pytest.approx(0.0, abs=1e-6)
    assert (one["max_load"], two["max_load"]) == (pytest.approx(0.6), 1.0)
    # Law is two thirds expert 0, bank is all expert 1; domains weigh the same: joint (1/3, 1/6), (0, 1/2).
    domain, expert = math.log(2), -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    joint = -(math.log(1 / 3) / 3 + math.log(1 / 6) / 6 + math.log(1 / 2) / 2)
    assert one["normalised_mi"] == pytest.approx((domain + expert - joint) / ((domain + expert) / 2))
    assert two["normalised_mi"] == 0.0
    assert summary["gate_entropy"] == pytest.approx(math.log(3) / 2)
    assert summary["max_load"] == pytest.approx(0.8)
    assert summary["normalised_mi"] == pytest.approx(one["normalised_mi"] / 2)


def test_mutual_information_against_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        D, E = int(rng.integers(1, 5)), int(rng.integers(1, 6))
        # The same number of choices in each domain, since domains weigh the same.
        counts_DE = rng.multinomial(60, rng.dirichlet(np.ones(E)), size=D)
        pairs = [(d, e) for d in range(D) for e in range(E) for _ in range(counts_DE[d, e])]
        domains, experts = zip(*pairs, strict=True)
        single = D == 1 or len(set(experts)) == 1
        want = 0.0 if single else normalized_mutual_info_score(domains, experts)
        assert normalised_mutual_information(counts_DE.astype(float)) == pytest.approx(want, abs=1e-9)


def test_mutual_information_weighs_domains_alike_and_ignores_empty_ones() -> None:
    counts_DE = np.array([[30.0, 10.0], [5.0, 15.0]])
    want = normalised_mutual_information(counts_DE)
    assert normalised_mutual_information(counts_DE * [[7], [1]]) == pytest.approx(want)
    assert normalised_mutual_information(np.vstack([counts_DE, [0, 0]])) == pytest.approx(want)
    assert normalised_mutual_information(np.array([[5.0, 0.0], [0.0, 9.0]])) == pytest.approx(1.0)


def test_many_batches_equal_one() -> None:
    S, E = 12, 4
    logits_SE = torch.randn(S, E)
    experts_SK = logits_SE.topk(2).indices
    mask_S = torch.rand(S) > 0.3
    whole, parts = RoutingStatistics([0], E), RoutingStatistics([0], E)
    whole.update([Routing(logits_SE, experts_SK, logits_SE)], mask_S, ["a", "b", "a"])
    for at, domain in enumerate("aba"):
        s = slice(at * 4, at * 4 + 4)
        parts.update([Routing(logits_SE[s], experts_SK[s], logits_SE[s])], mask_S[s], [domain])
    assert np.allclose(whole.counts_DLE, parts.counts_DLE)
    assert whole.summary()["gate_entropy"] == pytest.approx(parts.summary()["gate_entropy"])


def test_padding_is_never_counted() -> None:
    want, got = by_hand(), by_hand()
    padding = routing([[2]] * 4, torch.randn(4, 3) * 9)
    got.update([padding, padding], torch.zeros(4, dtype=torch.bool), ["law", "bank"])
    assert got.summary() == want.summary()
    assert np.array_equal(got.load_DLE, want.load_DLE)


def test_experts_held_back_leave_the_entropy_finite() -> None:
    statistics = RoutingStatistics([0], 3)
    logits_SE = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf] * 3])
    statistics.update([routing([[0], [0]], logits_SE)], torch.ones(2, dtype=torch.bool), ["a"])
    assert statistics.summary()["gate_entropy"] == pytest.approx(math.log(2) / 2)


def test_nothing_counted_yet_and_no_sparse_layer() -> None:
    summary = RoutingStatistics([1], 3).summary()
    nothing = dict.fromkeys(("entropy", "normalised_mi", "max_load", "overflow", "unserved"), 0.0)
    assert summary["layers"] == [{"layer": 1, "load": [0, 0, 0], **nothing}]
    assert RoutingStatistics([], 3).summary() == {
        "layers": [],
        "gate_entropy": None,
        "normalised_mi": None,
        "max_load": None,
    }


def test_routings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="1 routings for 2 sparse layers"):
        RoutingStatistics([1, 3], 3).update([routing([[0]], torch.zeros(1, 3))], torch.ones(1).bool(), ["a"])
