"""What LLaVA-Meteor costs, read off `LlavaMeteorModel.compress_images`, the fusion and the selection.

Every view runs at the length of the image's longest: a batch pads views to its longest, which may be another image's.

The scan of a state space block counts by its one product, of every position's state with its C. What else it does is
elementwise, so not in the account: some 6 operations for each of width × state_size values a position, at LLaVA-1.5's
shapes 0.2 GFLOPs a view beside the fusion's 15 and the vision tower's 370. Nor is what a device does to be faster: a
scan in chunks runs twice, and through a few positions of padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from foveate.evaluation.flops import MethodAccount, VisionLayer
from foveate.modeling.layers.selective_scan import SelectiveStateSpace
from foveate.modeling.layers.slices import slice_grid_of
from foveate.modeling.methods.meteor_algorithm import FlashGlobalFusion


def account(config: Any, stock: MethodAccount, image_size: tuple[int, int]) -> MethodAccount:
    """Layers after the features' don't run; the projector reads as many tokens of every view."""
    settings, vision = config.compression, config.vision_config
    grid = slice_grid_of(config, image_size[::-1])
    patches = max(rows * columns for rows, columns in grid.shapes)
    kept = min(settings.num_visual_tokens, patches)
    multiply_adds = _fusion(config, patches)
    if kept < patches:
        by_class, by_instruction = settings.visual_share > 0, settings.visual_share < 1
        multiply_adds += (by_class * (1 + patches) + by_instruction * patches) * vision.hidden_size
    return MethodAccount(
        vision_layers=[VisionLayer.plain(1 + patches)] * (config.vision_feature_layer % (vision.num_hidden_layers + 1)),
        tokens_per_tile=kept,
        num_tiles=grid.num_views,
        visual_tokens=grid.num_tokens(settings.num_visual_tokens),
        compressor=2 * grid.num_views * multiply_adds,
    )


def _fusion(config: Any, patches: int) -> int:
    """Multiply-adds of the fusion of a view: both blocks on all that they scan."""
    settings = config.compression
    length = patches * (2 if settings.scan == "local-to-single" else 1) + 1  # the instruction token
    with torch.device("meta"):
        fusion = FlashGlobalFusion(config.vision_config.hidden_size, settings.state_size)
    found = 0
    for module in fusion.modules():
        if isinstance(module, nn.Linear):
            found += length * module.weight.numel()
        elif isinstance(module, nn.Conv1d):  # pads on both sides
            found += (length + module.padding[0]) * module.weight.numel()
        elif isinstance(module, SelectiveStateSpace):
            found += length * module.A_log.numel()
    return found
