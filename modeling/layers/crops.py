"""The pictures that a vision tower sees of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Crops:
    """Pictures of one size: whole images, or the tiles that they are cut into.

    Args:
        pixel_values: (crops, 3, height, width), those of all images, image after image.
        image: (crops,), the image of each; `None`: each is one.
        selectable: (crops, patches) bool, the patches that are not padding; `None`: all.
        layout: what the backbone has to know of how they were cut.
    """

    pixel_values: torch.Tensor
    image: torch.Tensor | None = None
    selectable: torch.Tensor | None = None
    layout: Any = None
