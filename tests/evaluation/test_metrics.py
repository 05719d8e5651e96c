"""Answers are compared as people would, and shares come with the right intervals."""

import pytest

from foveate.evaluation.metrics import (
    METRICS,
    exact_match,
    mean_of,
    normalize_answer,
    normalize_vqa_answer,
    share_of,
    vqa_accuracy,
    wilson_interval,
)


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


def test_exact_match_of_a_task_takes_any_right_answer():
    score = METRICS["exact_match"].score
    assert score("Sofa.", ("couch", "sofa")) == 1 and score("chair", ("couch", "sofa")) == 0


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The red  bus.", "red bus"),
        ("a an the", ""),
        ("Two", "2"),
        ("none", "0"),
        ("3.5 km.", "3.5 km"),
        ("100,978", "100978"),
        ("red, white/blue", "red white blue"),
        ("t-shirt", "t shirt"),
        ("Dont know", "don't know"),
        ("girl's", "girl's"),
        ("2:50 p.m.", "2:50 pm"),
        ("yes\n", "yes"),
    ],
)
def test_normalize_vqa_answer(answer, normal):
    assert normalize_vqa_answer(answer) == normal


@pytest.mark.parametrize(("people", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_the_mean_over_the_groups_of_nine(people, accuracy):
    """By hand: of three people who agree with the answer, three groups lack one (2/3), seven have all (1): 0.9."""
    expected = ("The Dog.",) * people + ("cat",) * (10 - people)
    assert vqa_accuracy("dog", expected) == pytest.approx(accuracy)


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


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_interval_is_scipys_for_all_whole_counts(level):
    stats = pytest.importorskip("scipy.stats")
    for trials in (1, 2, 3, 17, 200):
        for successes in range(trials + 1):
            low, high = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
            assert wilson_interval(successes, trials, level) == pytest.approx((low, high), abs=1e-12)


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


class TestTheMeanOfClusters:
    def test_is_a_share_where_right_or_wrong_is_scored_once_a_cluster(self):
        assert mean_of([1, 0, 1, 1], [0, 1, 2, 3]) == share_of([True, False, True, True])

    def test_has_the_variance_that_there_is_between_clusters(self):
        """Turns that agree are worth one; by hand: means 1, 1, 0, 1 of three turns each."""
        found = mean_of([1.0] * 6 + [0.0] * 3 + [1.0] * 3, [row // 3 for row in range(12)])
        variance = (3 * 0.25**2 + 0.75**2) / 3 / 4
        trials = 0.75 * 0.25 / variance
        assert (found["value"], found["n"]) == (0.75, 12)
        assert found["interval"] == pytest.approx(wilson_interval(0.75 * trials, trials))

    def test_never_counts_more_trials_than_scores(self):
        """Clusters that each have two of four right say the mean for sure, if one believes them."""
        found = mean_of([1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 1], [0] * 4 + [1] * 4 + [2] * 4)
        assert found["interval"] == pytest.approx(wilson_interval(7, 12))

    @pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
    def test_counts_clusters_where_all_are_alike(self, score):
        found = mean_of([score] * 6, [0, 0, 0, 1, 1, 1])
        assert found["interval"] == pytest.approx(wilson_interval(2 * score, 2))

    def test_takes_fractions(self):
        found = mean_of([0.3, 0.6, 1.0], [0, 1, 2])
        assert found["value"] == pytest.approx(1.9 / 3)
        assert 0 <= found["interval"][0] < found["value"] < found["interval"][1] <= 1
