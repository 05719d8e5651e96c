"""LLaVA-1.5: an image is one picture, its visual tokens are its patches in their order."""

from __future__ import annotations

from foveate.modeling.backbones.any import AnyBackboneMixin
from foveate.modeling.core.declarations import Backbone


class LlavaBackboneMixin(AnyBackboneMixin):
    """On LLaVA-1.5."""

    publishes_short_names = True


BACKBONE = Backbone(model_type="llava", stem="Llava", title="LLaVA-1.5", mixin=LlavaBackboneMixin)
