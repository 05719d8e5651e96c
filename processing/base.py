"""What the processors of all methods share: what they check of images and prompts before Transformers sees them, and
prompts about images that were compressed before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_utils import load_image
from transformers.utils import logging

from foveate.configuration.compression import MAX_ASPECT_RATIO, VIDEOS_ARE_NOT_TAKEN, CompressionSettings
from foveate.modeling.core.compressed_image import CompressedImage


logger = logging.get_logger(__name__)


if TYPE_CHECKING:

    class MixedIn:
        """For a type checker: a mixin has whatever the processor has that it is mixed into."""

        def __getattr__(self, name: str) -> Any: ...

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any: ...

        def to_dict(self) -> dict[str, Any]: ...

        def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str: ...

        from_pretrained: Any

        @property
        def model_input_names(self) -> list[str]: ...

else:
    MixedIn = object


class CompressionProcessorMixin(MixedIn):
    """Mixed into a backbone's processor, before the Transformers class.

    A processor class of a method on a backbone says its `settings_class` and the `file_name` that it has in a
    checkpoint's code, and defines no method.
    """

    settings_class: ClassVar[type[CompressionSettings]]
    file_name: ClassVar[str]

    def _begin(self, kwargs: dict[str, Any]) -> None:
        """What comes before the stock `__init__`; takes what is its own out of the arguments."""
        self.auto_map = {"AutoProcessor": f"{self.file_name}.{type(self).__name__}"}

    def set_compression(self, settings: CompressionSettings) -> None:
        """Takes the number of placeholders from a model's compression settings."""
        raise NotImplementedError

    def __call__(self, images=None, text=None, **kwargs):
        """
        Args:
            images: one image, a flat list over all rows, or a list a row (which may be empty). Where the method keeps
                images, they may be what a model's `compress` returned, all of them then.
            text: the prompt, or a list of prompts, with the image token where an image goes.

        Returns:
            What the stock processor returns; `compressed_images` in place of pixels.

        Raises:
            ValueError: images and placeholders that differ in number, an image that is too narrow to be seen.
        """
        images, prompts, _ = self._check_inputs(images, text)
        return self._call_stock(images, prompts, **kwargs)

    def _check_inputs(self, images, text) -> tuple[list, list[str], list[int]]:
        """All images in a flat list, the prompts, and how many images each prompt has."""
        if text is None:
            raise ValueError("Pass `text` with the prompt beside `images`.")
        prompts = [text] if isinstance(text, str) else list(text)
        images = flatten_images(images)
        num_images = [prompt.count(self.image_token) for prompt in prompts]
        if sum(num_images) != len(images):
            token = self.image_token
            raise ValueError(
                f"The prompts have {sum(num_images)} {token} placeholder(s) for {len(images)} image(s): "
                f"write one {token} for every image."
            )
        return [readable(image) for image in images], prompts, num_images

    def _call_stock(self, images: list, prompts: list[str], **kwargs) -> Any:
        if kwargs.pop("videos", None) is not None:
            raise ValueError(VIDEOS_ARE_NOT_TAKEN)
        if any(isinstance(image, CompressedImage) for image in images):
            return self._call_on_compressed(images, prompts, **kwargs)
        return super().__call__(images=images or None, text=prompts, **kwargs)

    def _call_on_compressed(self, images: list, prompts: list[str], **kwargs) -> BatchFeature:
        if not self.settings_class.keeps_images:
            raise ValueError("This method compresses an image for one question: pass the picture itself.")
        if not all(isinstance(image, CompressedImage) for image in images):
            raise ValueError("Pass pictures or compressed images, not both at once.")
        token, counts = self.image_token, iter(images)
        texts = []
        for prompt in prompts:
            first, *rest = prompt.split(token)
            texts.append(first + "".join(token * next(counts).num_placeholders + part for part in rest))
        kwargs.pop("images_kwargs", None)
        found = self.tokenizer(texts, **{**kwargs.pop("text_kwargs", {}), **kwargs})
        return BatchFeature({**found, "compressed_images": images})


def flatten_images(images) -> list:
    """Images however they are nested, in one list."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for item in images for image in flatten_images(item) if image is not None]


def readable(image):
    """8-bit RGB as the image processor expects it, or all of a nested list. Raises `ValueError` for a picture that
    nothing could be seen in."""
    if isinstance(image, (list, tuple)):
        return [readable(one) for one in image]
    if isinstance(image, str):  # an address, as in chats
        image = load_image(image)
    if not isinstance(image, Image.Image):
        return image
    if getattr(image, "n_frames", 1) > 1:
        logger.warning_once("An image has several frames: the first is read, the others aren't.")
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    width, height = image.size
    if min(width, height) == 0:
        raise ValueError(f"The image is {width} × {height} pixels: there is nothing in it to see.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"The image is {width} × {height} pixels; beyond {MAX_ASPECT_RATIO} : 1 nothing is left of it after "
            "resizing and cropping: crop it first."
        )
    if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip, not scale
        values = np.asarray(image)
        image = Image.fromarray((values // 257 if values.max() > 255 else values).astype(np.uint8))
    image = image.convert("RGB") if image.mode != "RGB" else image
    if min(width, height) < 4:  # 4.57's image processor takes 1 or 3 rows for channels
        image = image.resize((4 * width, 4 * height), Image.Resampling.NEAREST)
    return image
