"""Neighbours: what a query returned, and how it is cut and joined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ragmoe import Neighbours


def found() -> Neighbours:
    """Two questions; the second has but one neighbour."""
    mask_BN = torch.tensor([[True, True, True], [True, False, False]])
    embeddings_BNR = torch.nn.functional.normalize(torch.rand(2, 3, 4) + 0.1, dim=-1) * mask_BN.unsqueeze(-1)
    scores_BN = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.0, 0.0]])
    return Neighbours(embeddings_BNR, scores_BN, mask_BN, [["a", "b", "c"], ["d"]])


def test_shapes_must_agree() -> None:
    with pytest.raises(
        ValueError, match=r"embeddings \(2, 3, 4\), scores \(2, 2\), mask \(2, 3\); expected \(B, N, R\)"
    ):
        Neighbours(torch.zeros(2, 3, 4), torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.bool))


def test_keys_and_values_come_together_and_go_with_their_neighbours() -> None:
    keys_BNLA, values_BNLA = torch.randn(2, 3, 2, 5), torch.randn(2, 3, 2, 5)
    with pytest.raises(ValueError, match="neighbour_keys and neighbour_values come together"):
        replace(found(), keys_BNLA=keys_BNLA)
    whole = replace(found(), keys_BNLA=keys_BNLA, values_BNLA=values_BNLA)
    assert found().prepared(0) is None
    for part, keys, values in (
        (whole, keys_BNLA, values_BNLA),
        (whole.first(2), keys_BNLA[:, :2], values_BNLA[:, :2]),
        (whole.rows([1, 1]), keys_BNLA[[1, 1]], values_BNLA[[1, 1]]),
    ):
        again = Neighbours.from_tensors(part.tensors())
        assert again is not None
        got = again.prepared(1)
        assert got is not None and torch.equal(got[0], keys[:, :, 1]) and torch.equal(got[1], values[:, :, 1])


def test_empty() -> None:
    none = Neighbours.empty(3, width=5, neighbours=2)
    assert len(none) == 3 and none.embeddings_BNR.shape == (3, 2, 5)
    assert not none.mask_BN.any() and none.passage_ids == [[], [], []]


def test_rows_in_any_order_and_again() -> None:
    rows = found().rows([1, 0, 1])
    assert rows.passage_ids == [["d"], ["a", "b", "c"], ["d"]]
    assert rows.mask_BN.tolist() == [[True, False, False], [True, True, True], [True, False, False]]
    assert rows.scores_BN[:, 0].tolist() == pytest.approx([0.6, 0.9, 0.6])


def test_stack_pads_to_the_widest() -> None:
    one, two = found(), Neighbours(torch.ones(1, 1, 4), torch.ones(1, 1), torch.ones(1, 1).bool(), [["e"]])
    both = Neighbours.stack([two, one])
    assert both.mask_BN.tolist() == [[True, False, False], [True, True, True], [True, False, False]]
    assert both.passage_ids == [["e"], ["a", "b", "c"], ["d"]]
    assert torch.equal(both.embeddings_BNR[1:], one.embeddings_BNR) and not both.embeddings_BNR[0, 1:].any()
    assert torch.equal(both.scores_BN[1:], one.scores_BN)


def test_rows_without_ids_beside_rows_that_have_some_leave_none() -> None:
    nameless = Neighbours(torch.ones(1, 1, 4), torch.ones(1, 1), torch.ones(1, 1).bool())
    both = Neighbours.stack([nameless, found()])
    assert both.passage_ids == [] and both.rows([2, 0]).mask_BN.tolist() == [[True, False, False]] * 2


def test_masked_ones_vanish_entirely() -> None:
    whole = found()
    some = whole.masked(torch.tensor([[True, False, True], [False, True, True]]))
    assert some.mask_BN.tolist() == [[True, False, True], [False, False, False]]
    assert some.passage_ids == [["a", "c"], []]
    assert torch.equal(some.scores_BN, torch.tensor([[0.9, 0.0, 0.7], [0.0, 0.0, 0.0]]))
    assert not some.embeddings_BNR[~some.mask_BN].any()
    assert torch.equal(some.embeddings_BNR[0, 2], whole.embeddings_BNR[0, 2])


def test_without_named_passages() -> None:
    some = found().without([["b", "x"], ["a"]])
    assert some.passage_ids == [["a", "c"], ["d"]]
    assert some.mask_BN.tolist() == [[True, False, True], [True, False, False]]


def test_ids_stay_with_their_columns_when_cut_again() -> None:
    """After one cut there are gaps between the columns but none between the ids."""
    whole = found()
    some = whole.masked(torch.tensor([[False, True, True], [True, True, True]])).without([["b"], []])
    assert some.passage_ids == [["c"], ["d"]]
    assert some.mask_BN.tolist() == [[False, False, True], [True, False, False]]
    assert torch.equal(some.embeddings_BNR[0, 2], whole.embeddings_BNR[0, 2])
    last = whole.without([["a"], []]).masked(torch.tensor([[True, False, True], [True, True, True]]))
    assert last.passage_ids == [["c"], ["d"]]


def test_ids_that_do_not_fit_the_mask_are_no_guesswork() -> None:
    whole = found()
    wrong = Neighbours(whole.embeddings_BNR, whole.scores_BN, whole.mask_BN, [["a", "b"], ["d"]])
    with pytest.raises(ValueError, match="zip"):
        wrong.without([["b"], []])


def test_named_tensors() -> None:
    tensors = found().tensors()
    assert list(tensors) == ["neighbour_embeddings", "neighbour_scores", "neighbour_mask"]
    assert tensors["neighbour_mask"].dtype == torch.bool


def test_moving_keeps_the_mask_boolean() -> None:
    moved = Neighbours.empty(2, 4).to(torch.bfloat16)
    assert moved.embeddings_BNR.dtype == moved.scores_BN.dtype == torch.bfloat16
    assert moved.mask_BN.dtype == torch.bool


def full() -> Neighbours:
    """With votes for three experts in two layers, and domains."""
    votes_BNLE = torch.rand(2, 3, 2, 3) * found().mask_BN[..., None, None]
    return replace(found(), votes_BNLE=votes_BNLE, domain_B=torch.tensor([4, -1]))


def test_votes_and_domains_travel_along() -> None:
    whole = full()
    rows = whole.rows([1, 0])
    assert torch.equal(rows.votes_BNLE, whole.votes_BNLE[[1, 0]]) and rows.domain_B.tolist() == [-1, 4]
    some = whole.without([["b"], []])
    assert not some.votes_BNLE[0, 1].any() and torch.equal(some.votes_BNLE[0, 2], whole.votes_BNLE[0, 2])
    assert some.domain_B.tolist() == [4, -1]
    moved = whole.to(torch.bfloat16)
    assert moved.votes_BNLE.dtype == torch.bfloat16 and moved.domain_B.dtype == torch.int64
    both = Neighbours.stack([whole.first(1), whole])
    assert both.votes_BNLE.shape == (4, 3, 2, 3) and both.domain_B.tolist() == [4, -1, 4, -1]
    assert torch.equal(both.votes_BNLE[2:], whole.votes_BNLE) and not both.votes_BNLE[:2, 1:].any()
    # Where one of them has none, none is what they have together.
    assert Neighbours.stack([whole, found()]).votes_BNLE is None


def test_the_first_of_each() -> None:
    one = full().first(1)
    assert one.passage_ids == [["a"], ["d"]] and one.mask_BN.shape == (2, 1)
    assert one.votes_BNLE.shape == (2, 1, 2, 3) and one.domain_B.tolist() == [4, -1]


def test_from_the_named_tensors_and_back() -> None:
    whole = full()
    back = Neighbours.from_tensors(whole.tensors())
    for field in ("embeddings_BNR", "scores_BN", "mask_BN", "votes_BNLE", "domain_B"):
        assert getattr(back, field) is getattr(whole, field)
    assert Neighbours.from_tensors({}) is None
    # A mask of numbers, as attention masks are.
    numbers = Neighbours.from_tensors({**whole.tensors(), "neighbour_mask": whole.mask_BN.long()})
    assert numbers is not None and torch.equal(numbers.mask_BN, whole.mask_BN)
    with pytest.raises(ValueError, match="without neighbour_scores or neighbour_mask"):
        Neighbours.from_tensors({"neighbour_embeddings": whole.embeddings_BNR})


def test_sequences_are_of_as_many_questions_or_of_each_as_many() -> None:
    two = full()
    for sequences in (2, 4):
        two.require_sequences(sequences)
    for sequences in (1, 3):
        with pytest.raises(ValueError, match=f"{sequences} sequences came with the neighbours of 2 questions"):
            two.require_sequences(sequences)


def test_shapes_of_votes_and_domains_must_agree() -> None:
    with pytest.raises(ValueError, match=r"votes have the shape \(2, 2, 2, 3\); expected \(2, 3, L, E\)"):
        replace(found(), votes_BNLE=torch.zeros(2, 2, 2, 3))
    with pytest.raises(ValueError, match=r"domains have the shape \(3,\); expected \(2,\)"):
        replace(found(), domain_B=torch.zeros(3, dtype=torch.long))


def test_the_first_of_what_others_were_taken_from() -> None:
    """Columns have gaps then, and ids do not."""
    two = found().without([["a"], []]).first(2)
    assert two.mask_BN.tolist() == [[False, True], [True, False]]
    assert two.passage_ids == [["b"], ["d"]]
    assert two.without([["b"], []]).passage_ids == [[], ["d"]]
