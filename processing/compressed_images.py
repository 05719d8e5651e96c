"""What the processors of prompt-agnostic methods share: prompts about images that were compressed before."""

from __future__ import annotations

from transformers import BatchFeature

from foveate.modeling.core.compressed_image import CompressedImage
from foveate.processing.base import CheckedProcessorMixin


class CompressedImageProcessorMixin(CheckedProcessorMixin):
    """Mixed into a processor, before the Transformers class. Images may be what a model's `compress` returned, all of
    them then; `compressed_images` takes the place of pixels in what comes back."""

    def _call_stock(self, images, prompts, **kwargs):
        if any(isinstance(image, CompressedImage) for image in images):
            return self._call_on_compressed(images, prompts, **kwargs)
        return super()._call_stock(images, prompts, **kwargs)

    def _call_on_compressed(self, images: list, prompts: list[str], **kwargs) -> BatchFeature:
        if not all(isinstance(image, CompressedImage) for image in images):
            raise ValueError("Pass pictures or compressed images, not both at once.")
        token, counts = self.image_token, iter(images)  # type: ignore[attr-defined]
        texts = []
        for prompt in prompts:
            first, *rest = prompt.split(token)
            texts.append(first + "".join(token * next(counts).num_placeholders + part for part in rest))
        kwargs.pop("images_kwargs", None)
        found = self.tokenizer(texts, **{**kwargs.pop("text_kwargs", {}), **kwargs})  # type: ignore[attr-defined]
        return BatchFeature({**found, "compressed_images": images})
