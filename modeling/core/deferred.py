"""What models share whose language model runs on other columns than the caller sees.

*Logical* columns are the caller's, with every placeholder; *physical* ones are what the language model runs on and the
cache holds (`cache.py`). [`DeferredModelMixin`] opens a call and its cache, [`PhysicalSequence`] leads from the logical
columns to the physical ones and back, and [`OwnPositionsModelMixin`] is for position ids that don't follow from the
number of columns: the cache keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from foveate.modeling.compatibility import (
    cache_argument,
    cache_positions,
    checkpoints_activations,
    fields_with_cache,
    slice_logits_to_keep,
    takes_cache,
)
from foveate.modeling.core.base import CompressedGenerationMixin, CompressedModelMixin
from foveate.modeling.core.cache import LogicalCache
from foveate.modeling.core.image_inputs import ImageInputsMixin
from foveate.modeling.core.outputs import CompressedCausalLMOutputWithPast, CompressedModelOutputWithPast
from foveate.modeling.core.positions import lay_out_columns


_INTERNAL = ("physical_sequence",)  # of an output: for the class with a head


class DeferredGenerationMixin(ImageInputsMixin, CompressedGenerationMixin):
    """Mixed into the model with a head, before the Transformers class."""

    _can_compile_fullgraph = False

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        return None  # `forward` makes them

    def forward(
        self,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CompressedCausalLMOutputWithPast | tuple:
        """
        Args:
            labels: (batch, columns), −100 where no loss is wanted.
            logits_to_keep: the number of last columns (0: all), or their indices.
            kwargs: as in the model without a head.
        """
        output = self.model(return_dict=True, **kwargs)
        logits = self.lm_head(slice_logits_to_keep(output.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return self._with_logits(output, loss, logits, return_dict)

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None
    ) -> torch.Tensor:
        return self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.get_text_config().vocab_size,
            num_items_in_batch=num_items_in_batch,
        )

    def _with_logits(
        self,
        output: CompressedModelOutputWithPast,
        loss: Any,
        logits: Any,
        return_dict: bool | None,
    ) -> CompressedCausalLMOutputWithPast | tuple:
        """The output of the model with a head, of what the model without one returned."""
        shared = {name: value for name, value in output.items() if name not in ("last_hidden_state", *_INTERNAL)}
        return self._returned(CompressedCausalLMOutputWithPast(loss=loss, logits=logits, **shared), return_dict)

    @takes_cache
    def prepare_inputs_for_generation(self, input_ids, cache=None, **kwargs):
        if cache is not None:
            cache = LogicalCache.wrap(cache, len(input_ids), input_ids.device)
        return super().prepare_inputs_for_generation(input_ids, **cache_argument(cache), **kwargs)


class DeferredModelMixin(CompressedModelMixin):
    """Mixed into a model without a head, before the Transformers class."""

    unused_inputs = CompressedModelMixin.unused_inputs | {"mm_encoder_outputs"}

    _can_compile_fullgraph = False  # the length of the physical sequence is data

    def _open_columns(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, LogicalCache | None]:
        """What a call brings.

        Returns:
            Embeddings of its columns, (batch, columns, width); which of them are no padding, (batch, columns) bool or
            `None` for all; the cache, which has forgotten what the mask takes back.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of input_ids and inputs_embeds.")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask must be 2-D (batch, length): the model builds the physical mask from it.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        batch_size, num_columns = inputs_embeds.shape[:2]
        logical = self._wrap_cache(cache, use_cache, batch_size, inputs_embeds.device)
        present = None if attention_mask is None else attention_mask[:, -num_columns:].bool()
        if logical is not None and attention_mask is not None and num_columns > 1:
            logical.hide(attention_mask[:, :-num_columns])  # a later turn may leave out what earlier ones said
        return inputs_embeds, present, logical

    def _wrap_cache(
        self, cache: Cache | None, use_cache: bool | None, batch_size: int, device: torch.device
    ) -> LogicalCache | None:
        text_config = self.config.text_config
        if cache is None:
            wanted = getattr(text_config, "use_cache", True) if use_cache is None else use_cache
            if not wanted or (self.training and checkpoints_activations(self)):
                return None
            cache = DynamicCache(config=text_config)
        return LogicalCache.wrap(cache, batch_size, device)


class OwnPositionsModelMixin(DeferredModelMixin):
    """Mixed into a model without a head, before the Transformers class: it makes position ids, and the cache keeps
    them."""

    def _position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        """(axes, batch, columns), or one for all axes, as the language model takes them."""
        axes = self.num_position_axes
        return positions[0] if axes == 1 else positions.expand(axes, -1, -1)

    def _check_text_alone(self, input_ids: torch.Tensor | None, cache: LogicalCache | None) -> None:
        begins = cache is None or cache.logical_length == 0  # later a guess of an assistant's may look like an image
        if begins and input_ids is not None and bool((input_ids == self.config.image_token_id).any()):
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
            positions, _ = lay_out_columns(there)
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
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=self._position_ids(positions),
            **cache_argument(cache),
            use_cache=cache is not None,
            **cache_positions(past, inputs_embeds.shape[1], inputs_embeds.device),
            **kwargs,
        )


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
