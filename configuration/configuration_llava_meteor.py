"""Configuration of LLaVA-1.5 with LLaVA-Meteor."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig

from foveate.configuration.compression import CompressionConfigMixin
from foveate.configuration.meteor import MeteorSettings
from foveate.modeling.layers.slices import most_patches
from foveate.processing.base import MAX_ASPECT_RATIO


class LlavaMeteorConfig(CompressionConfigMixin, LlavaConfig):
    """`LlavaConfig` with the settings of the compression.

    Args:
        compression: the fields of [`MeteorSettings`].
    """

    model_type = "llava_meteor"
    settings_class = MeteorSettings

    def __init__(self, compression: MeteorSettings | dict[str, Any] | None = None, **kwargs):
        self.compression = self.settings_class.from_dict(compression)
        kwargs["auto_map"] = self.remote_code_map()
        super().__init__(**kwargs)
        self._check_method_fields()

    @classmethod
    def remote_code_map(cls) -> dict[str, str]:
        image_processor = "image_processing_llava_meteor.LlavaMeteorImageProcessor"
        return {**super().remote_code_map(), "AutoImageProcessor": image_processor}

    @property
    def num_patches(self) -> None:
        """Each image has its own number."""
        return None

    @property
    def square_view(self) -> int:
        """Patches of a square view."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def largest_view(self) -> int:
        """Patches of the view that has the most of them."""
        return most_patches(self.vision_config.image_size, self.vision_config.patch_size, MAX_ASPECT_RATIO)

    def _check_method_fields(self) -> None:
        layer, strategy = self.vision_feature_layer, self.vision_feature_select_strategy
        depth = self.vision_config.num_hidden_layers
        if not isinstance(layer, int) or strategy != "default" or layer % (depth + 1) == 0:
            raise ValueError(
                "The method 'meteor' needs one vision_feature_layer after the first and vision_feature_select_strategy "
                f"'default' (patches without the class token), not {layer!r} and {strategy!r}."
            )
        self.compression = self.compression.fitted_to(self)
