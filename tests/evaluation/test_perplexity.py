"""Perplexity: by hand, over chunks as over whole documents, and comparisons over the same documents."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from tiny_decoder import byte_tokenizer, tiny_llama

from ragmoe import DataError, Passage
from ragmoe.evaluation.metrics import citation_precision, citation_recall
from ragmoe.evaluation.perplexity import DocumentLoss, compare_perplexity, document_losses, perplexity
from ragmoe.training.config import LanguageConfig
from ragmoe.training.language import LanguageDataset

TWO = [
    DocumentLoss("a", "law", 20.0, 10),
    DocumentLoss("b", "law", 10.0, 30),
    DocumentLoss("c", "code", 4.0, 4),
    DocumentLoss("d", "code", 8.0, 4),
]


def shifted(losses: list[DocumentLoss], nats_per_token: float) -> list[DocumentLoss]:
    return [DocumentLoss(x.document, x.domain, x.nats + nats_per_token * x.tokens, x.tokens) for x in losses]


def test_by_hand() -> None:
    found = perplexity(TWO)
    # 30 nats over 40 tokens, and 12 over 8; each domain counts the same.
    assert found.per_domain["law"][0] == pytest.approx(math.exp(0.75))
    assert found.per_domain["code"][0] == pytest.approx(math.exp(1.5))
    assert found.mean == pytest.approx(math.exp((0.75 + 1.5) / 2))
    assert found.tokens == {"law": 40, "code": 8} and found.documents == {"law": 2, "code": 2}
    # Resamples of two documents are twice one, the other, or both.
    assert found.per_domain["law"][1:] == pytest.approx((math.exp(1 / 3), math.exp(2)))
    assert found.per_domain["code"][1:] == pytest.approx((math.exp(1), math.exp(2)))
    assert found.low == pytest.approx(math.exp((1 / 3 + 1) / 2)) and found.high == pytest.approx(math.exp(2))
    with pytest.raises(DataError, match="no document has a loss"):
        perplexity([])


def test_the_same_gain_everywhere_has_no_interval() -> None:
    found = compare_perplexity([shifted(TWO, math.log(0.96))], [TWO])
    assert (found.difference, found.low, found.high) == pytest.approx((-4.0, -4.0, -4.0))
    assert found.per_domain["code"] == pytest.approx((-4.0, -4.0, -4.0))
    assert found.n == 48 and found.documents == 4 and found.seed_spread == {"a": None, "b": None}


def test_the_difference_in_points_by_hand() -> None:
    a = [shifted(TWO, -0.5), shifted(TWO, 0.1)]
    found = compare_perplexity(a, [TWO], setting="old", relative=False)
    # The mean over seeds is 0.2 nats less, with 0.75 and 1.5 nats a token before.
    by_domain = {"law": (0.75, 1 / 3, 2.0), "code": (1.5, 1.0, 2.0)}
    assert (found.metric, found.setting) == ("perplexity", "old")
    assert found.difference == pytest.approx(math.exp(1.125 - 0.2) - math.exp(1.125))
    for domain, (mean, low, high) in by_domain.items():
        # The largest gain is where the perplexity is highest.
        steps = [math.exp(nats - 0.2) - math.exp(nats) for nats in (mean, high, low)]
        assert found.per_domain[domain] == pytest.approx(steps)


def test_seeds_are_averaged_and_pairs_are_kept() -> None:
    draw = random.Random(0)
    b = [DocumentLoss(f"d{i}", "law", draw.uniform(50, 400), 100) for i in range(40)]
    a = [shifted(b, -0.05), shifted(b, -0.15)]
    found = compare_perplexity(a, [b])
    # Documents differ by nats a token, and the pairs do not.
    assert found.difference == pytest.approx(100 * math.expm1(-0.1))
    assert found.high - found.low < 1e-6
    assert found.seeds == (2, 1) and found.seed_spread["a"] > 0 and found.seed_spread["b"] is None
    better = compare_perplexity([b], a)
    assert better.difference == pytest.approx(100 * math.expm1(0.1))


def test_other_documents_are_not_compared() -> None:
    with pytest.raises(DataError, match="1 of 4 documents are not in both"):
        compare_perplexity([TWO], [TWO[:3]])
    other = [*TWO[:3], DocumentLoss("d", "code", 8.0, 5)]
    with pytest.raises(DataError, match="48 and 49 tokens"):
        compare_perplexity([TWO], [other])


def test_losses_of_documents_equal_those_of_their_tokens(tmp_path: Path) -> None:
    documents = [Passage(f"d{i}", "some words of a text " * (i + 1), domain="x") for i in range(3)]
    model, tokenizer = tiny_llama(), byte_tokenizer()
    # With all that precedes as context a chunk is predicted as the whole text is.
    config = LanguageConfig(chunk_tokens=17, context_tokens=500)
    data = LanguageDataset([*documents, Passage("none", "")], None, tokenizer, config, cache=tmp_path)
    shown: list[int] = []
    found = document_losses(model, data, batch_chunks=4, progress=lambda done, total: shown.append(done))
    assert [loss.document for loss in found] == ["d0", "d1", "d2"] and shown[-1] == len(data.chunks)
    for document, loss in zip(documents, found, strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(document.text)["input_ids"]]])
        with torch.no_grad():
            mean = model(ids, labels=ids).loss.item()
        assert loss.tokens == ids.shape[1] - 1 and loss.nats == pytest.approx(mean * loss.tokens, rel=1e-5)


def test_citations_by_hand() -> None:
    assert citation_precision(["a", "b"], ["b", "c"]) == 0.5
    assert citation_precision([], ["b"]) is None and citation_precision(["a"], []) == 0.0
    # A number that no passage has is a citation too, and a wrong one.
    assert citation_precision(["b"], ["b"], invented=1) == 0.5 and citation_precision([], ["b"], invented=2) == 0.0
    assert citation_recall(["b"], ["b", "c"], ["a", "b", "c"]) == 0.5
    # What was not read cannot be cited.
    assert citation_recall(["b"], ["b", "c"], ["a", "b"]) == 1.0
    assert citation_recall(["a"], ["b"], ["a"]) is None and citation_recall([], ["b"], ["b"]) == 0.0
