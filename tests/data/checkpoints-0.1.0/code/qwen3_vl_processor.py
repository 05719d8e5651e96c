"""What processors on Qwen3-VL share, whatever their method: how many placeholders an image gets."""

from __future__ import annotations

from transformers import Qwen3VLProcessor

from .compression_settings import CompressionSettings
from .compatibility import TRANSFORMERS_5
from .compressed_image import CompressedImage
from .compressed_image_processor import CompressedImageProcessorMixin


class Qwen3VLCountProcessor(CompressedImageProcessorMixin, Qwen3VLProcessor):
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
        whole = super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self.image_token * self.count_placeholders(len(whole) // len(self.image_token))

    def _call_stock(self, images, prompts, **kwargs):
        if not TRANSFORMERS_5 and images and not isinstance(images[0], CompressedImage):
            # 4.57 asks nobody for an image's placeholders, but turns these into them.
            written = iter([self.count_placeholders(length) for length in self._lengths(images, **kwargs)])
            pieces = [prompt.split(self.image_token) for prompt in prompts]
            prompts = [
                first + "".join("<|placeholder|>" * next(written) + piece for piece in rest) for first, *rest in pieces
            ]
        return super()._call_stock(images, prompts, **kwargs)

    def _lengths(self, images: list, **kwargs) -> list[int]:
        """Visual tokens of each image without compression."""
        options = kwargs.get("images_kwargs", {})
        names = ("min_pixels", "max_pixels", "size", "do_resize")
        options = {**options, **{name: kwargs[name] for name in names if name in kwargs}}
        grids = self.image_processor(images=images, **options)["image_grid_thw"]
        return [int(grid[0] * grid[1] * grid[2]) // self.image_processor.merge_size**2 for grid in grids]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        found = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if image_sizes is not None:
            found.num_image_tokens = [self.count_placeholders(number) for number in found.num_image_tokens]
        return found
