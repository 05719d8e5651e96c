"""From the logical sequence that the caller sees to the physical one that the language model runs on, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.modeling.core.cache import LogicalCache


@dataclass
class PhysicalSequence:
    """The columns of one forward call that are really there, pushed to the right.

    Args:
        inputs_embeds: (batch, physical, width).
        attention_mask: (batch, cached + physical), or `None` when nothing is padded.
        position_ids: (batch, physical): every row counts its own physical tokens, the cached ones included.
        columns: (batch, physical), the logical column in this call of every entry, −1 for padding; `None` when all
            columns are there.
        num_columns: logical columns of this call.
        source: the cache's new map (see `LogicalCache.source`).
        has_gaps: the cache's new `has_gaps`.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    columns: torch.Tensor | None
    num_columns: int
    source: torch.Tensor
    has_gaps: bool

    def require_no_padding_between_tokens(self) -> None:
        """Raises `ValueError` where padding lies between two tokens of a row: a sliding window would count it."""
        there = self.source >= 0
        begins = there[:, 1:] & ~there[:, :-1]
        if bool((begins.sum(1) + there[:, 0] > 1).any()):
            raise ValueError(
                "The language model has layers of sliding_attention, whose windows would count the padding between the "
                "cached tokens and the new ones: go on with one row at a time, or run the whole prompts again."
            )

    def to_logical(self, values: torch.Tensor) -> torch.Tensor:
        """(batch, physical, width) → (batch, logical, width), zeros where the logical column is not there."""
        if self.columns is None:
            return values
        spill = torch.where(self.columns < 0, self.num_columns, self.columns)  # padding goes to an extra column
        index = spill[..., None].expand(-1, -1, values.shape[-1])
        logical = values.new_zeros(values.shape[0], self.num_columns + 1, values.shape[-1])
        return logical.scatter(1, index, values)[:, : self.num_columns]

    def to_physical(self, values: torch.Tensor, padding: int) -> torch.Tensor:
        """(batch, logical) → (batch, physical), `padding` where there is no column."""
        if self.columns is None:
            return values
        return values.gather(1, self.columns.clamp(min=0)).masked_fill(self.columns < 0, padding)


def build_physical_sequence(
    inputs_embeds: torch.Tensor,
    present: torch.Tensor | None,
    cache: LogicalCache | None,
    shortest_and_longest: tuple[int, int] | None = None,
) -> PhysicalSequence:
    """Builds the physical sequence of one forward call.

    Args:
        inputs_embeds: (batch, logical, width).
        present: (batch, logical) bool, which columns are there (no padding, no dropped visual token); `None`: all.
        cache: what came before.
        shortest_and_longest: smallest and largest number of present columns in a row, when the host knows them. Only
            then are absent columns left out; else (text alone) they stay where they are, masked.
    """
    batch_size, num_columns = inputs_embeds.shape[:2]
    past = cache.logical_length if cache is not None else 0
    columns = torch.arange(num_columns, device=inputs_embeds.device).expand(batch_size, -1)
    has_gaps = cache is not None and cache.has_gaps
    shrunk = None
    if present is not None and shortest_and_longest is not None:
        shortest, longest = shortest_and_longest
        has_gaps |= shortest < longest
        if shortest < num_columns:
            order = present.to(torch.int8).argsort(dim=1, stable=True)[:, num_columns - longest :]
            columns = torch.where(present.gather(1, order), order, -1)
            inputs_embeds = inputs_embeds.gather(1, order[..., None].expand(-1, -1, inputs_embeds.shape[-1]))
            shrunk = columns
    elif present is not None:
        columns = torch.where(present, columns, -1)
        has_gaps = True

    source = torch.where(columns < 0, -1, columns + past)
    if cache is not None and cache.source is not None:
        source = torch.cat([cache.source.to(source.device), source], dim=1)
    length = columns.shape[1]
    if has_gaps:
        attention_mask = (source >= 0).long()
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
    else:
        attention_mask = None
        position_ids = torch.arange(source.shape[1] - length, source.shape[1], device=source.device)
        position_ids = position_ids.expand(batch_size, -1)
    return PhysicalSequence(inputs_embeds, attention_mask, position_ids, shrunk, num_columns, source, has_gaps)
