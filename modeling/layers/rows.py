"""An image's rows in a prompt."""

from __future__ import annotations

from itertools import pairwise


def tokens_of_rows(num_tokens: int, num_rows: int) -> list[int]:
    """How many of an image's tokens stand in each of its rows, if they are spread evenly: as many as there are of
    tokens at equal distances."""
    ends = [-(-num_tokens * row // num_rows) for row in range(num_rows + 1)]
    return [below - above for above, below in pairwise(ends)]
