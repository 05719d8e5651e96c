"""LLaVA-1.5 with Extreme Token Compression (ETC)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from foveate.configuration.configuration_llava_etc import LlavaETCConfig
from foveate.modeling.compatibility import register_key_mapping, stock_image_sequences, takes_cache
from foveate.modeling.core.base import CompressedCausalLMOutputWithPast, CompressedModelOutputWithPast
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.modeling.methods.etc import EncodedImages, ETCGenerationMixin, ETCModelMixin


class LlavaETCModel(ETCModelMixin, LlavaModel):
    """The stock model with compressed tokens after each image's visual ones."""

    config_class = LlavaETCConfig

    def __init__(self, config: LlavaETCConfig):
        super().__init__(config)
        self._add_compressor(config)
        self.post_init()

    def encode_images(self, pixel_values):
        sequences = stock_image_sequences(LlavaModel, self, pixel_values=pixel_values)
        return EncodedImages(torch.cat(sequences), [len(tokens) for tokens in sequences])

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        compressed_images: list[CompressedImage] | None = None,
        use_cache: bool | None = None,
        output_compression: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CompressedModelOutputWithPast | tuple:
        """
        Args:
            input_ids, attention_mask: (batch, columns), for every image n + M placeholders; with a cache, `input_ids`
                holds the new columns and `attention_mask` all of them.
            pixel_values: (images, 3, height, width), the images of all rows, row after row.
            position_ids: ignored: they follow from the columns.
            compressed_images: what `compress` returned, in place of `pixel_values`.
            output_compression: also return what each compressed token attends to.
        """
        output = self._run_prompt(
            {"pixel_values": pixel_values},
            compressed_images,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            output_compression=output_compression,
            **kwargs,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class LlavaETCForConditionalGeneration(ETCGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaETCModel`] with a language modeling head."""

    config_class = LlavaETCConfig
    image_inputs = ("pixel_values", "compressed_images")

    def __init__(self, config: LlavaETCConfig):
        LlavaPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = LlavaETCModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        compressed_images: list[CompressedImage] | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_compression: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CompressedCausalLMOutputWithPast | tuple:
        """
        Args:
            labels: (batch, columns), −100 where no loss is wanted.
            logits_to_keep: the number of last columns (0: all), or their indices.
            others: as in [`LlavaETCModel`].
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            compressed_images=compressed_images,
            use_cache=use_cache,
            output_compression=output_compression,
            return_dict=True,
            **kwargs,
        )
        return self._with_head(output, labels, logits_to_keep, return_dict, num_items_in_batch)

    def count_placeholders(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        pixel_values = images["pixel_values"]
        count = self.config.num_patches + self.config.compression.num_visual_tokens
        return torch.full((len(pixel_values),), count, device=pixel_values.device)


register_key_mapping(LlavaETCModel, LlavaETCForConditionalGeneration, base_model_type="llava", own_keys=("compressor",))

__all__ = ["LlavaETCForConditionalGeneration", "LlavaETCModel"]
