"""What the processors of all methods check of images and prompts before Transformers sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_utils import load_image
from transformers.utils import logging


logger = logging.get_logger(__name__)

MAX_ASPECT_RATIO = 100


class CheckedProcessorMixin:
    """Mixed into a processor, before the Transformers class."""

    def __call__(self, images=None, text=None, **kwargs):
        """
        Args:
            images: one image, a flat list over all rows, or a list a row (which may be empty).
            text: the prompt, or a list of prompts, with `<image>` where an image goes.

        Returns:
            What the stock processor returns.

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
        images = _flatten(images)
        num_images = [prompt.count(self.image_token) for prompt in prompts]  # type: ignore[attr-defined]
        if sum(num_images) != len(images):
            token = self.image_token  # type: ignore[attr-defined]
            raise ValueError(
                f"The prompts have {sum(num_images)} {token} placeholder(s) for {len(images)} image(s): "
                f"write one {token} for every image."
            )
        return [_readable(image) for image in images], prompts, num_images

    def _call_stock(self, images: list, prompts: list[str], **kwargs) -> Any:
        return super().__call__(images=images or None, text=prompts, **kwargs)  # type: ignore[misc]


def _flatten(images) -> list:
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for item in images for image in _flatten(item) if image is not None]


def _readable(image):
    """8-bit RGB as the image processor expects it. Raises `ValueError` for a picture that nothing could be seen in."""
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
