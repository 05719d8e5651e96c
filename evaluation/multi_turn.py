"""Later turns on the model's cache: the image is encoded in the first turn alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import torch

from foveate.errors import FoveateError
from foveate.modeling.compatibility import cache_argument, cache_of


class CachedTurns:
    """What a batch of dialogues left in the cache, and how the next turn goes on from there.

    Columns of a batch only grow, but its answers differ in length, and a chat template may write an answer otherwise
    than the model said it. So each row keeps what a fresh tokenisation of its conversation begins with, the rest of its
    columns get mask 0, and what is new in it is appended, padded on the left. The answers are those of a fresh run
    wherever the image's tokens are: those that the first turn chose.

    Args:
        num_rows: dialogues of the batch.
        image_token_id, pad_token_id: of the model.
    """

    def __init__(self, num_rows: int, image_token_id: int, pad_token_id: int):
        self.image_token_id, self.pad_token_id = image_token_id, pad_token_id
        self._rows = list(range(num_rows))
        self._cache: Any = None
        self._input_ids = torch.empty(num_rows, 0, dtype=torch.long)
        self._is_there = torch.empty(num_rows, 0, dtype=torch.bool)

    def keep(self, rows: list[int]) -> None:
        """Goes on with some of the batch's dialogues alone; the others have ended."""
        if rows == self._rows:
            return
        chosen = torch.tensor([self._rows.index(row) for row in rows], device=self._input_ids.device)
        self._rows, self._input_ids, self._is_there = rows, self._input_ids[chosen], self._is_there[chosen]
        if self._cache is not None:
            self._cache.batch_select_indices(chosen)

    def go_on(self, fresh: Mapping[str, Any]) -> Mapping[str, Any]:
        """Inputs of `generate` for the next turn.

        Args:
            fresh: what the processor makes of the whole conversations, (rows, length) `input_ids` and `attention_mask`
                and the images; in the first turn these are the inputs.

        Raises:
            FoveateError: the chat template writes the place of an image otherwise when a dialogue goes on.
        """
        if self._cache is None:
            return fresh
        there, new = self._is_there.clone(), []
        for row, (ids, mask) in enumerate(zip(fresh["input_ids"], fresh["attention_mask"])):
            columns, whole = there[row].nonzero()[:, 0], ids[mask.bool()].tolist()
            so_far = self._input_ids[row, columns].tolist()
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(so_far, whole[:-1])))
            there[row, columns[kept:]] = False
            new.append(whole[kept:])
        if any(self.image_token_id in tokens for tokens in new):
            raise FoveateError(
                "The checkpoint's chat template writes the beginning of a dialogue otherwise when it goes on, so a "
                "cache of it is of no use: leave --reuse-cache out."
            )
        longest, device = max(map(len, new)), self._input_ids.device
        padded = [[self.pad_token_id] * (longest - len(tokens)) + tokens for tokens in new]
        is_new = [[False] * (longest - len(tokens)) + [True] * len(tokens) for tokens in new]
        self._is_there = torch.cat([there, torch.tensor(is_new, device=device)], dim=1)
        mask = self._is_there.long()
        ids = torch.cat([self._input_ids, torch.tensor(padded, device=device)], dim=1)
        return {"input_ids": ids, "attention_mask": mask, **cache_argument(self._cache)}

    def remember(self, inputs: Mapping[str, Any], output: Any) -> None:
        """Keeps what `generate` made of the inputs of [`go_on`]: `sequences` and the cache."""
        self._input_ids, self._cache = output.sequences, cache_of(output)
        prompt = inputs["attention_mask"].bool()
        num_generated = output.sequences.shape[1] - prompt.shape[1]
        self._is_there = torch.cat([prompt, prompt.new_ones(len(prompt), num_generated)], dim=1)
