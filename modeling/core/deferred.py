"""What models share whose language model runs on fewer columns than the caller sees."""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache

from foveate.modeling.compatibility import cache_argument, checkpoints_activations, takes_cache
from foveate.modeling.core.base import CompressedGenerationMixin, CompressedModelMixin
from foveate.modeling.core.cache import LogicalCache
from foveate.modeling.core.image_inputs import ImageInputsMixin


class DeferredGenerationMixin(ImageInputsMixin, CompressedGenerationMixin):
    """Mixed into the model with a head, before the Transformers class."""

    _can_compile_fullgraph = False

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
