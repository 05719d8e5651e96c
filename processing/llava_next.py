"""Processor of LLaVA-NeXT, whose images take as many columns as follow from their tiles."""

from __future__ import annotations

from transformers import LlavaNextProcessor

from foveate.modeling.layers.tiles import tile_grid
from foveate.processing.base import CompressionProcessorMixin


class LlavaNextCompressionProcessor(CompressionProcessorMixin, LlavaNextProcessor):
    """`LlavaNextProcessor` that writes as many placeholders as an image takes with the compression.

    Args:
        num_visual_tokens, keep_ratio: as in the method's settings; without either nothing is compressed.
        others: as in `LlavaNextProcessor`.
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
        keep_ratio=None,
        **kwargs,
    ):
        self._begin(kwargs)
        self.num_visual_tokens, self.keep_ratio = num_visual_tokens, keep_ratio
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
        self.num_visual_tokens, self.keep_ratio = settings.budget

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        """Tokens of an image of (orig_height, orig_width) pixels in tiles of (height, width), and one for the class
        token, where the vision tower has one: the stock class takes it off again."""
        grid = tile_grid((orig_height, orig_width), self.image_processor.image_grid_pinpoints, height, self.patch_size)
        settings = self.settings_class.with_budget(self.num_visual_tokens, self.keep_ratio)
        number = settings.count_placeholders(*grid.patches_of_tiles(), num_separators=grid.num_newlines)
        return number + int(self.vision_feature_select_strategy == "default")
