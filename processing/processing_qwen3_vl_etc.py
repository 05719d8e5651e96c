"""Processor of Qwen3-VL with ETC."""

from __future__ import annotations

from transformers import Qwen3VLProcessor

from ..modeling.compatibility import TRANSFORMERS_5
from ..modeling.compressed_image import CompressedImage
from .compressed_image_processor import CompressedImageProcessorMixin


class Qwen3VLETCProcessor(CompressedImageProcessorMixin, Qwen3VLProcessor):
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

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        """As [`CompressedImageProcessorMixin`], and it refuses videos."""
        if videos is not None:
            raise ValueError("ETC on Qwen3-VL takes images, not videos yet: pass single frames as images.")
        return super().__call__(images, text, **kwargs)

    def set_compression(self, settings) -> None:
        """Takes the number of compressed tokens from a model's compression settings."""
        self.num_compressed = settings.num_visual_tokens

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return super().replace_image_token(image_inputs, image_idx, **kwargs) + self.image_token * self.num_compressed

    def _call_stock(self, images, prompts, **kwargs):
        if not TRANSFORMERS_5 and images and not isinstance(images[0], CompressedImage):
            # 4.57 asks nobody: it turns an image's token into so many of these, and all of these back.
            written = self.image_token + "<|placeholder|>" * self.num_compressed
            prompts = [prompt.replace(self.image_token, written) for prompt in prompts]
        return super()._call_stock(images, prompts, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        found = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if image_sizes is not None:
            found.num_image_tokens = [number + self.num_compressed for number in found.num_image_tokens]
        return found


__all__ = ["Qwen3VLETCProcessor"]
