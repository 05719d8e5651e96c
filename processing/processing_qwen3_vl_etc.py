"""Processor of Qwen3-VL with ETC."""

from __future__ import annotations

from foveate.configuration.etc import ETCSettings
from foveate.processing.qwen_vl import Qwen3VLCountProcessor


class Qwen3VLETCProcessor(Qwen3VLCountProcessor):
    """`Qwen3VLProcessor` that writes a placeholder for each visual token of an image, then for each compressed one.

    Args:
        num_compressed: compressed tokens of an image; `set_compression` sets it.
        others: as in `Qwen3VLProcessor`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        num_compressed=1,
        **kwargs,
    ):
        self.auto_map = {"AutoProcessor": f"processing_qwen3_vl_etc.{type(self).__name__}"}
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        self.num_compressed = num_compressed

    @property
    def settings(self):
        return ETCSettings(self.num_compressed)

    def set_compression(self, settings) -> None:
        """Takes the number of compressed tokens from a model's compression settings."""
        self.num_compressed = settings.num_visual_tokens


__all__ = ["Qwen3VLETCProcessor"]
