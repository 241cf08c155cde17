from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ragmoe import DataError
from ragmoe.evaluation import statistics
from ragmoe.evaluation.samples import Sample
from ragmoe.evaluation.statistics import compare, interval, lost_domains, macro, seed_spread

Make = Callable[..., Sample]


def test_difference_is_of_macro_means_and_seeds_are_averaged_first(sample: Make) -> None:
    a0 = [sample("1", 1.0), sample("2", 0.0), sample("3", 1.0, domain="b")]
    a1 = [sample("1", 0.0), sample("2", 0.0), sample("3", 0.5, domain="b")]
    b = [sample("1", 0.0), sample("2", 0.0), sample("3", 0.25, domain="b")]
    found = compare([a0, a1], [b], setting="gold")
    # Domain a: (0.5 + 0) / 2 - 0 = 25 points; domain b: 0.75 - 0.25 = 50 points.
    assert found.difference == pytest.approx(37.5)
    assert found.per_domain["a"][0] == pytest.approx(25.0)
    assert found.seeds == (2, 1)
    # Macros of the two seeds of a: 75 and 25.
    assert found.seed_spread["a"] == pytest.approx(np.std([75.0, 25.0], ddof=1))
    assert found.seed_spread["b"] is None


def test_seeds_are_averaged_before_documents_are_drawn(sample: Make) -> None:
    """Three seeds give the interval of one run with the mean scores, not a narrower one of thrice the questions."""
    rng = np.random.default_rng(5)
    ids, scores = [f"{d}{i}" for d in "ab" for i in range(20)], rng.random((2, 3, 40))
    arms = [
        [[sample(i, float(x), domain=i[0]) for i, x in zip(ids, seed, strict=True)] for seed in seeds]
        for seeds in scores
    ]
    means = [
        [[sample(i, float(x), domain=i[0]) for i, x in zip(ids, seeds.mean(axis=0), strict=True)]] for seeds in scores
    ]
    found, alone = compare(*arms), compare(*means)
    assert (found.difference, found.low, found.high) == pytest.approx((alone.difference, alone.low, alone.high))
    assert (found.seeds, found.n, alone.seeds, alone.n) == ((3, 3), 40, (1, 1), 40)
    for name, seeds in zip("ab", scores, strict=True):
        macros = [100 * np.mean([seed[:20].mean(), seed[20:].mean()]) for seed in seeds]
        assert found.seed_spread[name] == pytest.approx(np.std(macros, ddof=1))


def test_one_document_a_domain_leaves_nothing_to_resample(sample: Make) -> None:
    rows = [sample(str(i), float(i % 2), doc="only") for i in range(10)]
    found = interval([rows])
    assert found is not None
    assert (found.mean, found.low, found.high, found.documents) == (50.0, 50.0, 50.0, 1)


def test_the_interval_of_two_documents_by_hand(sample: Make) -> None:
    # Two documents of one question each, scores 0 and 1: a resample is 0, 50, 50 or 100, each with a quarter.
    found = interval([[sample("1", 0.0), sample("2", 1.0)]])
    assert found is not None
    assert (found.low, found.mean, found.high) == (0.0, 50.0, 100.0)
    assert found.stderr == pytest.approx(np.sqrt((50**2 + 0 + 0 + 50**2) / 4), rel=0.03)


def test_a_document_is_drawn_whole(sample: Make) -> None:
    # Nine questions of one document, right; one of another, wrong. By question the interval would be far narrower.
    rows = [sample(str(i), 1.0, doc="big") for i in range(9)] + [sample("9", 0.0, doc="small")]
    found = interval([rows])
    assert found is not None
    assert (found.low, found.mean, found.high) == (0.0, 90.0, 100.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(sample: Make) -> None:
    rng = np.random.default_rng(3)
    hits, trials = 0, 200
    for _ in range(trials):
        documents = rng.normal(0.5, 0.1, size=40)
        rows = [
            sample(f"{d}-{i}", float(m + rng.normal(0, 0.05)), doc=str(d))
            for d, m in enumerate(documents)
            for i in (0, 1)
        ]
        found = interval([rows], resamples=2000)
        assert found is not None
        hits += found.low <= 50.0 <= found.high
    assert 0.89 <= hits / trials <= 0.99


def test_documents_are_counted_by_domain(sample: Make) -> None:
    rows = [sample(str(i), 1.0, doc=f"doc-{i % 3}") for i in range(9)] + [sample("9", 0.0, domain="b")]
    found, compared = interval([rows]), compare([rows], [rows])
    assert found is not None
    assert found.per_domain_documents == compared.per_domain_documents == {"a": 3, "b": 1}
    assert found.documents == 4


def test_pairing_makes_it_narrow(sample: Make) -> None:
    scores = [i / 20 for i in range(20)]
    a = [sample(str(i), score) for i, score in enumerate(scores)]
    b = [sample(str(i), max(0.0, score - 0.05)) for i, score in enumerate(scores)]
    paired, alone = compare([a], [b]), interval([a])
    assert alone is not None
    assert paired.high - paired.low < (alone.high - alone.low) / 5


def test_it_is_the_same_each_time(sample: Make) -> None:
    rows = [sample(str(i), i / 10) for i in range(10)]
    assert interval([rows]) == interval([rows])
    assert interval([rows]) != interval([rows], seed=1)


def test_other_questions_are_refused_and_counted(sample: Make) -> None:
    a = [sample("1", 1.0), sample("2", 1.0), sample("3", 1.0)]
    b = [sample("1", 1.0), sample("3", 1.0, example="asked otherwise"), sample("4", 1.0)]
    with pytest.raises(
        DataError, match="3 questions differ: 1 only in the first, 1 only in the second, 1 with other words"
    ):
        compare([a], [b])


def test_what_one_run_could_not_read_is_left_out_of_both(sample: Make) -> None:
    a = [sample("1", 1.0), sample("2", 1.0)]
    b = [sample("1", 0.0), sample("2", None, answers=("x",), status="error")]
    found = compare([a], [b])
    assert (found.difference, found.n, found.left_out) == (100.0, 1, 1)
    with pytest.raises(DataError, match="nothing to compare"):
        compare([a[1:]], [b[1:]])


def test_without_a_whole_domain_there_is_no_mean_over_domains(sample: Make) -> None:
    """Of the others alone it would be another figure, and may be of another sign."""
    a = [sample("1", 1.0), sample("2", 0.0, domain="b")]
    b = [sample("1", 0.5), sample("2", 1.0, domain="b")]
    failed = [a[0], sample("2", None, domain="b", status="error")]
    assert compare([a], [b]).difference == pytest.approx(-25.0)
    with pytest.raises(DataError, match="of b no question has a f1 in every run"):
        compare([failed], [b])
    assert lost_domains([a, failed]) == ["b"] and not lost_domains([a, b])
    assert interval([a, failed]) is None and interval([a]) is not None
    # A domain that nothing answers counts in no mean but past the threshold.
    unanswerable = sample("3", None, domain="c", answers=(), f1_thresholded=1.0)
    assert compare([[*a, unanswerable]], [[*b, unanswerable]]).difference == pytest.approx(-25.0)
    assert not lost_domains([[*a, unanswerable]], "f1_thresholded")


def test_macro_and_spread_over_seeds(sample: Make) -> None:
    run = [sample("1", 1.0), sample("2", None), sample("3", 0.0, domain="b")]
    assert macro(run) == 50.0
    assert macro([sample("2", None)]) is None
    assert seed_spread([run]) is None
    assert interval([[sample("2", None)]]) is None


def test_many_documents_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, sizes = np.arange(50.0), np.ones(50)
    whole = statistics.resample(sums, sizes, 300, np.random.default_rng(0))
    monkeypatch.setattr(statistics, "_NUMBERS", 50 * 7)
    blocks = statistics.resample(sums, sizes, 300, np.random.default_rng(0))
    assert whole.shape == (300,)
    assert np.array_equal(whole, blocks)
