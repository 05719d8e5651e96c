"""What processors on Qwen3-VL share, whatever their method: how many placeholders an image gets."""

from __future__ import annotations

from transformers import Qwen3VLProcessor

from foveate.configuration.compression import CompressionSettings
from foveate.modeling.compatibility import AsksForPlaceholdersMixin
from foveate.processing.compressed_images import CompressedImageProcessorMixin


class Qwen3VLCountProcessor(CompressedImageProcessorMixin, AsksForPlaceholdersMixin, Qwen3VLProcessor):
    """`Qwen3VLProcessor` that writes as many placeholders as an image takes with the compression. A method brings
    `settings`."""

    @property
    def settings(self) -> CompressionSettings | None:
        """The model's, as far as they count; `None`: nothing is compressed."""
        raise NotImplementedError

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        """As [`CompressedImageProcessorMixin`], and it refuses videos."""
        if videos is not None:
            raise ValueError("This model takes images, not videos yet: pass single frames as images.")
        return super().__call__(images, text, **kwargs)

    def count_placeholders(self, length: int) -> int:
        """Columns of an image of `length` visual tokens without compression."""
        return length if self.settings is None else self.settings.count_placeholders(length)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        length = int(image_inputs["image_grid_thw"][image_idx].prod()) // self.image_processor.merge_size**2
        return self.image_token * self.count_placeholders(length)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        found = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if image_sizes is not None:
            found.num_image_tokens = [self.count_placeholders(number) for number in found.num_image_tokens]
        return found
