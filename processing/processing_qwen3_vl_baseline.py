"""Processor of Qwen3-VL with a training-free baseline."""

from __future__ import annotations

from foveate.configuration.sequence import SequenceSettings
from foveate.processing.qwen_vl import Qwen3VLCountProcessor


class Qwen3VLBaselineProcessor(Qwen3VLCountProcessor):
    """`Qwen3VLProcessor` that writes as many placeholders as an image has tokens after compression.

    Args:
        num_visual_tokens, keep_ratio: as in [`SequenceSettings`]; without either nothing is compressed.
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
        **kwargs,
    ):
        self.auto_map = {"AutoProcessor": f"processing_qwen3_vl_baseline.{type(self).__name__}"}
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        self.num_visual_tokens, self.keep_ratio = num_visual_tokens, keep_ratio

    @property
    def settings(self):
        if self.num_visual_tokens is None and self.keep_ratio is None:
            return None
        return SequenceSettings(self.num_visual_tokens, self.keep_ratio)

    def set_compression(self, settings) -> None:
        """Takes the budget from a model's compression settings."""
        self.num_visual_tokens, self.keep_ratio = settings.num_visual_tokens, settings.keep_ratio


__all__ = ["Qwen3VLBaselineProcessor"]
