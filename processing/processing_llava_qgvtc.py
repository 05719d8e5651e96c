"""Processor of LLaVA-1.5 with QG-VTC."""

from __future__ import annotations

from transformers import LlavaProcessor

from foveate.processing.placeholder_count import LlavaExactCountMixin
from foveate.processing.question import QuestionProcessorMixin


class LlavaQGVTCProcessor(QuestionProcessorMixin, LlavaExactCountMixin, LlavaProcessor):
    """`LlavaProcessor` that writes as many placeholders as an image has tokens after compression, and that also
    tokenizes the question that guides it: the last user turn's, for all images of a prompt.

    Args:
        question_tokenizer: tokenizer of the CLIP text tower that reads the question.
        num_additional_image_tokens: as in `LlavaProcessor`, what there is beside a token a patch. [`set_compression`]
            sets it to what the compression takes away, so that wherever the stock formula is used, it counts right.
        others: as in `LlavaProcessor`.
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
        **kwargs,
    ):
        self.question_tokenizer = kwargs.pop("question_tokenizer", None)
        self.auto_map = {"AutoProcessor": f"processing_llava_qgvtc.{type(self).__name__}"}
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )


__all__ = ["LlavaQGVTCProcessor"]
