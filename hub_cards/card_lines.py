"""How a card is brought up to date without touching what people wrote into it: a merge of three texts, line by line.

The three are the card as an earlier version wrote it, the card as it is, and the card as this version writes it. What
differs between the first and the second was edited; what differs between the first and the third is a fact that this
version states otherwise. Of the first only a digest of each line has to be known, which the list of files keeps.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher


_DIGEST_CHARACTERS = 8


@dataclass(frozen=True)
class MergedCard:
    """A card that is up to date.

    Attributes:
        text: the card.
        num_kept: how many passages state what this version states otherwise, and stay because they were edited.
    """

    text: str
    num_kept: int


def line_digests(card: str) -> list[str]:
    """A digest of each line of a card; white space at a line's end doesn't count."""
    return [
        hashlib.sha256(line.rstrip().encode()).hexdigest()[:_DIGEST_CHARACTERS] if line.strip() else ""
        for line in card.splitlines()
    ]


def merge_card(written: Sequence[str], present: str, new: str) -> MergedCard:
    """Replaces the lines of a card that nobody edited.

    A passage that this version writes otherwise is replaced only if each of its lines is there as it was written, with
    nothing between them; one that is new, only if the line above it is. Whatever was added stays where it is.

    Args:
        written: digests of the lines as they were written.
        present: the card as it is.
        new: the card as this version writes it.
    """
    mine, lines = present.splitlines(), new.splitlines()
    mine_digests, new_digests = line_digests(present), line_digests(new)
    kept, added = _user_edits(written, mine_digests)
    passages: dict[int, tuple[int, list[str]]] = {}
    num_kept = 0
    for start, end, first, last in _differences(written, new_digests):
        # What is new as a whole follows what stands above it.
        above = next((line for line in range(start - 1, -1, -1) if written[line]), None)
        needed = range(start, end) if end > start else [] if above is None else [above]
        if all(line in kept for line in needed) and not any(added[line] for line in range(start + 1, end)):
            passages[start] = (end, lines[first:last])
        elif not set(new_digests[first:last]) <= set(mine_digests):
            num_kept += 1
    merged: list[str] = []
    replaced_to = 0
    for line in range(len(written) + 1):
        own = [mine[position] for position in added[line]]
        end, passage = passages.get(line, (line, []))
        # What was added stands before this line, unless it was written in its place.
        merged += passage + own if end == line and line not in kept else own + passage
        replaced_to = max(replaced_to, end)
        if line in kept and line >= replaced_to:
            merged.append(mine[kept[line]])
    newline = "\r\n" if "\r\n" in present else "\n"
    return MergedCard(newline.join(merged) + newline, num_kept)


def _user_edits(written: Sequence[str], present: Sequence[str]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Where the written lines are that are still there, and which lines were added before each of the written ones."""
    kept: dict[int, int] = {}
    added: dict[int, list[int]] = defaultdict(list)
    matcher = _matcher(written, present)
    for start, first, length in matcher.get_matching_blocks():
        kept.update((start + offset, first + offset) for offset in range(length))
    for start, _, first, last in _differences(written, present):
        added[start].extend(range(first, last))
    return kept, added


def _differences(written: Sequence[str], other: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Passages that differ: their lines in the one and in the other, as (start, end, start, end)."""
    return [place for kind, *place in _matcher(written, other).get_opcodes() if kind != "equal"]  # type: ignore[misc]


def _matcher(written: Sequence[str], other: Sequence[str]) -> SequenceMatcher:
    # Empty lines alone say nothing about which passage is which.
    return SequenceMatcher(lambda digest: digest == "", written, other, autojunk=False)
