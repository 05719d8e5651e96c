"""Answers are compared as people would, and shares come with the right intervals."""

import pytest

from foveate.evaluation.metrics import exact_match, normalize_answer, share_of, wilson_interval


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Red", "red"),
        ("  top   left\n", "top left"),
        ("Yes.", "yes"),
        ("yes .", "yes"),
        ("3.5", "3.5"),
        ("", ""),
        (".", ""),
    ],
)
def test_normalize_answer(answer, normal):
    assert normalize_answer(answer) == normal


def test_exact_match_forgives_writing_only():
    assert exact_match(" Top  left. ", "top left")
    assert not exact_match("top left corner", "top left")
    assert not exact_match("", "red")


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # scipy.stats.binomtest(…).proportion_ci(method="wilson")
        (5, 10, 0.236593, 0.763407),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (1140, 1200, 0.936169, 0.960959),
    ],
)
def test_wilson_interval(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=2e-6)


def test_wilson_interval_solves_its_equation():
    """Its bounds are the shares p from which the observed one is z standard errors away."""
    z, share, trials = 1.959964, 17 / 40, 40
    for bound in wilson_interval(17, trials):
        assert abs(share - bound) == pytest.approx(z * (bound * (1 - bound) / trials) ** 0.5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_there_is_no_share_of_nothing(successes, trials):
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(successes, trials)


def test_share_of_hits():
    assert share_of([True, False, True, True]) == {
        "value": 0.75,
        "interval": list(wilson_interval(3, 4)),
        "n": 4,
    }
