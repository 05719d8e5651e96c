"""Processors of methods that compress an image's whole sequence, right before the language model: the number of tokens
follows from the image's size."""

from __future__ import annotations

from transformers import LlavaNextProcessor, LlavaProcessor

from foveate.configuration.sequence import SequenceSettings
from foveate.modeling.layers.tiles import tile_grid
from foveate.processing.compressed_images import CompressedImageProcessorMixin
from foveate.processing.placeholder_count import LlavaExactCountMixin


class LlavaSequenceProcessor(CompressedImageProcessorMixin, LlavaExactCountMixin, LlavaProcessor):
    """`LlavaProcessor` that writes as many placeholders as an image has tokens after compression.

    Args:
        num_additional_image_tokens: as in `LlavaProcessor`, what there is beside a token a patch. `set_compression`
            sets it to what the compression takes away.
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
        self.auto_map = _auto_map(type(self))
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )


class LlavaNextSequenceProcessor(CompressedImageProcessorMixin, LlavaNextProcessor):
    """`LlavaNextProcessor` that writes as many placeholders as an image has tokens after compression.

    Args:
        num_visual_tokens, keep_ratio: as in [`SequenceSettings`]; without either nothing is compressed.
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
        self.auto_map = _auto_map(type(self))
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

    def set_compression(self, settings) -> None:
        """Takes the budget from a model's compression settings."""
        self.num_visual_tokens, self.keep_ratio = settings.num_visual_tokens, settings.keep_ratio

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        """Tokens of an image of (orig_height, orig_width) pixels in tiles of (height, width), and one for the class
        token, which the stock class takes off again."""
        grid = tile_grid((orig_height, orig_width), self.image_processor.image_grid_pinpoints, height, self.patch_size)
        length = grid.num_tokens(grid.side**2)
        if self.num_visual_tokens is not None or self.keep_ratio is not None:
            length = SequenceSettings(self.num_visual_tokens, self.keep_ratio).count_tokens(length)
        return length + 1


def _auto_map(processor_class: type) -> dict[str, str]:
    """The class lies in a module of the same name in the package and in a checkpoint's code."""
    return {"AutoProcessor": f"{processor_class.__module__.rpartition('.')[2]}.{processor_class.__name__}"}
