"""What processors share that write as many placeholders as follow from an image's size."""

from __future__ import annotations


class LlavaExactCountMixin:
    """Mixed into a processor, before `LlavaProcessor`, whose images all have the same number of tokens."""

    def set_compression(self, settings) -> None:
        """Takes the number of placeholders from a model's compression settings, so that wherever the stock formula is
        used, it counts right."""
        crop = self.image_processor.crop_size  # type: ignore[attr-defined]
        num_patches = (crop["height"] // self.patch_size) * (crop["width"] // self.patch_size)  # type: ignore[attr-defined]
        class_token = 1  # the stock formula takes it off again
        self.num_additional_image_tokens = settings.count_placeholders(num_patches) - num_patches + class_token
