"""The cache of one pass whose visual tokens are not kept."""

from __future__ import annotations

import torch
from transformers import Cache

from foveate.modeling.compatibility import count_queries, write_to_cache


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
