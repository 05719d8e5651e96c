"""LLaVA-1.5: an image is one picture, its visual tokens are its patches in their order."""

from __future__ import annotations

from foveate.modeling.backbones.any import AnyBackboneMixin
from foveate.modeling.core.declarations import Backbone


class LlavaBackboneMixin(AnyBackboneMixin):
    """On LLaVA-1.5."""

    visual_inputs = ("pixel_values",)
    names_vision_model = True

    def crop_lengths(self, images):
        """Every image is encoded as a whole, and has the same number of patches."""
        pixel_values, num_patches = images["pixel_values"], self.config.num_patches
        embeds = images.get("image_embeds") if pixel_values is None else None
        number = len(pixel_values) if embeds is None else len(embeds) // num_patches
        return [([num_patches], 0)] * number


BACKBONE = Backbone(model_type="llava", stem="Llava", title="LLaVA-1.5", mixin=LlavaBackboneMixin)
