"""Qwen3-VL: an image has a size of its own, and the patches of all images lie in one tensor."""

from __future__ import annotations

from typing import Any

import torch

from foveate.configuration.compression import VIDEOS_ARE_NOT_TAKEN
from foveate.modeling.backbones.any import AnyBackboneMixin
from foveate.modeling.compatibility import without_cache_positions
from foveate.modeling.core.declarations import Backbone


class Qwen3VLBackboneMixin(AnyBackboneMixin):
    """On Qwen3-VL."""

    visual_inputs = ("pixel_values", "image_grid_thw")
    publishes_short_names = False

    def crop_lengths(self, images):
        merge = self.config.vision_config.spatial_merge_size
        return [([length], 0) for length in (images["image_grid_thw"].prod(-1) // merge**2).tolist()]

    def take_images(self, images, chosen):
        """The patches of all images lie in one tensor."""
        grids, pixels = images.get("image_grid_thw"), images.get("pixel_values")
        if grids is None or pixels is None:
            return super().take_images(images, chosen)
        pieces = pixels.split(grids.prod(-1).tolist())
        taken = torch.cat([pieces[index] for index in chosen.tolist()])
        return {**images, "pixel_values": taken, "image_grid_thw": grids[chosen.to(grids.device)]}

    def read_images(self, images):
        if images["image_grid_thw"] is None:
            raise ValueError("pixel_values need image_grid_thw: pass what the processor returns.")
        return super().read_images(images)

    def without_unread_inputs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments for the language model. Position ids and token types follow from the columns."""
        if any(arguments.pop(name, None) is not None for name in ("pixel_values_videos", "video_grid_thw")):
            raise ValueError(VIDEOS_ARE_NOT_TAKEN)
        unread = ("position_ids", "mm_token_type_ids")
        return without_cache_positions({name: given for name, given in arguments.items() if name not in unread})


BACKBONE = Backbone(model_type="qwen3_vl", stem="Qwen3VL", title="Qwen3-VL", mixin=Qwen3VLBackboneMixin)
