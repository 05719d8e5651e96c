"""Processor of LLaVA-1.5 with LLaVA-Meteor."""

from __future__ import annotations

from transformers import LlavaProcessor
from transformers.processing_utils import MultiModalData

from foveate.modeling.compatibility import AsksForPlaceholdersMixin
from foveate.processing.compressed_images import CompressedImageProcessorMixin


class LlavaMeteorProcessor(CompressedImageProcessorMixin, AsksForPlaceholdersMixin, LlavaProcessor):
    """`LlavaProcessor` for images of any size, with as many placeholders as an image's views keep tokens, and one for
    every separator between slices.

    Args:
        num_visual_tokens: K, of every view; `None`: all its patches.
        others: as in `LlavaProcessor`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        num_visual_tokens=None,
        **kwargs,
    ):
        self.auto_map = {"AutoProcessor": f"{__name__.rpartition('.')[2]}.{type(self).__name__}"}
        self.num_visual_tokens = num_visual_tokens
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )

    def set_compression(self, settings) -> None:
        """Takes the budget and the limit of slices from a model's compression settings."""
        self.num_visual_tokens = settings.num_visual_tokens
        self.image_processor.max_slices = settings.max_slices

    def count_placeholders(self, image_size) -> int:
        """Columns of an image of (height, width) pixels."""
        grid = self.image_processor.grid_of(image_size)
        return grid.num_tokens(self.num_visual_tokens or grid.num_patches)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.image_token * self.count_placeholders(image_inputs["image_sizes"][image_idx])

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        if image_sizes is None:
            return MultiModalData()
        counts = [self.count_placeholders(size) for size in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))


__all__ = ["LlavaMeteorProcessor"]
