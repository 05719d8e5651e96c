"""Qwen3-VL with Extreme Token Compression (ETC), for images."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, GenerationMixin, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel

from ..configuration.configuration_qwen3_vl_etc import Qwen3VLETCConfig
from .compatibility import stock_deepstack_features
from .compressed_image import CompressedImage
from .compressed_model import CompressedCausalLMOutputWithPast, CompressedModelOutputWithPast
from .compressor_etc import grid_positions
from .modeling_etc import EncodedImages, ETCGenerationMixin, ETCModelMixin


class Qwen3VLETCModel(ETCModelMixin, Qwen3VLModel):
    """The stock model with compressed tokens after each image's visual ones, to which DeepStack adds nothing."""

    config_class = Qwen3VLETCConfig
    visual_inputs = ("pixel_values", "image_grid_thw")

    def __init__(self, config: Qwen3VLETCConfig):
        super().__init__(config)
        self._add_compressor(config)
        self.post_init()

    def encode_images(self, pixel_values, image_grid_thw):
        if image_grid_thw is None:
            raise ValueError("pixel_values need image_grid_thw: pass what the processor returns.")
        sequences, deepstack = stock_deepstack_features(
            Qwen3VLModel, self, pixel_values=pixel_values, image_grid_thw=image_grid_thw
        )
        grids = image_grid_thw[:, 1:] // self.config.vision_config.spatial_merge_size
        return EncodedImages(torch.cat(sequences), [len(tokens) for tokens in sequences], grids, deepstack)

    def positions_of(self, columns, grids):
        return grid_positions(columns, grids)

    def _position_ids(self, positions):
        return positions.expand(3, -1, -1)

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


class Qwen3VLETCForConditionalGeneration(ETCGenerationMixin, Qwen3VLForConditionalGeneration):
    """[`Qwen3VLETCModel`] with a language modeling head."""

    config_class = Qwen3VLETCConfig
    image_inputs = ("pixel_values", "image_grid_thw", "compressed_images")

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

    def count_placeholders(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        merged = self.config.vision_config.spatial_merge_size**2
        return images["image_grid_thw"].prod(-1) // merged + self.config.compression.num_visual_tokens

    def take_images(self, images, chosen):
        """The patches of all images lie in one tensor."""
        grids, pixels = images["image_grid_thw"], images["pixel_values"]
        if grids is None or pixels is None:
            return super().take_images(images, chosen)
        pieces = pixels.split(grids.prod(-1).tolist())
        taken = torch.cat([pieces[index] for index in chosen.tolist()])
        return {**images, "pixel_values": taken, "image_grid_thw": grids[chosen.to(grids.device)]}

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Newer 5.x lay out the grids of images here, without the compressed tokens; `forward` does it itself.
        return GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)


def refuse_videos(pixel_values_videos: torch.Tensor | None) -> None:
    if pixel_values_videos is not None:
        raise ValueError("ETC on Qwen3-VL takes images, not videos yet: pass single frames as images.")


__all__ = ["Qwen3VLETCForConditionalGeneration", "Qwen3VLETCModel"]
