"""The no-answer threshold."""

from __future__ import annotations

import numpy as np

from ragmoe.training.calibration import best_threshold


def test_the_threshold_separates_what_can_be_separated() -> None:
    present, gains = np.array([-3.0, -2.0, -1.0]), np.array([1.0, 0.5, 1.0])
    absent = np.array([1.0, 2.0])
    assert -1.0 < best_threshold(present, gains, absent, 0.5) < 1.0


def test_a_worthless_answer_is_not_worth_a_wrong_one() -> None:
    # Answering at -1 earns 0.1 of three questions; withholding from there on gains one absent case of two.
    present, gains = np.array([-3.0, -2.0, -1.0]), np.array([1.0, 1.0, 0.1])
    assert -2.0 < best_threshold(present, gains, np.array([-1.5, 2.0]), 0.5) < -1.5


def test_only_one_kind() -> None:
    assert best_threshold(np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.zeros(0), 0.2) > 2.0
    assert best_threshold(np.zeros(0), np.zeros(0), np.array([1.0, 2.0]), 0.2) < 1.0
    assert best_threshold(np.array([np.inf]), np.array([0.0]), np.zeros(0), 0.2) == 0.0


def test_the_expected_share_decides_between_the_two() -> None:
    # One overlapping case on each side: answered where few questions lack an answer, withheld where many do.
    present, gains, absent = np.array([-2.0, 1.0]), np.array([1.0, 1.0]), np.array([0.0, 2.0])
    assert 1.0 < best_threshold(present, gains, absent, 0.2) < 2.0
    assert -2.0 < best_threshold(present, gains, absent, 0.8) < 0.0
