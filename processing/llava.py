"""Processor of LLaVA-1.5, whose images all take the same number of columns."""

from __future__ import annotations

from transformers import LlavaProcessor

from foveate.processing.base import CompressionProcessorMixin


class LlavaCompressionProcessor(CompressionProcessorMixin, LlavaProcessor):
    """`LlavaProcessor` that writes as many placeholders as an image takes with the compression.

    Args:
        num_additional_image_tokens: as in `LlavaProcessor`, what there is beside a token a patch. `set_compression`
            sets it to what the compression takes away or adds, so that wherever the stock formula is used, it counts
            right.
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
        **kwargs,
    ):
        self._begin(kwargs)
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )

    def set_compression(self, settings):
        crop = self.image_processor.crop_size
        num_patches = (crop["height"] // self.patch_size) * (crop["width"] // self.patch_size)
        # The stock formula takes the class token off again, where the vision tower has one.
        class_token = int(self.vision_feature_select_strategy == "default")
        self.num_additional_image_tokens = settings.count_placeholders(num_patches) - num_patches + class_token
