"""Processor of Qwen3-VL, whose images take as many columns as follow from their size."""

from __future__ import annotations

from transformers import Qwen3VLProcessor

from foveate.modeling.compatibility import AsksForPlaceholdersMixin
from foveate.processing.base import CompressionProcessorMixin


class Qwen3VLCompressionProcessor(CompressionProcessorMixin, AsksForPlaceholdersMixin, Qwen3VLProcessor):
    """`Qwen3VLProcessor` that writes as many placeholders as an image takes with the compression.

    Args:
        num_visual_tokens, keep_ratio: as in the method's settings; without either nothing is compressed.
        num_compressed: what 0.1 called the first of them for ETC.
        others: as in `Qwen3VLProcessor`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        num_visual_tokens=None,
        keep_ratio=None,
        num_compressed=None,
        **kwargs,
    ):
        self._begin(kwargs)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        self.num_visual_tokens, self.keep_ratio = num_visual_tokens or num_compressed, keep_ratio

    def set_compression(self, settings):
        self.num_visual_tokens, self.keep_ratio = settings.budget

    def count_placeholders(self, length: int) -> int:
        """Columns of an image of `length` visual tokens without compression."""
        settings = self.settings_class.with_budget(self.num_visual_tokens, self.keep_ratio)
        return settings.count_placeholders(length)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        length = int(image_inputs["image_grid_thw"][image_idx].prod()) // self.image_processor.merge_size**2
        return self.image_token * self.count_placeholders(length)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        found = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if image_sizes is not None:
            found.num_image_tokens = [self.count_placeholders(number) for number in found.num_image_tokens]
        return found
