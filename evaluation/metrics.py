"""How an answer is compared with the right one, and how sure a share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def normalize_answer(answer: str) -> str:
    """Lower case, single spaces, no period at the end."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same after [`normalize_answer`]."""
    return normalize_answer(answer) == normalize_answer(expected)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, which stays inside [0, 1] and is right at its ends too.

    Args:
        successes, trials: counts, `successes` of `trials`.
        z: quantile of the normal distribution; the default gives 95 %.

    Returns:
        (low, high).

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"There is no share of {successes} in {trials}.")
    share = successes / trials
    scale = 1 + z * z / trials
    center = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def share_of(hits: Sequence[bool]) -> dict[str, Any]:
    """The share of right answers as results record it: `value`, its 95 % `interval` and the number `n`.

    Raises:
        ValueError: `hits` is empty.
    """
    low, high = wilson_interval(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "interval": [low, high], "n": len(hits)}
