"""Processor of LLaVA-1.5 with Recoverable Compression."""

from __future__ import annotations

from transformers import LlavaProcessor

from foveate.processing.question import QuestionProcessorMixin


class LlavaRecoverableProcessor(QuestionProcessorMixin, LlavaProcessor):
    """`LlavaProcessor` that also tokenizes the question that guides each image.

    It writes a placeholder for every patch, the upper bound: how many tokens an image is compressed to is known only
    when it has been seen.

    Args:
        question_tokenizer: tokenizer of the CLIP text tower that reads the question.
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
        self.question_tokenizer = kwargs.pop("question_tokenizer", None)
        self.auto_map = {"AutoProcessor": f"processing_llava_recoverable.{type(self).__name__}"}
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
        """Nothing here depends on the settings: the placeholders are the upper bound whatever the budget."""


__all__ = ["LlavaRecoverableProcessor"]
