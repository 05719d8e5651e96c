"""How an answer is compared with the right one, and how sure a share of right answers is."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.hub_cards.evaluation_files import METRIC_TITLES


def normalize_answer(answer: str) -> str:
    """Lower case, single spaces, no period at the end."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same after [`normalize_answer`]."""
    return normalize_answer(answer) == normalize_answer(expected)


# VQA accuracy, as https://visualqa.org/evaluation.html describes it

_TO_SPACES = str.maketrans(dict.fromkeys(';/[]"{}()=+\\_-><@`,?!', " "))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's
i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock shan't she's should've shouldn't
somebody's someone's something's that'd that's there'd there's they'd they'll they're they've wasn't we've weren't
what'll what're what's what've when's where'd where's who'd who'll who's who've why's won't would've wouldn't y'all
you'd you'll you're you've
"""
_REWRITTEN = {
    **{word.replace("'", ""): word for word in _CONTRACTIONS.split()},
    **{word: str(number) for number, word in enumerate(_NUMBERS)},
    "none": "0",
}
_ARTICLES = {"a", "an", "the"}


def normalize_vqa_answer(answer: str) -> str:
    """Lower case; no periods but decimal ones, no commas in numbers, spaces for other punctuation but apostrophes and
    colons; digits for number words; no articles; contractions with their apostrophe."""
    text = re.sub(r"\.(?!\d)", "", answer.lower())
    text = re.sub(r"(?<=\d),(?=\d)", "", text).translate(_TO_SPACES)
    return " ".join(_REWRITTEN.get(word, word) for word in text.split() if word not in _ARTICLES)


def vqa_accuracy(answer: str, expected: Sequence[str]) -> float:
    """VQA's accuracy: an answer is right to a third for each person who gave it, up to three; the mean over the groups
    that leave one person out.

    Args:
        answer: the model's.
        expected: what people answered; ten of them in VQA-v2.
    """
    given = normalize_vqa_answer(answer)
    agree = [normalize_vqa_answer(other) == given for other in expected]
    return statistics.fmean(min((sum(agree) - left_out) / 3, 1.0) for left_out in agree)


@dataclass(frozen=True)
class Metric:
    """How a task is scored.

    Args:
        title: for tables.
        score: (answer, right answers) → 0 (wrong) to 1.
    """

    title: str
    score: Callable[[str, Sequence[str]], float]


def _any_exact_match(answer: str, expected: Sequence[str]) -> float:
    return float(any(exact_match(answer, right) for right in expected))


#: By the name that results record a score under.
METRICS = {
    "exact_match": Metric(METRIC_TITLES["exact_match"], _any_exact_match),
    "vqa_accuracy": Metric(METRIC_TITLES["vqa_accuracy"], vqa_accuracy),
}


# How sure a score is


def wilson_interval(successes: float, trials: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, which stays inside [0, 1] and is right at its ends too.

    `scipy.stats.binomtest` gives the same for whole counts, and refuses those that [`mean_of`] asks for.

    Args:
        successes, trials: counts, `successes` of `trials`; need not be whole.
        level: of confidence.

    Returns:
        (low, high).

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"There is no share of {successes} in {trials}.")
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    share = successes / trials
    scale = 1 + z * z / trials
    center = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def share_of(hits: Sequence[float]) -> dict[str, Any]:
    """The share of right answers as results record it: `value`, its 95 % `interval` and the number `n`.

    Raises:
        ValueError: `hits` is empty.
    """
    low, high = wilson_interval(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "interval": [low, high], "n": len(hits)}


def mean_of(scores: Sequence[float], clusters: Sequence[Hashable]) -> dict[str, Any]:
    """The mean of scores as results record it, as [`share_of`] does.

    Scores of one cluster, the turns of a dialogue, may depend on each other. The interval is Wilson's of as many trials
    as would give the mean the variance that it has between clusters (the linearised one, with at most a trial a score;
    a trial a cluster where all are alike). It is the ordinary one where right or wrong is scored once a cluster.

    Args:
        scores: 0 to 1.
        clusters: which cluster each score is of.

    Raises:
        ValueError: `scores` is empty.
    """
    if len(set(clusters)) == len(scores) and set(scores) <= {0, 1}:
        return share_of(scores)
    mean, number = statistics.fmean(scores), len(scores)
    deviations: dict[Hashable, float] = defaultdict(float)
    for score, cluster in zip(scores, clusters):
        deviations[cluster] += score - mean
    squares, count = sum(value * value for value in deviations.values()), len(deviations)
    trials: float = count
    if squares > 1e-9:
        trials = min(number, mean * (1 - mean) * number**2 * (count - 1) / (count * squares))
    return {"value": mean, "interval": list(wilson_interval(mean * trials, trials)), "n": number}
