"""The caches of models whose language model runs on other columns than the caller sees.

[`LogicalCache`] is a KV cache that speaks *logical* positions to `generate` while the language model sees the
*physical* ones inside.

Logical is what the caller sees: the columns of `input_ids` and `attention_mask`, with every image placeholder. Physical
is what the language model runs on: fewer entries, where a method drops visual tokens after placeholders were written.

[`EvictingCache`] is handed to the language model for one pass whose visual tokens are not kept.
"""

from __future__ import annotations

import torch
from transformers import Cache

from foveate.modeling.compatibility import count_queries, length_after_crop, remove_from_cache, write_to_cache


class LogicalCache(Cache):
    """Wraps an ordinary cache, whose entries are physical.

    Args:
        inner: the cache that the language model gets.
        batch_size: rows, needed when `inner` already holds something.

    Attributes:
        source: for every physical entry of every row the logical column it stands for, −1 where a row has padding;
            (batch, physical length), or `None` before the first tokens.
        positions: the position id of every entry, (batch, physical length), for models whose positions don't follow
            from the number of entries; else `None`.
        has_gaps: whether any row may have padding; while `False` no attention mask is needed.
    """

    def __init__(self, inner: Cache, batch_size: int = 1, device: torch.device | None = None):
        # Cache.__init__ would make layers of its own; all state is the inner cache's and the map beside it.
        self.inner = inner
        self.logical_length = int(inner.get_seq_length())
        self.source: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.has_gaps = False
        if self.logical_length:  # a cache of text only, made elsewhere: there logical and physical are the same
            self.source = torch.arange(self.logical_length, device=device).expand(batch_size, -1)

    @classmethod
    def wrap(cls, cache: Cache, batch_size: int, device: torch.device) -> LogicalCache:
        return cache if isinstance(cache, cls) else cls(cache, batch_size, device)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "inner":  # not there yet while copying or unpickling
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def layers(self):
        return self.inner.layers

    @property
    def is_compileable(self) -> bool:
        # `generate` makes 4-D masks of logical size for compileable caches; the mask here is of physical size.
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length: what `generate` slices `input_ids` by."""
        return self.logical_length

    @property
    def physical_length(self) -> int:
        return 0 if self.source is None else self.source.shape[1]

    def append(
        self, source: torch.Tensor, num_columns: int, has_gaps: bool, positions: torch.Tensor | None = None
    ) -> None:
        """Notes `num_columns` new logical columns; `source` and `positions` (batch, all physical entries) replace the
        maps."""
        self.source, self.positions = source, positions
        self.logical_length += num_columns
        self.has_gaps = has_gaps

    def extend(
        self, source: torch.Tensor, positions: torch.Tensor, num_columns: int = 0, has_gaps: bool = False
    ) -> None:
        """Notes new entries, (batch, new) each, and `num_columns` new logical columns."""
        if self.source is not None:
            known = self.source if self.positions is None else self.positions  # of text made elsewhere they are one
            source = torch.cat([self.source.to(source.device), source], dim=1)
            positions = torch.cat([known.to(positions.device), positions], dim=1)
        self.append(source, num_columns, self.has_gaps or has_gaps, positions)

    def next_positions(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """(batch, 1): one beyond the largest position that is there."""
        if self.source is None or self.source.shape[1] == 0:
            return torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        known = self.source if self.positions is None else self.positions
        return known.masked_fill(self.source < 0, -1).amax(1, keepdim=True).to(device) + 1

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        raise RuntimeError("The language model must be handed the physical cache: pass `cache.inner`, not the wrapper.")

    def crop(self, argument: int) -> None:
        """Removes logical columns at the end; the argument means what it means for the installed version's caches."""
        length = length_after_crop(self.logical_length, argument)
        if length >= self.logical_length or self.source is None:
            return
        source = self.source.masked_fill(self.source >= length, -1)
        entries = torch.arange(1, source.shape[1] + 1, device=source.device)
        kept = int((entries * (source >= 0)).max())  # rows keep different numbers: the longest decides
        if kept < source.shape[1]:
            remove_from_cache(self.inner, source.shape[1] - kept)
        self.source, self.logical_length, self.has_gaps = source[:, :kept], length, True
        if self.positions is not None:
            self.positions = self.positions[:, :kept]

    def hide(self, attention_mask: torch.Tensor) -> None:
        """Takes columns that are cached already out of what later tokens see and of what their positions count, for
        good: (batch, logical length), 0 where a column goes; a mask of another length says nothing of the cache."""
        if self.source is None or attention_mask.shape[1] != self.logical_length or self.logical_length == 0:
            return
        seen = attention_mask.to(self.source.device).gather(1, self.source.clamp(min=0))
        self.source, self.has_gaps = self.source.masked_fill(seen == 0, -1), True

    def _select(self, rows: torch.Tensor) -> None:
        for name in ("source", "positions"):
            if (entries := getattr(self, name)) is not None:
                setattr(self, name, entries.index_select(0, rows.to(entries.device)))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.inner.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.inner.batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.inner.batch_repeat_interleave(repeats)
        if self.source is not None:
            self._select(torch.arange(len(self.source)).repeat_interleave(repeats))

    def reset(self) -> None:
        self.inner.reset()
        self.source, self.positions, self.logical_length, self.has_gaps = None, None, 0, False

    def __repr__(self) -> str:
        return f"LogicalCache(logical={self.logical_length}, physical={self.physical_length}, {self.inner!r})"


class EvictingCache(Cache):
    """What the language model is handed in place of a cache for one pass: every token of the pass attends to all that
    came before, and only some of them stay.

    Each layer stores what stays as soon as it has run, so no more than one layer's visual keys and values exist at a
    time.

    Args:
        inner: the cache that the entries stay in.
        past: its entries before the pass.
        kept: (batch, kept), which entries of the pass stay, −1 for padding.
    """

    def __init__(self, inner: Cache, past: int, kept: torch.Tensor):
        # Cache.__init__ would make layers of its own.
        self.inner, self.past, self.kept = inner, past, kept

    @property
    def layers(self):
        return self.inner.layers

    @property
    def is_compileable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query: int | torch.Tensor, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys, for as many queries as [`count_queries`] says."""
        return self.past + count_queries(query), 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Stores what stays of a layer's keys and values, (batch, heads, pass, width); returns all there are."""
        index = self.kept.clamp(min=0).to(key_states.device)[:, None, :, None]
        stay = [
            states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
            for states in (key_states, value_states)
        ]
        stored = write_to_cache(self.inner, *stay, layer_idx, self.past)
        if self.past == 0:
            return key_states, value_states
        keys, values = (
            torch.cat([old[:, :, : self.past], new], dim=2) for old, new in zip(stored, (key_states, value_states))
        )
        return keys, values
