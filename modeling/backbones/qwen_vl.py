"""What models on Qwen3-VL share, whatever their method: how images come in, and where they lie."""

from __future__ import annotations

import torch
from transformers import Cache, GenerationMixin, Qwen3VLModel

from foveate.modeling.compatibility import stock_deepstack_features, takes_cache
from foveate.modeling.core.base import CompressedCausalLMOutputWithPast, CompressedModelOutputWithPast
from foveate.modeling.core.compressed_image import CompressedImage


class Qwen3VLModelMixin:
    """Mixed into a model without a head, before its method's mixin, which brings `_run_prompt`."""

    visual_inputs = ("pixel_values", "image_grid_thw")

    def read_images(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """What the stock model reads of images.

        Args:
            pixel_values: (patches of all images, patch values).
            image_grid_thw: (images, 3), each image's patches in time (1), height and width.

        Returns:
            Visual tokens of each image, (n, width); for each layer of DeepStack what is added after it, (tokens of all
            images, width); and (images, 2), height and width of each image in tokens.
        """
        if image_grid_thw is None:
            raise ValueError("pixel_values need image_grid_thw: pass what the processor returns.")
        sequences, deepstack = stock_deepstack_features(
            Qwen3VLModel, self, pixel_values=pixel_values, image_grid_thw=image_grid_thw
        )
        return sequences, deepstack, image_grid_thw[:, 1:] // self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]

    def _position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        return positions.expand(3, -1, -1)

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
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
            input_ids, attention_mask: (batch, columns), with the placeholders that the processor writes for every
                image; with a cache, `input_ids` holds the new columns and `attention_mask` all of them.
            pixel_values: (patches of all images, patch values), the images of all rows, row after row.
            image_grid_thw: (images, 3), each image's patches in time (1), height and width.
            pixel_values_videos, video_grid_thw: refused.
            position_ids, mm_token_type_ids: ignored: they follow from the columns.
            compressed_images: what `compress` returned, in place of `pixel_values`.
            output_compression: also return where each visual token comes from.
        """
        refuse_videos(pixel_values_videos)
        output = self._run_prompt(  # type: ignore[attr-defined]
            {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw},
            compressed_images,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            output_compression=output_compression,
            **kwargs,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict  # type: ignore[attr-defined]
        return output if return_dict else output.to_tuple()


class Qwen3VLGenerationMixin:
    """Mixed into the model with a head, before its method's mixin."""

    image_inputs = ("pixel_values", "image_grid_thw", "compressed_images")

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
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
            others: as in the model without a head.
        """
        output = self.model(  # type: ignore[attr-defined]
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            compressed_images=compressed_images,
            use_cache=use_cache,
            output_compression=output_compression,
            return_dict=True,
            **kwargs,
        )
        return self._with_head(output, labels, logits_to_keep, return_dict, num_items_in_batch)  # type: ignore[attr-defined]

    def take_images(self, images, chosen):
        """The patches of all images lie in one tensor."""
        grids, pixels = images.get("image_grid_thw"), images.get("pixel_values")
        if grids is None or pixels is None:
            return super().take_images(images, chosen)  # type: ignore[misc]
        pieces = pixels.split(grids.prod(-1).tolist())
        taken = torch.cat([pieces[index] for index in chosen.tolist()])
        return {**images, "pixel_values": taken, "image_grid_thw": grids[chosen.to(grids.device)]}

    def count_placeholders(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        grids, merge = images["image_grid_thw"], self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]
        settings = self.config.compression  # type: ignore[attr-defined]
        counts = [settings.count_placeholders(length) for length in (grids.prod(-1) // merge**2).tolist()]
        return torch.tensor(counts, device=grids.device)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Newer 5.x lay out the grids of images here, uncompressed; `forward` does it itself.
        return GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)  # type: ignore[arg-type]


def refuse_videos(pixel_values_videos: torch.Tensor | None) -> None:
    if pixel_values_videos is not None:
        raise ValueError("This model takes images, not videos yet: pass single frames as images.")
