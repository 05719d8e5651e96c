"""What LLaVA-Meteor's account needs to know of its views.

Every view runs at the length of the image's longest: a batch pads views to its longest, which may be another image's.
The scan of a state space block counts by its one product, of every position's state with its C, a few positions of
padding of its chunks included. What else it does is elementwise, so not in the account: some 6 operations for each of
width × state_size values a position, at LLaVA-1.5's shapes 0.2 GFLOPs a view beside the fusion's 15 and the vision
tower's 370.
"""

from __future__ import annotations

from typing import Any

import torch

from foveate.modeling.layers.slices import slice_grid_of


def image_inputs(config: Any, image_size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The patches of an image's views, without values."""
    vision, (width, height) = config.vision_config, image_size
    grid = slice_grid_of(config, (height, width))
    longest = max(rows * columns for rows, columns in grid.shapes)
    values = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.empty(1, grid.num_views, longest, values, dtype=config.dtype, device="meta"),
        "image_sizes": torch.tensor([[height, width]]),
    }
