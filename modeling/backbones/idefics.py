"""Idefics 2 and 3 and SmolVLM: the stock model gives the tiles of all images of a row as one."""

from __future__ import annotations

from foveate.modeling.backbones.any import AnyBackboneMixin
from foveate.modeling.core.declarations import Backbone


class Idefics2BackboneMixin(AnyBackboneMixin):
    """On Idefics 2, whose resampler makes as many tokens of every tile."""

    @property
    def crop_length(self) -> int:
        return self.config.perceiver_config.resampler_n_latents


class Idefics3BackboneMixin(AnyBackboneMixin):
    """On Idefics 3 and SmolVLM, which put the patches of a square together."""

    @property
    def crop_length(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2


BACKBONES = (
    Backbone(model_type="idefics2", stem="Idefics2", title="Idefics2", mixin=Idefics2BackboneMixin),
    Backbone(model_type="idefics3", stem="Idefics3", title="Idefics3", mixin=Idefics3BackboneMixin),
    Backbone(model_type="smolvlm", stem="SmolVLM", title="SmolVLM", mixin=Idefics3BackboneMixin),
)
