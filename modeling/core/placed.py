"""What models share whose position ids don't follow from the number of columns: the cache keeps them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from foveate.modeling.compatibility import cache_argument, cache_positions, fields_with_cache
from foveate.modeling.core.base import CompressedModelOutputWithPast
from foveate.modeling.core.cache import LogicalCache
from foveate.modeling.core.deferred import LogicalModelMixin
from foveate.modeling.core.physical_sequence import build_physical_sequence
from foveate.modeling.core.positions import line_positions


class PlacedModelMixin(LogicalModelMixin):
    """Mixed into a model without a head, before the Transformers class."""

    def _position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        """(dimensions, batch, columns), or one for all dimensions, as the language model takes them."""
        return positions[0]

    def _check_text_alone(self, input_ids: torch.Tensor | None, cache: LogicalCache | None) -> None:
        begins = cache is None or cache.logical_length == 0  # later a guess of an assistant's may look like an image
        if begins and input_ids is not None and bool((input_ids == self.config.image_token_id).any()):  # type: ignore[attr-defined]
            raise ValueError(
                "input_ids has placeholder tokens of images, but there are none: pass pixel_values or "
                "compressed_images with it, as the processor returns them."
            )

    def _run_columns(
        self,
        inputs_embeds: torch.Tensor,
        present: torch.Tensor | None,
        cache: LogicalCache | None,
        positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CompressedModelOutputWithPast:
        """Runs columns that all stay.

        Args:
            inputs_embeds: (batch, columns, width).
            present: (batch, columns) bool, which are no padding; `None`: all.
            cache: what came before.
            positions: (dimensions, batch, columns), from 0 in each row; `None`: they count the columns.
            kwargs: for the language model.
        """
        batch_size, length = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        sequence = build_physical_sequence(inputs_embeds, present, cache)
        if positions is None:
            there = torch.ones(batch_size, length, dtype=torch.bool, device=device) if present is None else present
            positions = line_positions(there)
        if cache is not None:
            positions = positions + cache.next_positions(batch_size, device)
        past = 0 if cache is None else cache.physical_length
        output = self._run_language_model(
            inputs_embeds, sequence.attention_mask, positions, None if cache is None else cache.inner, past, **kwargs
        )
        if cache is not None:
            cache.extend(sequence.source[:, past:], positions.amax(0), length, sequence.has_gaps)
        return CompressedModelOutputWithPast(**fields_with_cache(output, cache))

    def _run_language_model(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        cache: Cache | None,
        past: int,
        **kwargs: Any,
    ) -> Any:
        return self.language_model(  # type: ignore[attr-defined]
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=self._position_ids(positions),
            **cache_argument(cache),
            use_cache=cache is not None,
            **cache_positions(past, inputs_embeds.shape[1], inputs_embeds.device),
            **kwargs,
        )
