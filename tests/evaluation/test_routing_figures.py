from __future__ import annotations

from collections.abc import Callable

import pytest

from ragmoe.evaluation.routing import routing_shift, summarise_routing
from ragmoe.evaluation.samples import Sample

Make = Callable[..., Sample]


def test_load_entropy_and_information_by_hand(sample: Make) -> None:
    rows = [
        sample("1", 1.0, routing=((3, 1), (2, 2)), gate_entropy=(0.2, 0.6)),
        sample("2", 1.0, routing=((3, 9), (12, 0)), gate_entropy=(0.6, 0.2)),
    ]
    found = summarise_routing(rows, [1, 3], ["x", "y"])
    assert found is not None
    assert found["layers"][0]["load"] == pytest.approx([6 / 16, 10 / 16])
    # Weighed by tokens: 4 of the first, 12 of the second.
    assert [row["entropy"] for row in found["layers"]] == pytest.approx([0.5, 0.3])
    assert found["gate_entropy"] == pytest.approx(0.4)
    assert found["max_load"] == pytest.approx((10 / 16 + 14 / 16) / 2)
    assert found["normalised_mi"] == 0.0
    assert found["load_per_domain"]["a"][1] == pytest.approx([14 / 16, 2 / 16])


def test_what_was_lost_is_a_share_of_all_questions(sample: Make) -> None:
    rows = [
        sample("1", 1.0, routing=((4, 4), (6, 2)), gate_entropy=(0.1, 0.1), tokens=4, lost=((2, 1), (0, 0))),
        sample("2", 1.0, routing=((2, 0), (1, 1)), gate_entropy=(0.1, 0.1), tokens=1),
    ]
    found = summarise_routing(rows, [1, 3], ["x", "y"])
    assert found is not None
    assert [row["overflow"] for row in found["layers"]] == pytest.approx([2 / 10, 0])
    assert [row["unserved"] for row in found["layers"]] == pytest.approx([1 / 5, 0])
    without = summarise_routing(rows[1:], [1, 3], ["x", "y"])
    assert without is not None and "overflow" not in without["layers"][0]


def test_an_expert_for_each_domain_is_full_information(sample: Make) -> None:
    rows = [
        sample("1", 1.0, domain="a", routing=((4, 0),), gate_entropy=(0.1,)),
        sample("2", 1.0, domain="b", routing=((0, 400),), gate_entropy=(0.1,)),
    ]
    found = summarise_routing(rows, [0], ["x", "y"])
    assert found is not None
    assert found["normalised_mi"] == pytest.approx(1.0)


def test_shift_is_the_share_of_the_load_that_moves(sample: Make) -> None:
    real = [sample("1", 1.0, routing=((4, 0), (2, 2))), sample("2", 1.0, routing=((4, 0), (0, 4)))]
    other = [sample("1", 1.0, routing=((0, 4), (1, 3))), sample("2", 1.0, routing=((4, 0), (0, 4)))]
    # Question 1: 1 and 1/4 over two layers; question 2: nothing.
    assert routing_shift(real, other) == pytest.approx((1 + 0.25) / 2 / 2)
    assert routing_shift(real, real) == 0.0


def test_a_single_expert_is_a_dense_model(sample: Make) -> None:
    rows = [sample("1", 1.0, routing=((4,), (4,)), gate_entropy=(0.0, 0.0))]
    assert summarise_routing(rows, [1, 3], ["expert 0"]) is None
    assert routing_shift(rows, rows) is None


def test_a_dense_model_has_none(sample: Make) -> None:
    assert summarise_routing([sample("1", 1.0)], [], []) is None
    assert routing_shift([sample("1", 1.0)], [sample("1", 1.0)]) is None
