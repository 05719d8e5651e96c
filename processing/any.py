"""The processor of any backbone: the stock one, with fewer placeholders."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from foveate.configuration.compression import VIDEOS_ARE_NOT_TAKEN
from foveate.modeling.compatibility import image_options
from foveate.modeling.core.compressed_image import CompressedImage
from foveate.processing.base import CompressionProcessorMixin, flatten_images, readable


class AnyProcessorMixin(CompressionProcessorMixin):
    """Mixed into a processor, before the Transformers class: of every stretch of placeholders that the stock class
    writes for an image, as many are left as its tokens are after compression. What stands between the stretches (of
    tiles, their tags, line breaks) stays.

    Attributes:
        num_visual_tokens, keep_ratio: as in the method's settings; without either nothing is compressed.
        placeholder: the token that stands for a visual token, which may be another one than what a prompt has for an
            image.
    """

    num_visual_tokens: int | None = None
    keep_ratio: float | None = None
    placeholder: str = ""

    #: What a saved processor has besides the arguments of the stock class.
    own_fields: ClassVar[tuple[str, ...]] = ("num_visual_tokens", "keep_ratio", "placeholder")

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        # The stock class reads its own `__init__` to know what to take, so that stays as it is.
        given = {**processor_dict, **kwargs}
        own = {name: given.pop(name) for name in cls.own_fields if name in given}
        found = super().from_args_and_dict(args, given)
        for name, value in own.items():
            setattr(found[0] if isinstance(found, tuple) else found, name, value)
        return found

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.own_fields}
        return {**super().to_dict(), **own, "auto_map": {"AutoProcessor": f"{self.file_name}.{type(self).__name__}"}}

    def set_compression(self, settings):
        self.num_visual_tokens, self.keep_ratio = settings.budget

    def count_tokens(self, length: int) -> int:
        """What is left of `length` visual tokens."""
        return self.settings_class.with_budget(self.num_visual_tokens, self.keep_ratio).count_tokens(length)

    def tile_length_of(self, image_inputs: Any, **kwargs: Any) -> int | None:
        """Visual tokens of a tile, where the placeholders of several tiles may stand together.

        Args:
            image_inputs: what the image processor returned.
            kwargs: as `replace_image_token` has them.
        """
        sizes = getattr(self, "size_conversion", None)  # Aria: by the side of its tiles
        if sizes is not None:
            return sizes[image_inputs["pixel_values"].shape[2]]
        return getattr(self, "image_seq_length", None) or kwargs.get("num_image_tokens")

    def compress_text(self, text: str, tile_length: int | None = None) -> str:
        """What the stock class writes for an image, with the placeholders that are left."""
        token = self.placeholder

        def compressed(stretch: re.Match) -> str:
            length = len(stretch[0]) // len(token)
            if tile_length is not None and length % tile_length == 0:
                return token * (self.count_tokens(tile_length) * (length // tile_length))
            return token * self.count_tokens(length)

        return re.sub(f"(?:{re.escape(token)})+", compressed, text)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        text = super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self.compress_text(text, self.tile_length_of(image_inputs, **kwargs))

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        found = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if image_sizes is not None:
            dropped = [self._num_dropped((int(height), int(width)), **kwargs) for height, width in image_sizes]
            found.num_image_tokens = [known - number for known, number in zip(found.num_image_tokens, dropped)]
        return found

    def _num_dropped(self, image_size: tuple[int, int], **kwargs: Any) -> int:
        """Placeholders that an image of (height, width) pixels has too many in the stock class: counted in what that
        writes for an empty one, as no formula holds for all."""
        image = Image.fromarray(np.zeros((*image_size, 3), dtype=np.uint8))
        options = image_options(self, **kwargs)
        inputs = self.image_processor([image], **options)
        text = super().replace_image_token(inputs, 0, **options)
        left = self.compress_text(text, self.tile_length_of(inputs, **options))
        return text.count(self.placeholder) - left.count(self.placeholder)

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        """
        Args:
            images: as in the stock class.
            text: the prompt, or a list of prompts, with the image token where an image goes.

        Raises:
            ValueError: as in the stock class; an image that is too narrow to be seen; a video.
        """
        if videos is not None:
            raise ValueError(VIDEOS_ARE_NOT_TAKEN)
        if any(isinstance(image, CompressedImage) for image in flatten_images(images)):
            return self._call_on_compressed(flatten_images(images), [text] if isinstance(text, str) else text, **kwargs)
        return super(CompressionProcessorMixin, self).__call__(images=readable(images), text=text, **kwargs)

    def _call_on_compressed(self, images, prompts, **kwargs):
        if self.image_token != self.placeholder or self._writes_more:
            raise ValueError(
                "The processor of this model writes more than placeholders for an image, so one that was compressed "
                "before can't stand for it: pass the picture itself."
            )
        return super()._call_on_compressed(images, prompts, **kwargs)

    @property
    def _writes_more(self) -> bool:
        inputs = self.image_processor([Image.new("RGB", (64, 64))])
        options = image_options(self)
        return bool(super().replace_image_token(inputs, 0, **options).replace(self.placeholder, ""))
