"""Processor of LLaVA-NeXT with QG-VTC."""

from __future__ import annotations

from transformers import LlavaNextProcessor

from foveate.modeling.layers.tiles import tile_grid
from foveate.processing.question import QuestionProcessorMixin


class LlavaNextQGVTCProcessor(QuestionProcessorMixin, LlavaNextProcessor):
    """`LlavaNextProcessor` that writes as many placeholders as an image has tokens after compression, and that also
    tokenizes the question that guides it: the last user turn's, for all images of a prompt.

    Args:
        question_tokenizer: tokenizer of the CLIP text tower that reads the question.
        num_visual_tokens: tokens that each tile is compressed to; `None`: all of them.
        others: as in `LlavaNextProcessor`.
    """

    guiding_turn = "last"
    requires_question = False

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
        self.question_tokenizer = kwargs.pop("question_tokenizer", None)
        self.auto_map = {"AutoProcessor": f"processing_llava_next_qgvtc.{type(self).__name__}"}
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
        """Takes the number of tokens a tile from a model's compression settings."""
        self.num_visual_tokens = settings.num_visual_tokens

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        """Tokens of an image of (orig_height, orig_width) pixels in tiles of (height, width), and one for the class
        token, which the stock class takes off again."""
        grid = tile_grid((orig_height, orig_width), self.image_processor.image_grid_pinpoints, height, self.patch_size)
        return grid.num_tokens(self.num_visual_tokens or grid.side**2) + 1


__all__ = ["LlavaNextQGVTCProcessor"]
