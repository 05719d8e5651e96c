"""Qwen3-VL with Extreme Token Compression (ETC), for images."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel

from ..configuration.configuration_qwen3_vl_etc import Qwen3VLETCConfig
from .compressed_image import CompressedImage
from .compressed_model import CompressedCausalLMOutputWithPast, CompressedModelOutputWithPast
from .compressor_etc import positions_on_grids
from .modeling_etc import EncodedImages, ETCGenerationMixin, ETCModelMixin
from .qwen3_vl_backbone import Qwen3VLGenerationMixin, Qwen3VLModelMixin, refuse_videos


class Qwen3VLETCModel(Qwen3VLModelMixin, ETCModelMixin, Qwen3VLModel):
    """The stock model with compressed tokens after each image's visual ones, to which DeepStack adds nothing."""

    config_class = Qwen3VLETCConfig

    def __init__(self, config: Qwen3VLETCConfig):
        super().__init__(config)
        self._add_compressor(config)
        self.post_init()

    def encode_images(self, pixel_values, image_grid_thw):
        sequences, deepstack, grids = self.read_images(pixel_values, image_grid_thw)
        return EncodedImages(torch.cat(sequences), [len(tokens) for tokens in sequences], grids, deepstack)

    def positions_of(self, columns, grids):
        return positions_on_grids(columns, grids)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
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
            pixel_values: (patches of all images, patch values), the images of all rows, row after row.
            image_grid_thw: (images, 3), each image's patches in time (1), height and width.
            pixel_values_videos, video_grid_thw: refused.
            position_ids, mm_token_type_ids: ignored: they follow from the columns.
            compressed_images: what `compress` returned, in place of `pixel_values`.
            output_compression: also return what each compressed token attends to.
        """
        refuse_videos(pixel_values_videos)
        output, _, _ = self._run(
            {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw},
            compressed_images,
            input_ids,
            inputs_embeds,
            attention_mask,
            past_key_values,
            use_cache,
            output_compression,
            **kwargs,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class Qwen3VLETCForConditionalGeneration(Qwen3VLGenerationMixin, ETCGenerationMixin, Qwen3VLForConditionalGeneration):
    """[`Qwen3VLETCModel`] with a language modeling head."""

    config_class = Qwen3VLETCConfig

    def __init__(self, config: Qwen3VLETCConfig):
        Qwen3VLPreTrainedModel.__init__(self, config)  # not the stock class's: it would build the stock model first
        self.model = Qwen3VLETCModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        compressed_images: list[CompressedImage] | None = None,
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
            others: as in [`Qwen3VLETCModel`].
        """
        refuse_videos(pixel_values_videos)
        return self._answer(
            {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw},
            compressed_images,
            labels,
            logits_to_keep,
            return_dict,
            num_items_in_batch,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_compression=output_compression,
            **kwargs,
        )


__all__ = ["Qwen3VLETCForConditionalGeneration", "Qwen3VLETCModel"]
